"""The part of a model that KV policies can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dpllm.kvzip_bridge.attention import AttentionKernels
from dpllm.kvzip_bridge.cache import KVCache

Hidden = Callable[[int, Tensor], None]  # (layer, attention input [T, hidden])


class Forward(Protocol):
    """Runs the decoder over ids int64 [T], which continue the tokens in the cache and become part of it.

    `hidden` is called with each layer's attention input, before the cache's `attend` is called for that layer."""

    def __call__(self, ids: Tensor, cache: KVCache, hidden: Hidden | None = None) -> None:
        """Runs one forward pass."""
        ...


@dataclass(frozen=True)
class ModelView:
    """The shapes and functions of a model that policies use to score pairs."""

    layers: tuple[int, ...]  # the layers without a sliding window, which are the ones that are pruned
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    scale: float  # factor on q.k
    inv_freq: Tensor  # float32 [D / 2]: inverse frequencies of the rotary embedding
    rotates: tuple[bool, ...]  # for each layer: whether it applies the rotary embedding
    max_positions: int
    kernels: AttentionKernels
    forward: Forward
    output_weight: Callable[[int], Tensor]  # layer -> W_O, float32 [hidden, H * D]
