"""How the caches ask kernels for attention, and rotary positions."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

# First tokens of any text. Attention rests on them (StreamingLLM, arXiv:2309.17453), so they are never evicted, and
# their queries are outliers, so scoring leaves them out.
SINKS = 4


class AttentionKernels(Protocol):
    """Those functions of a kernel backend (kernels/reference.py says what they compute) that caches and the scoring of
    pairs use."""

    def decode_attention(
        self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float, /
    ) -> Tensor:
        """Of one token."""
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
        """Of many tokens."""
        ...

    def attention_peaks(
        self, q: Tensor, k: Tensor, columns: slice, scale: float, cost: Tensor | None, /
    ) -> Tensor:
        """The most attention that any of many tokens pays to some of the keys."""
        ...


def attend(
    kernels: AttentionKernels, q: Tensor, pairs: tuple[Tensor, Tensor], runs: tuple[Tensor, Tensor],
    scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Attention of T tokens, the last of every head's run. q: [T, H, D]; pairs: k, v [slots, D]; runs: start int64,
    length [KVH], own pairs included. Returns [T, H, D]."""
    start, length = runs
    if len(q) > 1:
        return kernels.prompt_attention(q, *pairs, start, length, scale, window)
    if window is not None:
        skip = (length - window).clamp(min=0)
        start, length = start + skip, length - skip
    return kernels.decode_attention(q[0], *pairs, start, length, scale)[None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [..., D], halves paired as in Hugging Face checkpoints. cos, sin: broadcast
    against [..., D / 2]; a negative sin turns back."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
