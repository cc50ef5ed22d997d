"""Shows a decoder to the KV policies, which score the pairs of its cache."""

from __future__ import annotations

import torch
from torch import Tensor

from dpllm.kvzip_bridge.cache import KVCache
from dpllm.kvzip_bridge.model_view import Hidden, ModelView
from dpllm.model.decoder import Decoder, Group


def view_of(decoder: Decoder) -> ModelView:
    """Returns the view of a decoder that KV policies use. It reads every resident plane."""
    c = decoder.config
    layers = tuple(i for i, window in enumerate(c.windows) if window is None)
    first_of = {layer.qkv[0].index: layer.index for layer in decoder.layers}

    @torch.no_grad()
    def forward(ids: Tensor, cache: KVCache, hidden: Hidden | None = None) -> None:
        def observe(group: Group, x: Tensor, y: Tensor) -> None:
            if hidden is not None and group.index in first_of:
                hidden(first_of[group.index], x)

        decoder.forward(ids, cache, last_only=True, observe=observe if hidden is not None else None)

    def output_weight(layer: int) -> Tensor:
        group = decoder.layers[layer].o
        if group.dense:
            return group.weight.float()
        return decoder.backend.dequantize(group.weight, group.resident_bits, torch.float32)

    return ModelView(
        layers=layers, heads=c.num_heads, kv_heads=c.num_kv_heads, head_dim=c.head_dim, hidden_size=c.hidden_size,
        scale=c.head_dim**-0.5, inv_freq=decoder.inv_freq.float(), rotates=c.uses_rope, max_positions=c.max_positions,
        kernels=decoder.backend, forward=forward, output_weight=output_weight,
    )  # fmt: skip
