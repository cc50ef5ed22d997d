"""Plain torch kernels: the definition every other backend is tested against, and the last resort.

They read exactly what a fast kernel reads (planes 0..b-1 and the table of width b), but through
dequantisation, so their time does not follow the bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpllm.kernels.weight import Int8Weight, QuantizedWeight, unpack

PEAK_BLOCK = 1 << 18  # logits looked at together: they stay in a core's cache
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


def gemv(
    x: Tensor, w: PreparedWeight, bits: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """y = x W_b^T + bias, each row of x at its own width.

    x: [M, K]; bits: int32 [M] on x's device; bias: [N]. Returns [M, N] in x's dtype (into `out` where given).
    Any M is served; fast backends promise speed for M <= 16.
    """
    widths = bits.unique().tolist()
    if len(widths) == 1:
        y = F.linear(x, dequantize(w, widths[0], x.dtype), bias)
        return y if out is None else out.copy_(y)
    y = x.new_empty(x.shape[0], w.out_features) if out is None else out
    for width in widths:
        rows = bits == width
        y[rows] = F.linear(x[rows], dequantize(w, width, x.dtype), bias)
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


def prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention of T tokens over per-head runs of a flat cache, the last T pairs of which are their own.

    q: [T, H, D]; k, v: [slots, D]; start int64, length int32 [KVH], in slots, own pairs included. window: how many
    pairs a token sees, its own included; None: all up to its own. Returns [T, H, D] in q's dtype.
    """
    outs = []
    runs = zip(start.tolist(), length.tolist(), q.chunk(len(start), dim=1), strict=True)
    for first, n, own in runs:
        keys, values = (t[None, first : first + n].to(q.dtype) for t in (k, v))
        outs.append(causal_attention(own, keys, values, scale, window))
    return torch.cat(outs, dim=1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of the last T of S pairs to all up to their own; differentiable. q: [T, H, D]; k, v: [KVH, S, D].
    Returns [T, H, D]."""
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


def attention_peaks(q: Tensor, k: Tensor, columns: slice, scale: float, cost: Tensor | None = None) -> Tensor:
    """The most attention that any of T tokens pays to some of the keys, as a logarithm less the token's own cost:
    near zero there still is an order.

    q: [T, H, D]; k: [KVH, S, D], the last T keys the tokens' own; columns: among those before. cost: float32 [T].
    Softmax in float32 over all keys up to a token's own. A token whose attention is not a number has no say. Returns
    float32 [KVH, G, columns].
    """
    tokens, total = len(q), k.shape[1]
    queries = (q.float() * scale).unflatten(1, (len(k), -1)).transpose(0, 1)  # [KVH, T, G, D]
    best = q.new_full(
        (len(k), queries.shape[2], columns.stop - columns.start), -math.inf, dtype=torch.float32
    )
    size = max(8, PEAK_BLOCK // (queries.shape[2] * total))
    for own, keys, peak in zip(queries, k.float(), best, strict=True):
        for a in range(0, tokens, size):
            b = min(a + size, tokens)
            logits = (own[a:b].flatten(0, 1) @ keys[: total - tokens + b].T).unflatten(0, (b - a, -1))
            column = torch.arange(b - a, device=q.device)
            logits[..., a - b :].masked_fill_((column > column[:, None])[:, None], -math.inf)
            less = logits.logsumexp(-1, keepdim=True)
            if cost is not None:
                less += cost[a:b, None, None]
            logits.masked_fill_(less.isnan(), -math.inf)  # -inf less NaN
            less.nan_to_num_(0.0, math.inf)
            torch.maximum(peak, (logits[..., columns] - less).amax(0), out=peak)
    return best
