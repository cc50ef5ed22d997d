"""The interface of the KV caches, and the dense cache, which keeps every pair of every head.

Storage is head-major and flat per layer, so a decode kernel sees each KV head as a run (start, length) of slots. A
pruned cache (ragged_cache.py) differs only in that its runs have different lengths. Positions are counted apart from
stored pairs: `length` is the position of the next token, however many pairs were evicted.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dpllm.kvzip_bridge.attention import AttentionKernels, attend


class KVCache(Protocol):
    """The interface of a cache to the decoder and the policies.

    k, v: one tensor for each layer, flat in slots of D elements. length: the position of the next token. layout: a
    number that changes whenever runs have moved; while it stays the same, every run grows and shrinks as `length`
    does.
    """

    k: list[Tensor]
    v: list[Tensor]
    length: int
    layout: int

    @property
    def nbytes(self) -> int:
        """Bytes of all pairs held, keys and values of all layers. Decoding one token reads that many."""
        ...

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Writes k, v [T, KVH, D] after the pairs held; `advance` makes them part of the cache."""
        ...

    def advance(self, tokens: int) -> None:
        """Makes `tokens` written tokens part of the cache, after every layer has written them."""
        ...

    def attend(
        self, layer: int, q: Tensor, scale: float, window: int | None, kernels: AttentionKernels
    ) -> Tensor:
        """Computes the attention of the T tokens just written. q: [T, H, D]. Returns [T, H, D]."""
        ...

    def pairs(self, layer: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Returns (k, v), both [KVH, last - first, D], of positions that every head holds or has written."""
        ...

    def runs(self, room: int) -> tuple[Tensor, Tensor]:
        """Returns every run as (start int64, length int32), both [layers, KVH], in slots of a layer.

        room: the number of pairs for which there is room after each run. The tensors belong to the cache: lengths
        change with every call."""
        ...

    def reserve(self, tokens: int) -> None:
        """Makes sure that `tokens` more tokens fit."""
        ...

    def rewind(self, length: int) -> None:
        """Forgets every token from this position on."""
        ...


class DenseKVCache:
    """Preallocated keys and values, [KVH, capacity, D] for each layer; appending writes in place."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, capacity: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ):  # fmt: skip
        shape = (kv_heads, capacity, head_dim)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.length = 0
        self.layout = 0  # never changes: runs stay where they are
        self.capacity = capacity
        self._starts = torch.arange(kv_heads, dtype=torch.int64, device=device) * capacity
        self._layer_starts = self._starts.repeat(layers, 1)
        self._lengths = torch.zeros(layers, kv_heads, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all pairs held, keys and values of all layers."""
        heads, _, dim = self.k[0].shape
        return 2 * len(self.k) * heads * self.length * dim * self.k[0].element_size()

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Writes k, v [T, KVH, D] after the `length` pairs held; `advance` makes them part of the cache."""
        self.reserve(k.shape[0])
        end = self.length + k.shape[0]
        self.k[layer][:, self.length : end] = k.transpose(0, 1)
        self.v[layer][:, self.length : end] = v.transpose(0, 1)

    def advance(self, tokens: int) -> None:
        """Makes `tokens` written tokens part of the cache, after every layer has written them."""
        self.length += tokens

    def runs(self, room: int) -> tuple[Tensor, Tensor]:
        """Returns every run as (start int64, length int32), both [layers, KVH], in slots of a layer.

        Raises ValueError unless `room` more pairs fit. The tensors belong to the cache: lengths change with every
        call.
        """
        if self.length + room > self.capacity:
            self.reserve(room)  # raises
        self._lengths.fill_(self.length)
        return self._layer_starts, self._lengths

    def pairs(self, layer: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Returns (k, v), views [KVH, last - first, D] of the tokens at positions first .. last - 1."""
        return self.k[layer][:, first:last], self.v[layer][:, first:last]

    def rewind(self, length: int) -> None:
        """Forgets every token after the first `length`. Raises ValueError where there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind {self.length} tokens to {length}.")
        self.length = length

    def attend(
        self, layer: int, q: Tensor, scale: float, window: int | None, kernels: AttentionKernels
    ) -> Tensor:
        """Computes the attention of the T tokens just written. q: [T, H, D]. Returns [T, H, D]."""
        lengths = torch.full_like(self._starts, self.length + len(q), dtype=torch.int32)
        pairs = self.k[layer].flatten(0, 1), self.v[layer].flatten(0, 1)
        return attend(kernels, q, pairs, (self._starts, lengths), scale, window)

    def reserve(self, tokens: int) -> None:
        """Raises ValueError unless `tokens` more tokens fit, because this cache does not grow."""
        if self.length + tokens > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; {self.length + tokens} were written.")
