"""Decode attention over per-head runs of a flat cache: flash decoding whose splits share out the blocks of all heads.

The runs' blocks of TILE pairs, head after head, are numbered 0 .. T - 1, and each of P programs takes T / P of them in
a row, whatever head they belong to: one head that kept much more than the others is no tail. A program may so meet
several heads, a head several programs; program p's part of head h goes to place p + h of a scratch of P + KVH places,
because along the blocks p and h only rise, one of them at each change. A second launch joins a head's parts, in the
order of p. Lengths stand in device memory and decide nothing about the grid.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import triton
import triton.language as tl
from dpllm.kernels.step_tables import CacheTable, PolicyTable, Site
from dpllm.kernels.triton.small_ops import SINCE, TRITON_TYPE

LOG2_E = 1.4426950408889634
JOIN = 16  # parts joined at a time


@triton.jit
def pairs_of(length_ptr, request_ptr, h, window, APPENDED: tl.constexpr):
    """(pairs to be read, pairs to be skipped before them) of head h."""
    n = tl.load(length_ptr + h)
    if APPENDED:
        n += tl.load(request_ptr + SINCE).to(tl.int32) + 1
    skip = tl.where(window > 0, tl.maximum(n - window, 0), 0)
    return n - skip, skip


@triton.jit
def blocks_each(length_ptr, request_ptr, window, programs, KVH, APPENDED: tl.constexpr, TILE: tl.constexpr):
    """Blocks that each program takes: all heads' blocks shared out, at least one."""
    total = 0
    for h in range(KVH):
        n, _ = pairs_of(length_ptr, request_ptr, h, window, APPENDED)
        total += tl.cdiv(n, TILE)
    return tl.maximum(tl.cdiv(total, programs), 1)


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, address_ptr, start_ptr, length_ptr, request_ptr, out_ptr, sums_ptr, scale, window, KVH, D,
    G: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, ADDRESSED: tl.constexpr,
    APPENDED: tl.constexpr, STORED: tl.constexpr, COMPUTED: tl.constexpr,
):  # fmt: skip
    """Program p's parts: out [P + KVH, G, D] unnormalised, sums [P + KVH, G, 2] the maxima and sums of exponentials."""
    p = tl.program_id(0)
    each = blocks_each(length_ptr, request_ptr, window, tl.num_programs(0), KVH, APPENDED, TILE)
    first, last = p * each, (p + 1) * each
    if ADDRESSED:
        k_base = tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(STORED)), 16)
        v_base = tl.multiple_of(tl.load(address_ptr + 1).to(tl.pointer_type(STORED)), 16)
    else:
        k_base, v_base = k_ptr, v_ptr
    row, d, t = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, TILE)
    asked = (row[:, None] < G) & (d[None, :] < D)
    before = 0  # blocks of the heads before this one
    for h in range(KVH):
        n, skip = pairs_of(length_ptr, request_ptr, h, window, APPENDED)
        blocks = tl.cdiv(n, TILE)
        begin = tl.maximum(first - before, 0) * TILE
        end = tl.minimum(tl.minimum(last - before, blocks) * TILE, n)
        before += blocks
        if begin < end:
            q = tl.load(q_ptr + (h * G + row[:, None]) * D + d[None, :], mask=asked, other=0.0).to(COMPUTED)
            offset = (tl.load(start_ptr + h) + skip) * D
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
                base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far
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
    """Program i: output of query head i from its parts; a head without pairs gives zeros. Then part i of the signals
    of the E groups whose signal is of the whole output."""
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
    """Programs that share the blocks: two on each multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _shape(q: Tensor, kv_heads: int, stored: torch.dtype) -> dict:
    """The constants both launches are specialised on. A cache of another type than q is read in float32."""
    group, dim = q.shape[0] // kv_heads, q.shape[1]
    computed = q.dtype if q.dtype == stored else torch.float32
    padded = max(16, triton.next_power_of_2(dim))
    wide = padded * computed.itemsize
    # Two stages of keys and of values within 48 KB; converted pairs take registers as well.
    tile = 16 if wide > 512 or computed != stored else 128 if wide <= 128 else 64 if wide <= 256 else 32
    warps = 8 if computed != stored else 4
    return {"G": group, "DP": padded, "TILE": tile, "num_warps": warps, "COMPUTED": computed}


def _launch(
    q: Tensor, kv: tuple[Tensor, Tensor], places: tuple[Tensor, ...], scale: float, window: int, stored: torch.dtype,
    appended: bool, signals: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Tensor:  # fmt: skip
    """Both launches; returns the output, [H, D]. places: address, start, length, request; the first and last count
    where a pair was appended, kv where none was. signals: the diagonals, ids and signals of a site."""
    address, start, length, request = places
    heads, dim = q.shape
    kv_heads, shape = len(start), _shape(q, len(start), stored)
    computed, programs = shape.pop("COMPUTED"), program_count(q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts = torch.empty(programs + kv_heads, shape["G"], dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(programs + kv_heads, shape["G"], 2, dtype=torch.float32, device=q.device)
    attend_kernel[(programs,)](
        q, *kv, address, start, length, request, parts, sums, scale * LOG2_E, window, kv_heads, dim,
        ROWS=max(16, triton.next_power_of_2(shape["G"])), ADDRESSED=appended, APPENDED=appended,
        STORED=TRITON_TYPE[stored], COMPUTED=TRITON_TYPE[computed], num_stages=2, **shape,
    )  # fmt: skip
    join_kernel[(heads,)](
        parts, sums, out, length, request, programs, window, kv_heads, dim, *signals, JOIN=JOIN, APPENDED=appended,
        E=0 if signals[0] is None else len(signals[0]), STRIDE=0 if signals[2] is None else signals[2].shape[1],
        **shape,
    )  # fmt: skip
    return out


def attend(
    q: Tensor, cache: CacheTable, layer: int, scale: float, window: int | None, site: Site, table: PolicyTable
) -> Tensor:
    """Attention of the token just appended, [1, H D]; leaves the signals of the site's groups. q: [H, D]."""
    assert len(q) <= table.signals.shape[1]
    return torch.ops.dpllm.attend(
        q, *cache.places(layer), scale, window or 0, cache.dtype, site.diagonals, site.ids, table.signals
    )


@torch.library.custom_op("dpllm::attend", mutates_args=("signals",))  # pairs are read by address
def _attend(
    q: Tensor, address: Tensor, start: Tensor, length: Tensor, request: Tensor, scale: float, window: int,
    stored: torch.dtype, diagonals: Tensor | None, ids: Tensor, signals: Tensor,
) -> Tensor:  # fmt: skip
    places = address, start, length, request
    return _launch(q, (q, q), places, scale, window, stored, True, (diagonals, ids, signals)).view(1, -1)


@_attend.register_fake
def _(q: Tensor, *others: object) -> Tensor:
    return q.new_empty(1, q.numel())


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float, out: Tensor | None = None
) -> Tensor:
    """Attention of one token over per-head runs, as kernels/reference.py says. Returns [H, D]."""
    found = torch.ops.dpllm.decode_attention(q, k, v, start, length, scale)
    return found if out is None else out.copy_(found)


@torch.library.custom_op("dpllm::decode_attention", mutates_args=())
def _decode_attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float) -> Tensor:
    assert k.is_contiguous() and v.is_contiguous() and start.dtype == torch.int64
    with torch.cuda.device_of(q):
        return _launch(q.contiguous(), (k, v), (start, start, length, start), scale, 0, k.dtype, False)


@_decode_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q)
