"""Plain torch kernels: the definition every other backend is tested against, and the last resort.

They read exactly what a fast kernel reads (planes 0..b-1 and the table of width b), but through
dequantisation, so their time does not follow the bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpllm.kernels.weight import Int8Weight, QuantizedWeight, unpack

PreparedWeight = QuantizedWeight  # this backend computes from the stored layout


def prepare(w: QuantizedWeight, device: torch.device | str = "cpu") -> PreparedWeight:
    """Moves the weight to the device; nothing to repack here."""
    return w.to(device)


def dequantize(w: PreparedWeight, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The b-bit matrix [N, K]: table value of each code, times the row's scale."""
    codes = unpack(w.planes[:bits], w.in_features).to(torch.int32)  # [N, K]
    table = w.table(bits).to(dtype)
    row = torch.arange(w.out_features, device=codes.device, dtype=torch.int32) // w.rows_per_table
    codes += (row << bits)[:, None]
    dense = table.reshape(-1).index_select(0, codes.reshape(-1)).view(codes.shape)
    return dense if w.scale is None else dense.mul_(w.scale.to(dtype)[:, None])


def gemv(x: Tensor, w: PreparedWeight, bits: Tensor, out: Tensor | None = None) -> Tensor:
    """y = x W_b^T, each row of x at its own width.

    x: [M, K]; bits: int32 [M] on x's device. Returns [M, N] in x's dtype (into `out` where given).
    Any M is served; fast backends promise speed for M <= 16.
    """
    widths = bits.unique().tolist()
    if len(widths) == 1:
        y = F.linear(x, dequantize(w, widths[0], x.dtype))
        return y if out is None else out.copy_(y)
    y = x.new_empty(x.shape[0], w.out_features) if out is None else out
    for width in widths:
        rows = bits == width
        y[rows] = F.linear(x[rows], dequantize(w, width, x.dtype))
    return y


def matmul(x: Tensor, w: PreparedWeight) -> Tensor:
    """y = x W^T at every resident plane: the product of a prompt. x: [M, K]. Returns [M, N] in x's dtype."""
    return F.linear(x, dequantize(w, w.resident_bits, x.dtype))


def int8_linear(x: Tensor, w: Int8Weight) -> Tensor:
    """y = x W^T for the int8 head. x: [M, K]. Returns [M, N] in x's dtype."""
    return F.linear(x, w.values.to(x.dtype)) * w.scale.to(x.dtype)


def select(signal: Tensor, diagonal: Tensor, thresholds: Tensor, seed_bits: int) -> Tensor:
    """Bits for each row: the seed width plus the number of thresholds its estimated error exceeds.

    signal: [M, K], the group's input. diagonal: [K], expected loss per squared input.
    thresholds: float32 [B-1] ascending, on the signal's device (the knob: rewriting it retargets).
    Returns int32 [M].
    """
    error = (signal.float() ** 2) @ diagonal.float()  # [M]
    return seed_bits + (error[:, None] > thresholds).sum(1, dtype=torch.int32)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float, out: Tensor | None = None
) -> Tensor:
    """Attention of one token over per-head runs of a flat cache.

    q: [H, D]; k, v: [slots, D]; start int64, length int32 [KVH], in slots; query head h reads KV head
    h // (H / KVH). fp32 accumulation. A head that keeps nothing yields zeros. Returns [H, D].
    """
    out = torch.empty_like(q) if out is None else out
    group = q.shape[0] // len(start)
    runs = zip(start.tolist(), length.tolist(), strict=True)
    for head, (first, n) in enumerate(runs):
        rows = slice(head * group, (head + 1) * group)
        if n == 0:
            out[rows] = 0
            continue
        scores = (q[rows].float() @ k[first : first + n].float().T) * scale  # [group, n]
        out[rows] = (scores.softmax(-1) @ v[first : first + n].float()).to(q.dtype)
    return out
