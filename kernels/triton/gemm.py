"""Products with many rows of activations: codes become tiles of float16, which tensor cores multiply."""

from __future__ import annotations

import triton
import triton.language as tl
from dpllm.kernels.triton.bitplane_codes import load_planes, load_table, pairs_of, table_offset, words_of


@triton.jit
def halves(pairs):
    """Unpacks pairs [R, C] to float16 [R, 2 C]."""
    low, high = pairs.to(tl.uint16).to(tl.float16, bitcast=True), (pairs >> 16).to(tl.uint16)
    return tl.reshape(tl.join(low, high.to(tl.float16, bitcast=True)), [pairs.shape[0], 2 * pairs.shape[1]])


@triton.jit
def rows_at(
    x_ptr, w_ptr, table_ptr, rows, tokens, served, share, KW, plane, B: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BKW: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Returns W_b x, [BN, BM], for the tokens in `served`, and zero for the others."""
    table = load_table(table_ptr, (rows // share)[:, None], B, BKW, False, ASM)
    kw = tl.arange(0, BKW)[None, :]
    at = rows[:, None] * KW + kw
    column = tl.arange(0, 2 * BKW)
    x_row = x_ptr + tokens.to(tl.int64)[None, :] * (32 * KW) + column[:, None]
    sums = tl.zeros([BN, BM], tl.float32)
    for k0 in range(0, KW, BKW):
        inside = None if EVEN else (k0 + kw < KW)
        n = words_of(load_planes(w_ptr + k0, at, plane, inside, 0, B), B)
        here = served[None, :] if EVEN else served[None, :] & (2 * k0 + column < 2 * KW)[:, None]
        for i in tl.static_range(4 if B <= 4 else 8):
            values = pairs_of(n[i], table, B, False, ASM)
            for j in tl.static_range(4 if B <= 4 else 2):
                m = 4 * j + 3 - i if B <= 4 else 8 * j + 7 - i
                x = tl.load(x_row + 2 * (m * KW + k0), mask=here, other=0.0)
                sums = tl.dot(halves(values[j]), x, sums)
    return sums


@triton.jit(do_not_specialize_on_alignment=["bits_ptr"])
def gemm_kernel(
    x_ptr, factor_ptr, w_ptr, table_ptr, scale_ptr, bias_ptr, bits_ptr, y_ptr, M, N, KW4, tables, share,
    LOW: tl.constexpr, HIGH: tl.constexpr, SEED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    BKW: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y [M, N]: BM tokens, each at its own width, times BN rows. A width that no token has is not computed."""
    KW = KW4 * 4
    first = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    rows, some = tl.minimum(first, N - 1), tokens < M
    sums = tl.zeros([BN, BM], tl.float32)
    bits = tl.full([BM], LOW, tl.int32)
    if LOW < HIGH:
        bits = tl.minimum(tl.maximum(tl.load(bits_ptr + tokens, mask=some, other=0), LOW), HIGH)
    for B in tl.static_range(LOW, HIGH + 1):
        served = some & (bits == B)
        if tl.max(served.to(tl.int32), 0) > 0:
            sums += rows_at(
                x_ptr, w_ptr, table_ptr + table_offset(tables, B, SEED), rows, tokens, served, share, KW,
                N * KW, B, BN, BM, BKW, EVEN, ASM,
            )  # fmt: skip
    if scale_ptr is not None:
        sums *= tl.load(scale_ptr + rows).to(tl.float32)[:, None]
    if factor_ptr is not None:
        sums *= tl.load(factor_ptr + tokens, mask=some, other=0.0)[None, :]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    y = y_ptr + tokens.to(tl.int64)[None, :] * N + first[:, None]
    tl.store(y, sums.to(y_ptr.dtype.element_ty), mask=(first < N)[:, None] & some[None, :])


@triton.jit
def dequantize_kernel(
    w_ptr, table_ptr, scale_ptr, out_ptr, row0, rows_out, N, K, KW4, share,
    B: tl.constexpr, BN: tl.constexpr, BKW: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Writes rows row0 .. row0 + rows_out - 1 of the b-bit matrix to out [rows_out, K]. table_ptr: width B's tables."""
    KW = KW4 * 4
    local = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(row0 + local, N - 1)
    kw = tl.program_id(1) * BKW + tl.arange(0, BKW)[None, :]
    n = words_of(load_planes(w_ptr, rows[:, None] * KW + kw, N * KW, kw < KW, 0, B), B)
    table = load_table(table_ptr, (rows // share)[:, None], B, BKW, False, ASM)
    c = 2 * tl.program_id(1) * BKW + tl.arange(0, 2 * BKW)
    out = out_ptr + local.to(tl.int64)[:, None] * K
    for i in tl.static_range(4 if B <= 4 else 8):
        values = pairs_of(n[i], table, B, False, ASM)
        for j in tl.static_range(4 if B <= 4 else 2):
            m = 4 * j + 3 - i if B <= 4 else 8 * j + 7 - i
            column = 2 * m * KW + c
            value = halves(values[j])
            if scale_ptr is not None:
                value = value.to(tl.float32) * tl.load(scale_ptr + rows).to(tl.float32)[:, None]
            here = (local < rows_out)[:, None] & ((c < 2 * KW) & (column < K))[None, :]
            tl.store(out + column[None, :], value.to(out_ptr.dtype.element_ty), mask=here)
