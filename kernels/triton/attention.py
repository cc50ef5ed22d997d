"""Decode attention over per-head runs of a flat cache, as flash decoding that divides the blocks of all heads evenly.

The blocks of TILE pairs of all runs, head after head, are numbered 0 .. T - 1. Each of P programs takes T / P
consecutive blocks, whatever head they belong to, so a head that kept many more pairs than the others does not delay the
rest. A program may therefore work on several heads, and a head may have several programs. Program p's part of head h
goes to place p + h of a scratch of P + KVH places: along the blocks, p and h only increase, and one of them increases
at each change. A second launch joins the parts of a head in the order of p. Lengths are in device memory and do not
change the grid.

In a decode step, the same launch takes q, k and v as the products produce them. Every program norms and rotates the
queries of the heads that it reads, and the program that has the last block of a head first writes the new pair there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from dpllm.kernels.gpu_step import tables
from dpllm.kernels.gpu_step.tables import CacheTable, Heads, PolicyTable, Site

SINCE = tl.constexpr(tables.SINCE)
TRITON_TYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
LOG2_E = 1.4426950408889634
JOIN = 16  # parts that are joined at a time


@triton.jit
def pairs_of(length_ptr, request_ptr, h, window, APPENDED: tl.constexpr):
    """Returns (pairs to read, pairs to skip before these) of head h."""
    n = tl.load(length_ptr + h)
    if APPENDED:
        n += tl.load(request_ptr + SINCE).to(tl.int32) + 1
    skip = tl.where(window > 0, tl.maximum(n - window, 0), 0)
    return n - skip, skip


@triton.jit
def blocks_each(length_ptr, request_ptr, window, programs, KVH, APPENDED: tl.constexpr, TILE: tl.constexpr):
    """Returns how many blocks each program takes: the blocks of all heads divided evenly, at least one."""
    total = 0
    for h in range(KVH):
        n, _ = pairs_of(length_ptr, request_ptr, h, window, APPENDED)
        total += tl.cdiv(n, TILE)
    return tl.maximum(tl.cdiv(total, programs), 1)


@triton.jit
def turned(row_ptr, d, D, inside, norm_ptr, cos_ptr, sin_ptr, eps):
    """Returns rows of q or k, normed and rotated, in their own type. row_ptr: [R, 1], the begin of each; d: [1, DP]."""
    half = D // 2
    first = d < half
    other = tl.where(first, d + half, d - half)  # the element with which an element is rotated
    a = tl.load(row_ptr + d, mask=inside, other=0.0)
    b = tl.load(row_ptr + other, mask=inside, other=0.0)
    kind = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    if norm_ptr is not None:
        root = tl.rsqrt(tl.sum(a * a, 1) / D + eps)[:, None]
        weight_a = tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        weight_b = tl.load(norm_ptr + other, mask=d < D, other=0.0).to(tl.float32)
        a = ((a * root).to(kind).to(tl.float32) * weight_a).to(kind).to(tl.float32)
        b = ((b * root).to(kind).to(tl.float32) * weight_b).to(kind).to(tl.float32)
    if cos_ptr is not None:
        angle = tl.where(first, d, d - half)
        cos = tl.load(cos_ptr + angle, mask=d < D, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=d < D, other=0.0)
        a = a * cos + tl.where(first, -b, b) * sin
    return a.to(kind)


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, address_ptr, start_ptr, length_ptr, request_ptr,
    out_ptr, sums_ptr, scale, window, eps, KVH, D, G: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr,
    TILE: tl.constexpr, APPENDED: tl.constexpr, STORED: tl.constexpr, COMPUTED: tl.constexpr,
):  # fmt: skip
    """Program p writes its parts: out [P + KVH, G, D], unnormalised, and sums [P + KVH, G, 2], maxima and sums of
    exponentials. APPENDED: q_ptr is [(H + 2 KVH) D], q, k and v, and k and v are appended to their runs; else it is
    q."""
    p = tl.program_id(0)
    each = blocks_each(length_ptr, request_ptr, window, tl.num_programs(0), KVH, APPENDED, TILE)
    first, last = p * each, (p + 1) * each
    if APPENDED:
        k_base = tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(STORED)), 16)
        v_base = tl.multiple_of(tl.load(address_ptr + 1).to(tl.pointer_type(STORED)), 16)
    else:
        k_base, v_base = k_ptr, v_ptr
    row, d, t = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, TILE)
    asked = (row[:, None] < G) & (d[None, :] < D)
    before = 0  # blocks of earlier heads
    for h in range(KVH):
        n, skip = pairs_of(length_ptr, request_ptr, h, window, APPENDED)
        blocks = tl.cdiv(n, TILE)
        begin = tl.maximum(first - before, 0) * TILE
        end = tl.minimum(tl.minimum(last - before, blocks) * TILE, n)
        before += blocks
        if begin < end:
            q_rows = q_ptr + (h * G + row[:, None]) * D
            q = turned(q_rows, d[None, :], D, asked, q_norm_ptr, cos_ptr, sin_ptr, eps).to(COMPUTED)
            offset = (tl.load(start_ptr + h) + skip) * D
            if APPENDED:  # noqa: SIM102 (known when this is compiled)
                if end == n:  # no other program reads this pair
                    at, here = offset + (n - 1) * D + d[None, :], d[None, :] < D
                    k_rows = q_ptr + (KVH * G + h) * D + tl.zeros([1, 1], tl.int32)
                    k_new = turned(k_rows, d[None, :], D, here, k_norm_ptr, cos_ptr, sin_ptr, eps)
                    v_new = tl.load(k_rows + KVH * D + d[None, :], mask=here, other=0.0)
                    tl.store(k_base + at, k_new.to(STORED), mask=here)
                    tl.store(v_base + at, v_new.to(STORED), mask=here)
                    tl.debug_barrier()  # other threads of this program read it
            top = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            mixed = tl.zeros([ROWS, DP], tl.float32)
            for t0 in range(begin, end, TILE):
                there = (t0 + t)[:, None] < end
                at = offset + (t0 + t)[:, None] * D + d[None, :]
                k = tl.load(k_base + at, mask=there & (d[None, :] < D), other=0.0).to(COMPUTED)
                score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
                score = tl.where((t0 + t)[None, :] < end, score, float("-inf"))
                higher = tl.maximum(top, tl.max(score, 1))
                base = tl.where(higher == float("-inf"), 0.0, higher)  # all scores so far are -inf
                fade = tl.exp2(top - base)
                weight = tl.exp2(score - base[:, None])
                total = total * fade + tl.sum(weight, 1)
                v = tl.load(v_base + at, mask=there & (d[None, :] < D), other=0.0).to(COMPUTED)
                mixed = mixed * fade[:, None] + tl.dot(weight.to(COMPUTED), v, input_precision="ieee")
                top = higher
            place = (p + h) * G + row
            tl.store(sums_ptr + 2 * place, top, mask=row < G)
            tl.store(sums_ptr + 2 * place + 1, total, mask=row < G)
            tl.store(out_ptr + place[:, None] * D + d[None, :], mixed, mask=asked)


@triton.jit
def join_kernel(
    part_ptr, sums_ptr, out_ptr, length_ptr, request_ptr, programs, window, KVH, D, diagonal_ptr, ids_ptr,
    signals_ptr, G: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, JOIN: tl.constexpr, APPENDED: tl.constexpr,
    E: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Program i joins the parts of query head i to its output; a head without pairs gives zeros. It then writes part i
    of the signals of the E groups that compute their signals from the whole output."""
    i = tl.program_id(0)
    h, g = i // G, i % G
    each = blocks_each(length_ptr, request_ptr, window, programs, KVH, APPENDED, TILE)
    before = 0
    for other in range(h):
        n, _ = pairs_of(length_ptr, request_ptr, other, window, APPENDED)
        before += tl.cdiv(n, TILE)
    n, _ = pairs_of(length_ptr, request_ptr, h, window, APPENDED)
    d = tl.arange(0, DP)
    diagonals, groups = (), ()
    for e in tl.static_range(E):
        at = diagonal_ptr + (e * tl.num_programs(0) + i) * D + d
        diagonals = diagonals + (tl.load(at, mask=d < D, other=0.0),)  # noqa: RUF005 (no stars in kernels)
        groups = groups + (tl.load(ids_ptr + e),)  # noqa: RUF005
    mixed = tl.zeros([DP], tl.float32)
    top, total = float("-inf"), 0.0
    if n > 0:
        first = before // each
        last = (before + tl.cdiv(n, TILE) - 1) // each
        for p0 in range(first, last + 1, JOIN):
            p = p0 + tl.arange(0, JOIN)
            there = p <= last
            place = (p + h) * G + g
            tops = tl.load(sums_ptr + 2 * place, mask=there, other=float("-inf"))
            sums = tl.load(sums_ptr + 2 * place + 1, mask=there, other=0.0)
            parts = tl.load(
                part_ptr + place[:, None] * D + d[None, :], mask=there[:, None] & (d[None, :] < D), other=0.0
            )
            higher = tl.maximum(top, tl.max(tops, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(tops - base)
            fade = tl.exp2(top - base)
            total = total * fade + tl.sum(weight * sums, 0)
            mixed = mixed * fade + tl.sum(parts * weight[:, None], 0)
            top = higher
        mixed = mixed / total
    inside = d < D
    y = mixed.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + i * D + d, y, mask=inside)
    y = tl.where(inside, y.to(tl.float32), 0.0)
    for e in tl.static_range(E):
        signal = tl.sum(y * y * diagonals[e].to(tl.float32), 0)
        tl.store(signals_ptr + groups[e] * STRIDE + i, signal)


@functools.cache
def program_count(device: torch.device) -> int:
    """Returns how many programs divide the blocks: two for each multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _shape(group: int, dim: int, asked: torch.dtype, stored: torch.dtype, normed: bool) -> dict:
    """Returns the constants of both launches. A cache whose type differs from that of q is read in float32."""
    computed = asked if asked == stored else torch.float32
    padded = max(16, triton.next_power_of_2(dim))
    wide = padded * computed.itemsize
    # Two stages of keys and of values fit into 48 KB. Converted pairs take registers as well, and so do norms.
    small = 128 if not normed else 64
    tile = 16 if wide > 512 or computed != stored else small if wide <= 128 else 64 if wide <= 256 else 32
    warps = 8 if computed != stored else 4
    return {"G": group, "DP": padded, "TILE": tile, "num_warps": warps, "COMPUTED": computed}


def _launch(
    q: Tensor, heads: tuple[int, int], kv: tuple[Tensor, ...], places: tuple[Tensor, ...], scale: float, window: int,
    stored: torch.dtype, turn: tuple[Any, ...] | None = None, signals: tuple[Tensor | None, ...] = (None, None, None),
) -> Tensor:  # fmt: skip
    """Launches both kernels and returns the output, [H, D].

    heads: H and D. places: address, start, length, request. kv: the cache's k and v, used where `turn` is None. turn:
    the norms' weights, cos, sin and eps, where q holds q, k and v and these are to be appended. signals: the diagonals,
    ids and signals of a site."""
    address, start, length, request = places
    count, dim = heads
    kv_heads, appended = len(start), turn is not None
    *turning, eps = turn or (None, None, None, None, 0.0)
    shape = _shape(count // kv_heads, dim, q.dtype, stored, turning[0] is not None)
    computed, programs = shape.pop("COMPUTED"), program_count(q.device)
    out = q.new_empty(count, dim)
    parts = torch.empty(programs + kv_heads, shape["G"], dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(programs + kv_heads, shape["G"], 2, dtype=torch.float32, device=q.device)
    attend_kernel[(programs,)](
        q, *kv, *turning, address, start, length, request, parts, sums, scale * LOG2_E, window, eps, kv_heads, dim,
        ROWS=max(16, triton.next_power_of_2(shape["G"])), APPENDED=appended, STORED=TRITON_TYPE[stored],
        COMPUTED=TRITON_TYPE[computed], num_stages=2, **shape,
    )  # fmt: skip
    join_kernel[(count,)](
        parts, sums, out, length, request, programs, window, kv_heads, dim, *signals, JOIN=JOIN, APPENDED=appended,
        E=0 if signals[0] is None else len(signals[0]), STRIDE=0 if signals[2] is None else signals[2].shape[1],
        **shape,
    )  # fmt: skip
    return out


def attend(
    qkv: Tensor, heads: Heads, cache: CacheTable, layer: int, site: Site, table: PolicyTable
) -> Tensor:
    """Norms and rotates q and k, appends k and v to their heads' runs, and computes the attention to these.

    qkv: [1, (H + 2 KVH) D]. Returns [1, H D], and writes the signals of the site's groups."""
    norms, rope = heads.norms or (None, None), heads.rope or (None, None)
    return torch.ops.dpllm.attend(
        qkv, *norms, *rope, heads.eps, heads.dim, heads.window, *cache.places(layer), cache.dtype, site.diagonals,
        site.ids, table.signals,
    )  # fmt: skip


@torch.library.custom_op(
    "dpllm::attend", mutates_args=("signals",)
)  # the pairs are read and written by address
def _attend(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float,
    dim: int, window: int, address: Tensor, start: Tensor, length: Tensor, request: Tensor, stored: torch.dtype,
    diagonals: Tensor | None, ids: Tensor, signals: Tensor,
) -> Tensor:  # fmt: skip
    heads = qkv.shape[1] // dim - 2 * len(start)
    assert heads <= signals.shape[1]
    out = _launch(
        qkv, (heads, dim), (qkv, qkv), (address, start, length, request), dim**-0.5, window, stored,
        (q_norm, k_norm, cos, sin, eps), (diagonals, ids, signals),
    )  # fmt: skip
    return out.view(1, -1)


@_attend.register_fake
def _(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float,
    dim: int, window: int, address: Tensor, start: Tensor, *others: object,
) -> Tensor:  # fmt: skip
    return qkv.new_empty(1, qkv.shape[1] - 2 * len(start) * dim)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float, out: Tensor | None = None
) -> Tensor:
    """Computes the attention of one token over per-head runs, as kernels/reference.py defines it. Returns [H, D]."""
    found = torch.ops.dpllm.decode_attention(q, k, v, start, length, scale)
    return found if out is None else out.copy_(found)


@torch.library.custom_op("dpllm::decode_attention", mutates_args=())
def _decode_attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float) -> Tensor:
    assert k.is_contiguous() and v.is_contiguous() and start.dtype == torch.int64
    with torch.cuda.device_of(q):
        return _launch(
            q.contiguous(), (q.shape[0], q.shape[1]), (k, v), (start, start, length, start), scale, 0, k.dtype
        )


@_decode_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q)
