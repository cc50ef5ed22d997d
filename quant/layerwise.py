"""Runs a large model one decoder layer at a time, forward and backward.

transformers supplies the modules. A layer's weights are read from the checkpoint when the layer is needed and freed
after it, so the peak of memory is about two float32 layers above the embedding, for a model of any depth.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpllm.base.errors import InputError
from dpllm.quant.source import ModelSource


class _Stop(Exception):
    """Raised by the last probe once every decoder layer's arguments are known."""


class _Probe(nn.Module):
    """Replaces a decoder layer: keeps its arguments, and returns the hidden state unchanged."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.hidden, self.kwargs = hidden, kwargs
        if self.last:
            raise _Stop
        return hidden


class LayerwiseModel:
    """A causal language model whose decoder layers are loaded on demand, in float32.

    Linear layers are found by type (nn.Linear inside the longest ModuleList), without a table of names.
    """

    def __init__(self, source: ModelSource, device: str = "cpu"):
        from transformers import AutoConfig, AutoModelForCausalLM

        self.source, self.device = source, device
        with contextlib.redirect_stdout(io.StringIO()):
            config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self.skeleton = AutoModelForCausalLM.from_config(config)
        self.config = config
        lists = [(n, m) for n, m in self.skeleton.named_modules() if isinstance(m, nn.ModuleList)]
        if not lists:
            raise InputError(f"{source.path}: no decoder layers found in a '{config.model_type}' model.")
        self.layers_name, self.layers = max(lists, key=lambda item: len(item[1]))
        self.head_name = next(
            n for n, m in self.skeleton.named_modules() if m is self.skeleton.get_output_embeddings()
        )
        self.embedding_name = next(
            n for n, m in self.skeleton.named_modules() if m is self.skeleton.get_input_embeddings()
        )
        self.tied = bool(config.tie_word_embeddings)

    def __len__(self) -> int:
        return len(self.layers)

    def layer_prefix(self, index: int) -> str:
        """The layer's name in the checkpoint."""
        return f"{self.layers_name}.{index}"

    def linears(self, index: int) -> list[str]:
        """Full names of the linear layers of one decoder layer."""
        modules = self.layers[index].named_modules()
        return [f"{self.layer_prefix(index)}.{n}" for n, m in modules if isinstance(m, nn.Linear)]

    def head_weight(self) -> str:
        """The name of the tensor that the head multiplies with: the embedding's, if the two are tied."""
        return f"{self.embedding_name if self.tied else self.head_name}.weight"

    def load_layer(self, index: int) -> nn.Module:
        """One decoder layer in float32, with its weights from the checkpoint."""
        empty = self.layers[index]
        layer = type(empty)(
            self.config, index
        )  # not on the meta device: non-persistent buffers need their values
        layer = layer.float().requires_grad_(False)
        for (
            name,
            tensor,
        ) in (
            layer.state_dict().items()
        ):  # one tensor at a time, so that there are never two copies of a layer
            tensor.copy_(self.source.read(f"{self.layer_prefix(index)}.{name}"))
        return layer.to(self.device).eval()

    def embed(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """The first hidden states float32 [S, T, H] of sequences int64 [S, T], and each layer's keyword arguments.

        The arguments differ between layers if some layers see a window only.
        """
        body = self.skeleton.base_model
        weight = self.source.read(f"{self.embedding_name}.weight").float()
        embedding = nn.Embedding.from_pretrained(weight)
        if hasattr(body, "rotary_emb"):
            body.rotary_emb = type(body.rotary_emb)(self.config)
        layers, own = list(self.layers), body.get_input_embeddings()
        probes = [_Probe(last=i == len(layers) - 1) for i in range(len(layers))]
        self._set_layers(probes)
        body.set_input_embeddings(embedding)
        try:
            with contextlib.suppress(_Stop), torch.no_grad():
                body(input_ids=ids, use_cache=False)
        finally:
            self._set_layers(layers)
            body.set_input_embeddings(own)
        assert probes[0].hidden is not None
        return probes[0].hidden.to(self.device), [self._moved(p.kwargs) for p in probes]

    def _set_layers(self, layers: Sequence[nn.Module]) -> None:
        for index, layer in enumerate(layers):
            self.layers[index] = layer

    def _moved(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's arguments on the device, without the arguments that would make it keep a cache."""
        move = lambda v: v.to(self.device) if isinstance(v, Tensor) else v  # noqa: E731
        return {
            k: tuple(map(move, v)) if isinstance(v, tuple) else move(v)
            for k, v in kwargs.items()
            if k not in ("past_key_values", "use_cache")
        }

    def head_gradients(self, states: Tensor, sequences: Tensor) -> Tensor:
        """The gradient [S, T, H] of the sum of next-token losses with respect to the last hidden states.

        states: [S, T, H]. sequences: int64 [S, T].
        """
        final = next(m for n, m in self.skeleton.base_model.named_children() if "norm" in n)
        name = next(n for n, m in self.skeleton.named_modules() if m is final)
        norm = type(final)(self.config.hidden_size, eps=getattr(final, "variance_epsilon", 1e-6))
        norm.load_state_dict({n: self.source.read(f"{name}.{n}").float() for n in norm.state_dict()})
        norm, head = norm.to(self.device), self.source.read(self.head_weight()).float().to(self.device)
        gradients = []
        for state, ids in zip(states, sequences, strict=True):
            hidden = state.to(self.device).requires_grad_()
            logits = norm(hidden)[:-1] @ head.T
            loss = nn.functional.cross_entropy(logits, ids[1:].to(self.device), reduction="sum")
            gradients.append(torch.autograd.grad(loss, hidden)[0].cpu())
        return torch.stack(gradients)


def call_layer(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Runs one decoder layer. Some layers return a tuple, whose first item is the hidden state."""
    out = layer(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out
