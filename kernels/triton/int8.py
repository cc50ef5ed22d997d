"""Products with the head, an int8 matrix with one float16 scale for each row."""

from __future__ import annotations

import triton
import triton.language as tl
from dpllm.kernels.triton.bitplane_codes import load_words
from dpllm.kernels.triton.gemv import finish, multiply, own_sums


@triton.jit
def pairs_of_bytes(n, ASM: tl.constexpr):
    """Returns the exact packed float16 pairs of the signed bytes (0, 1) and (2, 3) of n.

    A byte b with its sign bit flipped, under the byte 0x64, is the float16 1024 + 128 + b.
    """
    if ASM:
        found = tl.inline_asm_elementwise(
            """{ .reg .b32 u, six, off;
            mov.b32 six, 0x64646464; mov.b32 off, 0x64806480; xor.b32 u, $2, 0x80808080;
            prmt.b32 $0, u, six, 0x4140; sub.f16x2 $0, $0, off;
            prmt.b32 $1, u, six, 0x4342; sub.f16x2 $1, $1, off; }""",
            "=&r,=&r,r", [n], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        found = signed(n, 0) | (signed(n, 8) << 16), signed(n, 16) | (signed(n, 24) << 16)
    return found


@triton.jit
def signed(n, SHIFT: tl.constexpr):
    """Returns the float16 bits, in uint32, of one signed byte."""
    value = (n >> SHIFT).to(tl.int8).to(tl.float16)
    return value.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def load_fours(x, at, ASM: tl.constexpr):
    """Loads packed pairs 2 at and 2 at + 1 of x (int32 words). `at` is tiled as the weights are, and keeps that layout.

    It takes two neighbouring words at a time, which are 16 aligned bytes.
    """
    if ASM:
        found = tl.inline_asm_elementwise(
            """ld.global.v4.b32 {$0, $2, $1, $3}, [$4];""",
            "=r,=r,=r,=r,l,l", [(x + 2 * at).to(tl.int64)], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        found = tl.load(x + 2 * at), tl.load(x + (2 * at + 1))
    return found


@triton.jit
def int8_gemv_kernel(
    x_ptr, factor_ptr, w_ptr, scale_ptr, y_ptr, N, KW4, R: tl.constexpr, BKW: tl.constexpr, EVEN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """y [M, N], computed as in gemv_kernel, with words of four bytes in their natural order."""
    token = tl.program_id(0)
    KW = KW4 * 4
    first = tl.program_id(1) * (2 * R) + tl.arange(0, R)
    w = w_ptr.to(tl.pointer_type(tl.uint32))
    row_a, row_b = tl.minimum(first, N - 1)[:, None] * KW, tl.minimum(first + R, N - 1)[:, None] * KW
    x = (x_ptr + token * (4 * KW)).to(tl.pointer_type(tl.uint32))
    kw = tl.arange(0, BKW)[None, :]
    sum_a, sum_b = tl.zeros([R, BKW], tl.float32), tl.zeros([R, BKW], tl.float32)
    for k0 in range(0, KW, BKW):
        inside = None if EVEN else (k0 + kw < KW)
        at = k0 + kw
        a = pairs_of_bytes(load_words(w + (row_a + at), inside), ASM)
        b = pairs_of_bytes(load_words(w + (row_b + at), inside), ASM)
        # After the end, weights are 0, so any of the row's own numbers gives the same sum.
        there = at if EVEN else tl.where(inside, at, at % 2)
        four = load_fours(x, tl.broadcast_to(there, [R, BKW]), ASM)
        sum_a, sum_b = multiply(a[0], b[0], four[0], sum_a, sum_b, ASM)
        sum_a, sum_b = multiply(a[1], b[1], four[1], sum_a, sum_b, ASM)
    y_a, y_b = tl.sum(own_sums(sum_a, ASM), 1), tl.sum(own_sums(sum_b, ASM), 1)
    finish(y_a, first, N, token, y_ptr, factor_ptr, scale_ptr, None)
    finish(y_b, first + R, N, token, y_ptr, factor_ptr, scale_ptr, None)


@triton.jit
def int8_gemm_kernel(
    x_ptr, factor_ptr, w_ptr, scale_ptr, y_ptr, M, N, K, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [M, N] on tensor cores, for more rows than `int8_gemv_kernel` computes efficiently."""
    first = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    rows, some = tl.minimum(first, N - 1), tokens < M
    k = tl.arange(0, BK)
    sums = tl.zeros([BN, BM], tl.float32)
    for k0 in range(0, K, BK):
        inside = k0 + k < K
        w = tl.load(w_ptr + rows.to(tl.int64)[:, None] * K + (k0 + k)[None, :], mask=inside[None, :], other=0)
        at = tokens.to(tl.int64)[None, :] * K + (k0 + k)[:, None]
        x = tl.load(x_ptr + at, mask=inside[:, None] & some[None, :], other=0.0)
        sums = tl.dot(w.to(tl.float16), x, sums)
    sums *= tl.load(scale_ptr + rows).to(tl.float32)[:, None]
    if factor_ptr is not None:
        sums *= tl.load(factor_ptr + tokens, mask=some, other=0.0)[None, :]
    y = y_ptr + tokens.to(tl.int64)[None, :] * N + first[:, None]
    tl.store(y, sums.to(y_ptr.dtype.element_ty), mask=(first < N)[:, None] & some[None, :])
