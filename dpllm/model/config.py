"""The configuration of a model, read from its Hugging Face config.json."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpllm.base.errors import InputError
from dpllm.model.generation_config import end_tokens
from dpllm.quant.source import read_json

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


@dataclass(frozen=True)
class ModelConfig:
    """The shapes and constants of a Llama-family decoder. Tuples hold one entry for each layer.

    windows: pairs that a layer's attention sees; None: all. uses_rope: whether a layer applies rotary embedding.
    inv_freq: float32 [head_dim / 2], its inverse frequencies. rope_scale: factor on its cos and sin. eos_ids: tokens
    that end a text.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_eps: float
    max_positions: int
    tied: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    uses_rope: tuple[bool, ...]
    inv_freq: torch.Tensor
    rope_scale: float
    eos_ids: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """Reads path/config.json. Raises InputError for a model type this decoder does not run."""
        check_model_type(read_json(path / "config.json"), path)
        from transformers import AutoConfig

        try:
            with contextlib.redirect_stdout(io.StringIO()):
                c: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except Exception as e:  # transformers validates with many exception kinds
            reason = " ".join(str(e).split())[:200] or type(e).__name__
            raise InputError(f"{path / 'config.json'} is not valid: {reason}") from None
        return cls._of(c, path)

    @classmethod
    def _of(cls, c: Any, path: Path) -> ModelConfig:
        if c.hidden_act != "silu":
            raise InputError(
                f"{path / 'config.json'}: hidden_act '{c.hidden_act}' is not supported, only 'silu'."
            )
        layers = c.num_hidden_layers
        types = getattr(c, "layer_types", None) or ["full_attention"] * layers
        window = getattr(c, "sliding_window", None)
        if c.model_type == "mistral" and window:
            types = ["sliding_attention"] * layers
        no_rope = getattr(c, "no_rope_layers", None) or [1] * layers
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        inv_freq, rope_scale = _rope_frequencies(c, head_dim, path)
        return cls(
            model_type=c.model_type,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_layers=layers,
            num_heads=c.num_attention_heads,
            num_kv_heads=c.num_key_value_heads,
            head_dim=head_dim,
            vocab_size=c.vocab_size,
            rms_eps=c.rms_norm_eps,
            max_positions=c.max_position_embeddings,
            tied=bool(c.tie_word_embeddings),
            qk_norm=c.model_type == "qwen3",
            windows=tuple(window if t == "sliding_attention" else None for t in types),
            uses_rope=tuple(bool(r) for r in no_rope),
            inv_freq=inv_freq,
            rope_scale=rope_scale,
            eos_ids=end_tokens(path, c.eos_token_id),
        )


def check_model_type(config: dict[str, Any], path: Path) -> None:
    """Raises InputError unless the decoder runs the `model_type` of this configuration."""
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        raise InputError(
            f"{path / 'config.json'}: model type {kind!r} is not supported. dpllm runs: {', '.join(SUPPORTED)} "
            "(SmolLM and SmolLM2 are 'llama')."
        )


def _rope_frequencies(c: Any, head_dim: int, path: Path) -> tuple[torch.Tensor, float]:
    """Returns (inverse frequencies float32 [head_dim / 2], factor on cos and sin), with Llama 3's scaling applied."""
    rope = c.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / rope["rope_theta"] ** exponent, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind not in ("linear", "llama3", "yarn"):
        raise InputError(
            f"{path / 'config.json'}: rope type '{kind}' is not supported (default, linear, llama3, yarn are)."
        )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](c, torch.device("cpu"))
    return inv_freq.float(), float(factor)
