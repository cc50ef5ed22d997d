"""The dense KV cache: every pair of every head is kept.

Storage is head-major and flat per layer, so a decode kernel sees each KV head as a run (start, length) of
slots; a pruned cache differs only in having runs of different lengths. Position is counted apart from
stored length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class DenseKVCache:
    """Preallocated keys and values [layers, KVH, capacity, D]; appending writes in place."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, capacity: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ):  # fmt: skip
        shape = (layers, kv_heads, capacity, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0
        self.capacity = capacity
        self._starts = torch.arange(kv_heads, dtype=torch.int64, device=device) * capacity
        self._layer_starts = self._starts.repeat(layers, 1)
        self._lengths = torch.zeros(layers, kv_heads, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the pairs held so far, keys and values, all layers."""
        layers, heads, _, dim = self.k.shape
        return 2 * layers * heads * self.length * dim * self.k.element_size()

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Puts k, v [T, KVH, D] behind the `length` pairs held; `advance` makes them part of the cache."""
        end = self.length + k.shape[0]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; {end} were written.")
        self.k[layer, :, self.length : end] = k.transpose(0, 1)
        self.v[layer, :, self.length : end] = v.transpose(0, 1)

    def advance(self, tokens: int) -> None:
        """Counts `tokens` written pairs, once every layer has written them."""
        self.length += tokens

    def runs(self, room: int) -> tuple[Tensor, Tensor]:
        """(start int64, length int32), both [layers, KVH], in slots of a layer's flat [KVH * capacity, D].

        Checks that `room` more pairs fit. The tensors are the cache's own: lengths change with every call.
        """
        if self.length + room > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; {self.length + room} were written.")
        self._lengths.fill_(self.length)
        return self._layer_starts, self._lengths

    def rewind(self, length: int) -> None:
        """Forgets everything behind the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind {self.length} tokens to {length}.")
        self.length = length

    def attend(
        self, layer: int, q: Tensor, scale: float, window: int | None, decode_attention: Callable[..., Tensor]
    ) -> Tensor:
        """Attention of the T tokens just written. q: [T, H, D]. Returns [T, H, D]."""
        tokens, end = q.shape[0], self.length + q.shape[0]
        if tokens > 1:
            k, v = (t[layer, :, :end].to(q.dtype) for t in (self.k, self.v))
            return causal_attention(q, k, v, scale, window)
        first = 0 if window is None else max(0, end - window)
        starts = self._starts + first
        lengths = torch.full_like(starts, end - first, dtype=torch.int32)
        k, v = self.k[layer].flatten(0, 1), self.v[layer].flatten(0, 1)
        return decode_attention(q[0], k, v, starts, lengths, scale)[None]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention of the last T of S positions. q: [T, H, D]; k, v: [KVH, S, D]. Returns [T, H, D]."""
    tokens, total = q.shape[0], k.shape[1]
    mask = None
    if tokens != total or window is not None:
        distance = torch.arange(total - tokens, total, device=q.device)[:, None] - torch.arange(
            total, device=q.device
        )
        mask = distance >= 0
        if window is not None:
            mask &= distance < window
    repeat = q.shape[1] // k.shape[0]
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    q = q.transpose(0, 1)
    out = F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return out[0].transpose(0, 1)
