"""The model as the KV policies see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dpllm.kvzip_bridge.attention import AttentionKernels
from dpllm.kvzip_bridge.cache import KVCache

Hidden = Callable[[int, Tensor], None]  # (layer, attention input [T, hidden])


class Forward(Protocol):
    """Runs the decoder over ids int64 [T] behind the tokens in the cache, which they join. `hidden` sees each layer's
    attention input before the cache's `attend` is called for that layer."""

    def __call__(self, ids: Tensor, cache: KVCache, hidden: Hidden | None = None) -> None:
        """One pass."""
        ...


@dataclass(frozen=True)
class ModelView:
    """What scoring may know of the model."""

    layers: tuple[int, ...]  # those whose attention reaches back without limit: the ones that are pruned
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    scale: float  # of q.k
    inv_freq: Tensor  # float32 [D / 2], of the rotary embedding
    rotates: tuple[bool, ...]  # by layer: whether it applies the rotary embedding
    max_positions: int
    kernels: AttentionKernels
    forward: Forward
    output_weight: Callable[[int], Tensor]  # layer -> W_O, float32 [hidden, H * D]
