"""y = W_b x for one token, or a few, the width b read from device memory.

A warp has two rows, its lanes share out their words. Words of 32 columns are decoded in registers (codes.py) and
multiplied by tensor cores, for the sake of exact products, float32 sums and an eighth of the instructions: the four
lanes of a quad form two rows of mma's matrix A, and the quad's own activations one column of B. Of the 16 x 8 results
only those where a quad meets its own column mean anything; `own_sums` picks them.

So these kernels ask of Triton's layouts: a warp's lanes lie along one row (for the tables that lanes share, widths 5
and 6), and a thread's words come in pairs of neighbours. tests/unit/test_triton_code.py reads that from the compiler.
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
    """One of the two float16 of each word, as float32."""
    return (word >> (16 if HIGH else 0)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def multiply(a, b, x, sum_a, sum_b, ASM: tl.constexpr):
    """Adds a x to the sums of row a, b x to those of row b; a, b, x are packed pairs of float16.

    Two neighbouring words at a time (pack=2): the columns 0-7 and 8-15 of mma's A.
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
    """What is this thread's out of `multiply`, zero for the rest.

    Lane l holds columns 2 (l % 4) and the next of its quad's row, l / 4; the quad's own column has that number too.
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
    """W_b x of each warp's two rows. low_a, low_b: the first words of planes 0 .. LOW - 1, already on their way."""
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
        # A block in any case: Triton 3.9's interpreter spreads no scalar mask.
        following = k0 + BKW + (0 * kw if EVEN else kw) < KW
        low_a = load_planes(w_ptr + (k0 + BKW), at_a, plane, following, 0, LOW)
        low_b = load_planes(w_ptr + (k0 + BKW), at_b, plane, following, 0, LOW)
        n_a, n_b = words_of(q_a, B), words_of(q_b, B)
        # Every warp loads the activations for itself: one load for all of them would go through shared memory.
        x_at = x_ptr + tl.broadcast_to(k0 + kw, [R, BKW])
        for i in tl.static_range(4 if B <= 4 else 8):
            a, b = pairs_of(n_a[i], table_a, B, True, ASM), pairs_of(n_b[i], table_b, B, True, ASM)
            for j in tl.static_range(4 if B <= 4 else 2):
                m = 4 * j + 3 - i if B <= 4 else 8 * j + 7 - i
                sum_a, sum_b = multiply(a[j], b[j], load_words(x_at + m * KW, inside), sum_a, sum_b, ASM)
    return tl.sum(own_sums(sum_a, ASM), 1), tl.sum(own_sums(sum_b, ASM), 1)


@triton.jit
def behind(number, ASM: tl.constexpr):
    """The number; what is computed from it is not begun before the loads above have been sent off. The assembler would
    rather send them off last, when their addresses are needed."""
    if ASM:
        number = tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip
    return number


@triton.jit
def uniform(number, ASM: tl.constexpr):
    """The number, which every lane has: so that the assembler knows, and branches on it without masks."""
    if ASM:
        number = tl.inline_asm_elementwise(
            "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", [number], dtype=tl.int32, is_pure=True, pack=1
        )
    return number


@triton.jit
def finish(y, rows, N, token, y_ptr, factor_ptr, scale_ptr, bias_ptr):
    """The activations' factor, row scales and the bias, where there are such; then to memory."""
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
    Widths outside LOW .. HIGH are taken for the nearest one; a narrower LOW .. HIGH is smaller, quicker code.
    """
    token = tl.program_id(0)
    KW = KW4 * 4
    first = tl.program_id(1) * (2 * R) + tl.arange(0, R)
    rows_a, rows_b = tl.minimum(first, N - 1), tl.minimum(first + R, N - 1)
    kw = tl.arange(0, BKW)[None, :]
    inside = None if EVEN else (kw < KW)
    # These planes are read whatever the width is, so they need not wait for it.
    low_a = load_planes(w_ptr, rows_a[:, None] * KW + kw, N * KW, inside, 0, LOW)
    low_b = load_planes(w_ptr, rows_b[:, None] * KW + kw, N * KW, inside, 0, LOW)
    bits = LOW
    if PARTS > 0:
        bits, left = chosen(
            behind(g, ASM), base_ptr, signals_ptr, threshold_ptr, extra_ptr, rest_ptr, state_ptr, left_ptr, PARTS
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
