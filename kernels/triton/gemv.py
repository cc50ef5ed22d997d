"""Computes y = W_b x for one or a few tokens, with the width b read from device memory.

A warp has two rows, whose words are divided among its lanes. Words of 32 columns are decoded in registers
(bitplane_codes.py) and multiplied by tensor cores, which give exact products and float32 sums with an eighth of the
instructions. The four lanes of a quad form two rows of mma's matrix A, and the quad's own activations form one column
of B. Of the 16 x 8 results only those where a quad meets its own column are used; `own_sums` selects them.

These kernels therefore depend on Triton's layouts: the lanes of a warp lie along one row (for the tables that lanes
share at widths 5 and 6), and a thread's words come in pairs of neighbours. tests/unit/test_triton_assembly.py checks
that in the compiler's output.
"""

from __future__ import annotations

import triton
import triton.language as tl
from dpllm.kernels.triton.bitplane_codes import (
    load_planes,
    load_table,
    load_words,
    pairs_of,
    table_offset,
    words_of,
)
from dpllm.kernels.triton.select import chosen, record


@triton.jit
def half(word, HIGH: tl.constexpr):
    """Returns one of the two float16 of each word, as float32."""
    return (word >> (16 if HIGH else 0)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def multiply(a, b, x, sum_a, sum_b, ASM: tl.constexpr):
    """Adds a x to the sums of row a, and b x to the sums of row b; a, b, x are packed pairs of float16.

    It takes two neighbouring words at a time (pack=2): the columns 0-7 and 8-15 of mma's A.
    """
    if ASM:
        sum_a, sum_b = tl.inline_asm_elementwise(
            """mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
            {$0, $1, $2, $3}, {$4, $6, $5, $7}, {$8, $9}, {$10, $11, $12, $13};""",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a, b, x, sum_a, sum_b], dtype=(tl.float32, tl.float32), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        x0, x1 = half(x, False), half(x, True)
        sum_a += half(a, False) * x0 + half(a, True) * x1
        sum_b += half(b, False) * x0 + half(b, True) * x1
    return sum_a, sum_b


@triton.jit
def own_sums(sums, ASM: tl.constexpr):
    """Returns this thread's own results of `multiply`, and zero for the rest.

    Lane l holds column 2 (l % 4) and the next one of its quad's row, l / 4. The quad's own column has that number, too.
    """
    if ASM:
        sums = tl.inline_asm_elementwise(
            """{ .reg .b32 l, quad, at; .reg .pred own, odd, even;
            mov.u32 l, %laneid; and.b32 at, l, 3; shr.u32 quad, l, 3; setp.eq.u32 own, quad, at;
            and.b32 quad, l, 4; setp.ne.and.u32 odd, quad, 0, own; setp.eq.and.u32 even, quad, 0, own;
            selp.f32 $0, $2, 0f00000000, even; selp.f32 $1, $3, 0f00000000, odd; }""",
            "=&f,=&f,f,f", [sums], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return sums


@triton.jit
def two_rows(
    x_ptr, w_ptr, table_ptr, rows_a, rows_b, share, low_a, low_b, KW, plane, B: tl.constexpr, LOW: tl.constexpr,
    BKW: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Returns W_b x of each warp's two rows. low_a, low_b: the first words of planes 0 .. LOW - 1."""
    R: tl.constexpr = rows_a.shape[0]
    table_a = load_table(table_ptr, (rows_a // share)[:, None], B, BKW, True, ASM)
    table_b = load_table(table_ptr, (rows_b // share)[:, None], B, BKW, True, ASM)
    kw = tl.arange(0, BKW)[None, :]
    at_a, at_b = rows_a[:, None] * KW + kw, rows_b[:, None] * KW + kw
    sum_a, sum_b = tl.zeros([R, BKW], tl.float32), tl.zeros([R, BKW], tl.float32)
    for k0 in range(0, KW, BKW):
        inside = None if EVEN else (k0 + kw < KW)
        q_a = low_a + load_planes(w_ptr + k0, at_a, plane, inside, LOW, B)
        q_b = low_b + load_planes(w_ptr + k0, at_b, plane, inside, LOW, B)
        # The mask is always a block, because Triton 3.9's interpreter does not broadcast a scalar mask.
        following = k0 + BKW + (0 * kw if EVEN else kw) < KW
        low_a = load_planes(w_ptr + (k0 + BKW), at_a, plane, following, 0, LOW)
        low_b = load_planes(w_ptr + (k0 + BKW), at_b, plane, following, 0, LOW)
        n_a, n_b = words_of(q_a, B), words_of(q_b, B)
        # Every warp loads the activations itself; one load for all warps would go through shared memory.
        x_at = x_ptr + tl.broadcast_to(k0 + kw, [R, BKW])
        for i in tl.static_range(4 if B <= 4 else 8):
            a, b = pairs_of(n_a[i], table_a, B, True, ASM), pairs_of(n_b[i], table_b, B, True, ASM)
            for j in tl.static_range(4 if B <= 4 else 2):
                m = 4 * j + 3 - i if B <= 4 else 8 * j + 7 - i
                sum_a, sum_b = multiply(a[j], b[j], load_words(x_at + m * KW, inside), sum_a, sum_b, ASM)
    return tl.sum(own_sums(sum_a, ASM), 1), tl.sum(own_sums(sum_b, ASM), 1)


@triton.jit
def after_loads(number, ASM: tl.constexpr):
    """Returns the number, and orders computations with it after the loads above have been issued. The assembler would
    otherwise issue these loads last, when their addresses are needed."""
    if ASM:
        number = tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip
    return number


@triton.jit
def uniform(number, ASM: tl.constexpr):
    """Returns the number, which is the same in every lane, so that the assembler branches on it without masks."""
    if ASM:
        number = tl.inline_asm_elementwise(
            "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", [number], dtype=tl.int32, is_pure=True, pack=1
        )
    return number


@triton.jit
def finish(y, rows, N, token, y_ptr, factor_ptr, scale_ptr, bias_ptr):
    """Applies the activations' factor, row scales and the bias, where there are any, and stores the result."""
    here = rows < N
    if factor_ptr is not None:
        y *= tl.load(factor_ptr + token)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + rows, mask=here, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows, mask=here, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * N + rows, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["g"], do_not_specialize_on_alignment=["bits_ptr"])
def gemv_kernel(
    x_ptr, factor_ptr, w_ptr, table_ptr, scale_ptr, bias_ptr, bits_ptr, y_ptr, N, KW4, tables, share,
    LOW: tl.constexpr, HIGH: tl.constexpr, SEED: tl.constexpr, R: tl.constexpr, BKW: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr, g, base_ptr, signals_ptr, threshold_ptr, extra_ptr, rest_ptr, state_ptr,
    left_ptr, PARTS: tl.constexpr,
):  # fmt: skip
    """y [M, N] = W_b x, token by token; program (token, n) has rows 2 R n .. 2 R (n + 1) - 1.

    b is read from bits [M]; or, where PARTS > 0, chosen for group g by its signals, and written to bits [G].
    A width outside LOW .. HIGH becomes the nearest one. A narrower LOW .. HIGH makes smaller and faster code.
    """
    token = tl.program_id(0)
    KW = KW4 * 4
    first = tl.program_id(1) * (2 * R) + tl.arange(0, R)
    rows_a, rows_b = tl.minimum(first, N - 1), tl.minimum(first + R, N - 1)
    kw = tl.arange(0, BKW)[None, :]
    inside = None if EVEN else (kw < KW)
    # Every width reads these planes, so their loads need not wait for the width.
    low_a = load_planes(w_ptr, rows_a[:, None] * KW + kw, N * KW, inside, 0, LOW)
    low_b = load_planes(w_ptr, rows_b[:, None] * KW + kw, N * KW, inside, 0, LOW)
    bits = LOW
    if PARTS > 0:
        bits, left = chosen(
            after_loads(g, ASM), base_ptr, signals_ptr, threshold_ptr, extra_ptr, rest_ptr, state_ptr, left_ptr, PARTS
        )  # fmt: skip
        if tl.program_id(1) == 0:
            record(g, bits, left, bits_ptr, left_ptr)
        bits = uniform(tl.minimum(tl.maximum(bits, LOW), HIGH), ASM)
    elif LOW < HIGH:
        bits = tl.minimum(tl.maximum(tl.load(bits_ptr + token), LOW), HIGH)
    y_a, y_b = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
    x = (x_ptr + token * (32 * KW)).to(tl.pointer_type(tl.uint32))
    for B in tl.static_range(LOW, HIGH + 1):
        if bits == B:
            y_a, y_b = two_rows(
                x, w_ptr, table_ptr + table_offset(tables, B, SEED), rows_a, rows_b, share, low_a, low_b, KW,
                N * KW, B, LOW, BKW, EVEN, ASM,
            )  # fmt: skip
    finish(y_a, first, N, token, y_ptr, factor_ptr, scale_ptr, bias_ptr)
    finish(y_b, first + R, N, token, y_ptr, factor_ptr, scale_ptr, bias_ptr)
