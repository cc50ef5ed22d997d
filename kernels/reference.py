"""Plain torch kernels, which define what every other backend computes and run where no other backend can.

They read exactly the data that a fast kernel reads (planes 0..b-1 and the table of width b), but they dequantise first,
so their time does not depend on the bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpllm.kernels.weight import Int8Weight, QuantizedWeight, unpack

PEAK_BLOCK = 1 << 18  # logits computed together, so that they stay in a core's cache
PreparedWeight = QuantizedWeight  # this backend computes from the stored layout


def prepare(w: QuantizedWeight, device: torch.device | str = "cpu") -> PreparedWeight:
    """Moves the weight to the device. This backend reads the stored layout."""
    return w.to(device)


def dequantize(w: PreparedWeight, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the b-bit matrix [N, K]: the table value of each code, times the row's scale."""
    codes = unpack(w.planes[:bits], w.in_features).to(torch.int32)  # [N, K]
    table = w.table(bits).to(dtype)
    row = torch.arange(w.out_features, device=codes.device, dtype=torch.int32) // w.rows_per_table
    codes += (row << bits)[:, None]
    dense = table.reshape(-1).index_select(0, codes.reshape(-1)).view(codes.shape)
    return dense if w.scale is None else dense.mul_(w.scale.to(dtype)[:, None])


def gemv(
    x: Tensor, w: PreparedWeight, bits: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Computes x W_b^T + bias, each row of x at its own width.

    x: [M, K]. bits: int32 [M] on x's device. bias: [N]. Returns [M, N] in x's dtype, in `out` where that is given. M
    can be any number; fast backends are optimised for M <= 16.
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
    """Computes x W^T with every resident plane, for prompts. x: [M, K]. Returns [M, N] in x's dtype."""
    return F.linear(x, dequantize(w, w.resident_bits, x.dtype))


def int8_linear(x: Tensor, w: Int8Weight) -> Tensor:
    """Computes x W^T for the int8 head. x: [M, K]. Returns [M, N] in x's dtype."""
    return F.linear(x, w.values.to(x.dtype)) * w.scale.to(x.dtype)


def select(signal: Tensor, diagonal: Tensor, thresholds: Tensor, seed_bits: int) -> Tensor:
    """Chooses the bits of each row: the seed width plus the number of thresholds that its estimated error exceeds.

    signal: [M, K], the group's input. diagonal: [K], the expected loss per squared input. thresholds: float32 [B - 1],
    ascending, on the signal's device; writing other thresholds changes the target. Returns int32 [M].
    """
    error = (signal.float() ** 2) @ diagonal.float()  # [M]
    return seed_bits + (error[:, None] > thresholds).sum(1, dtype=torch.int32)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float, out: Tensor | None = None
) -> Tensor:
    """Computes the attention of one token over per-head runs of a flat cache.

    q: [H, D]. k, v: [slots, D]. start: int64 [KVH]. length: int32 [KVH], both in slots. Query head h reads KV head
    h // (H / KVH). Sums are float32. A head without pairs gives zeros. Returns [H, D].
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
    """Computes the causal attention of T tokens over per-head runs of a flat cache. Each run ends with their T pairs.

    q: [T, H, D]. k, v: [slots, D]. start: int64 [KVH]. length: int32 [KVH], both in slots, the T pairs included.
    window: the number of pairs that a token sees, its own included; None: all up to its own. Returns [T, H, D] in q's
    dtype.
    """
    outs = []
    runs = zip(start.tolist(), length.tolist(), q.chunk(len(start), dim=1), strict=True)
    for first, n, own in runs:
        keys, values = (t[None, first : first + n].to(q.dtype) for t in (k, v))
        outs.append(causal_attention(own, keys, values, scale, window))
    return torch.cat(outs, dim=1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Computes the attention of the last T of S tokens to all pairs up to their own; differentiable.

    q: [T, H, D]. k, v: [KVH, S, D]. Returns [T, H, D]."""
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
    # The heads of a group become more rows over the same keys, so that keys need not be repeated.
    rows = q.unflatten(1, (len(k), group)).permute(1, 2, 0, 3).flatten(1, 2)  # [KVH, G * T, D]
    out = F.scaled_dot_product_attention(rows[None], k[None], v[None], mask.repeat(group, 1), scale=scale)[0]
    return out.unflatten(1, (group, tokens)).permute(2, 0, 1, 3).flatten(1, 2)


def attention_peaks(
    q: Tensor, k: Tensor, columns: slice, scale: float, offset: Tensor | None = None
) -> Tensor:
    """Computes the largest attention that any of T tokens pays to each of some keys.

    The result is a logarithm, which still differs where attention is near zero, minus the token's own offset. q:
    [T, H, D]. k: [KVH, S, D], whose last T keys are the tokens' own. columns: the keys to score, among the keys before
    these. offset: float32 [T], or None for zeros. The softmax is float32, over all keys up to a token's own. A token
    whose attention is NaN is ignored. Returns float32 [KVH, G, columns].
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
            if offset is not None:
                less += offset[a:b, None, None]
            logits.masked_fill_(less.isnan(), -math.inf)  # -inf less NaN
            less.nan_to_num_(0.0, math.inf)
            torch.maximum(peak, (logits[..., columns] - less).amax(0), out=peak)
    return best
