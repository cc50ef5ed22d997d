"""Attention and rotary positions as the caches and the scoring of pairs need them, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [..., D], halves paired as in Hugging Face checkpoints. cos, sin: broadcast
    against [..., D / 2]; a negative sin turns back."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of the last T of S pairs to all up to their own. q: [T, H, D]; k, v: [KVH, S, D]. Returns [T, H, D]."""
    tokens, total, group = q.shape[0], k.shape[1], q.shape[1] // k.shape[0]
    if tokens == total and window is None:
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        return F.scaled_dot_product_attention(q.transpose(0, 1), k, v, is_causal=True, scale=scale).transpose(
            0, 1
        )
    column = torch.arange(total, device=q.device)
    distance = column[total - tokens :, None] - column
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    # The heads of a group are more rows over the same keys, which need not be repeated then.
    rows = q.unflatten(1, (len(k), group)).permute(1, 2, 0, 3).flatten(1, 2)  # [KVH, G * T, D]
    out = F.scaled_dot_product_attention(rows[None], k[None], v[None], mask.repeat(group, 1), scale=scale)[0]
    return out.unflatten(1, (group, tokens)).permute(2, 0, 1, 3).flatten(1, 2)
