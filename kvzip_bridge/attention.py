"""Attention over a cache by a kernel backend, and rotary position embedding."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

# First tokens of any text. Attention rests on them (StreamingLLM, arXiv:2309.17453), so they are never evicted, and
# their queries are outliers, so scoring leaves them out.
SINKS = 4


class AttentionKernels(Protocol):
    """The kernel functions that caches and policies use. kernels/reference.py defines what they compute."""

    def decode_attention(
        self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float, /
    ) -> Tensor:
        """Computes the attention of one token."""
        ...

    def prompt_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor,
        length: Tensor,
        scale: float,
        window: int | None,
        /,
    ) -> Tensor:
        """Computes the attention of many tokens."""
        ...

    def attention_peaks(
        self, q: Tensor, k: Tensor, columns: slice, scale: float, cost: Tensor | None, /
    ) -> Tensor:
        """Computes the largest attention that any of many tokens pays to each of some keys."""
        ...


def attend(
    kernels: AttentionKernels, q: Tensor, pairs: tuple[Tensor, Tensor], runs: tuple[Tensor, Tensor],
    scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Computes the attention of T tokens, whose pairs are the last T of every head's run.

    q: [T, H, D]. pairs: k and v, each [slots, D]. runs: start int64 [KVH] and length int32 [KVH] of each head, the T
    tokens included. scale: factor on q.k. window: the number of latest pairs that a token sees; None: all. Returns
    [T, H, D]."""
    start, length = runs
    if len(q) > 1:
        return kernels.prompt_attention(q, *pairs, start, length, scale, window)
    if window is not None:
        skip = (length - window).clamp(min=0)
        start, length = start + skip, length - skip
    return kernels.decode_attention(q[0], *pairs, start, length, scale)[None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary position embedding to x [..., D], whose halves are paired as in Hugging Face checkpoints.

    cos, sin: broadcast against [..., D / 2]; a negative sin undoes a rotation."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
