"""The configuration of a model, read from its Hugging Face config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpllm.base.errors import InputError
from dpllm.model.generation_config import GENERATION_CONFIG
from dpllm.quant.config import CONFIG, SUPPORTED, read_config, refusing
from dpllm.quant.source import read_json

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip

__all__ = ["SUPPORTED", "ModelConfig", "end_token_ids"]


@dataclass(frozen=True)
class ModelConfig:
    """The shapes and constants of a Llama-family decoder. Tuples hold one entry for each layer.

    windows: pairs that a layer's attention sees; None: all. uses_rope: whether a layer applies rotary embedding.
    inv_freq: float32 [head_dim / 2], its inverse frequencies. rope_scale: factor on its cos and sin. eos_ids: tokens
    that end a text (`end_token_ids`).
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
    qk_norm: bool
    windows: tuple[int | None, ...]
    uses_rope: tuple[bool, ...]
    inv_freq: torch.Tensor
    rope_scale: float
    eos_ids: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """Reads path/config.json. Raises InputError for a model type this decoder does not run."""
        return cls._of(read_config(path), path)

    @classmethod
    def _of(cls, c: Any, path: Path) -> ModelConfig:
        _check_sizes(c, path / CONFIG)
        head_dim = getattr(c, "head_dim", c.hidden_size // c.num_attention_heads)
        if type(head_dim) is not int or head_dim < 2 or head_dim % 2:
            raise InputError(f"{path / CONFIG}: head_dim is {head_dim!r}, which is not an even number.")
        inv_freq, rope_scale = _rope_frequencies(c, head_dim, path / CONFIG)
        return cls(
            model_type=c.model_type,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_layers=c.num_hidden_layers,
            num_heads=c.num_attention_heads,
            num_kv_heads=c.num_key_value_heads,
            head_dim=head_dim,
            vocab_size=c.vocab_size,
            rms_eps=c.rms_norm_eps,
            max_positions=c.max_position_embeddings,
            qk_norm=c.model_type == "qwen3",
            windows=_windows(c, path / CONFIG),
            uses_rope=_uses_rope(c, path / CONFIG),
            inv_freq=inv_freq,
            rope_scale=rope_scale,
            eos_ids=end_token_ids(path),
        )


def _check_sizes(c: Any, file: Path) -> None:
    """Raises InputError for sizes, an activation or a norm with which transformers does not compute."""
    for field in SIZES:
        if type(getattr(c, field)) is not int or getattr(c, field) < 1:
            raise InputError(
                f"{file}: {field} is {getattr(c, field)!r}, which is not a positive whole number."
            )
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    if heads % kv_heads:
        raise InputError(f"{file}: {heads} attention heads cannot share {kv_heads} key-value heads evenly.")
    if c.hidden_act not in ("silu", "swish"):  # two names of one function
        raise InputError(f"{file}: hidden_act '{c.hidden_act}' is not supported, only 'silu'.")
    if not (isinstance(c.rms_norm_eps, (int, float)) and 0 <= c.rms_norm_eps < math.inf):
        raise InputError(f"{file}: rms_norm_eps is {c.rms_norm_eps!r}, which is not a small positive number.")


def _windows(c: Any, file: Path) -> tuple[int | None, ...]:
    """The pairs that each layer's attention sees; None: all."""
    window = getattr(c, "sliding_window", None)
    if c.model_type == "llama":  # whose prompts transformers reads without a window, and decodes with one
        if window is not None or set(getattr(c, "layer_types", None) or ()) - {"full_attention"}:
            raise InputError(f"{file}: a llama has no sliding_window or layer_types. Remove the field.")
        return (None,) * c.num_hidden_layers
    if c.model_type == "mistral":
        types = ["full_attention" if window is None else "sliding_attention"] * c.num_hidden_layers
    else:
        types = c.layer_types
    if odd := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise InputError(f"{file}: layer type '{odd[0]}' is not supported (full and sliding attention are).")
    windowed = "sliding_attention" in types or c.model_type == "ministral"  # which makes the mask in any case
    if windowed and (type(window) is not int or window < 1):
        raise InputError(
            f"{file}: sliding_window is {window!r}, but layers have sliding attention. Mend the field."
        )
    return tuple(window if t == "sliding_attention" else None for t in types)


def _uses_rope(c: Any, file: Path) -> tuple[bool, ...]:
    """Whether each layer applies rotary embedding; only SmolLM3 has layers that do not."""
    layers = c.num_hidden_layers
    if c.model_type != "smollm3":
        return (True,) * layers
    if len(c.no_rope_layers) < layers:
        raise InputError(f"{file}: no_rope_layers has {len(c.no_rope_layers)} entries for {layers} layers.")
    return tuple(bool(r) for r in c.no_rope_layers[:layers])


def end_token_ids(path: Path) -> tuple[int, ...]:
    """Returns the tokens that end a text, by the rule of transformers 5.

    generation_config.json alone decides where it exists, even if it names no end token; otherwise config.json decides.
    A default of the model type's class does not count. Raises InputError for a value that is neither a whole number, a
    list of them, nor null.
    """
    file = path / GENERATION_CONFIG
    if not file.is_file():
        file = path / CONFIG
    value = read_json(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):  # a JSON `true` would pass isinstance
        raise InputError(
            f"{file}: eos_token_id is {value!r}. Give a token's number, a list of numbers, or null."
        )
    return tuple(ids)


def _rope_frequencies(c: Any, head_dim: int, file: Path) -> tuple[torch.Tensor, float]:
    """Returns (inverse frequencies float32 [head_dim / 2], factor on cos and sin), with Llama 3's scaling applied."""
    rope = c.rope_parameters
    kind = rope.get("rope_type")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise InputError(f"{file}: rope type '{kind}' is not supported (default, linear, llama3, yarn are).")
    with refusing(file):
        if kind == "default":
            exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            inv_freq, factor = 1.0 / rope["rope_theta"] ** exponent, 1.0
        else:
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](c, torch.device("cpu"))
    if len(inv_freq) != head_dim // 2:
        raise InputError(f"{file}: rope_parameters rotate a part of each head only, which is not supported.")
    if not (torch.isfinite(inv_freq).all() and math.isfinite(factor)):
        raise InputError(f"{file}: rope_parameters give frequencies that are not finite. Restore the file.")
    return inv_freq.float(), float(factor)
