"""The functions of kernels/reference.py on a GPU. No function here waits for the device or reads a tensor's values.

Each is a torch custom operator with a fake implementation, so that graph capture and torch.compile see one opaque call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import triton
from dpllm.kernels.gpu_step.tables import PolicyTable
from dpllm.kernels.triton.activations import halve, halves_of
from dpllm.kernels.triton.gemm import dequantize_kernel, gemm_kernel
from dpllm.kernels.triton.gemv import gemv_kernel
from dpllm.kernels.triton.int8 import int8_gemm_kernel, int8_gemv_kernel
from dpllm.kernels.triton.pack import MAX_WORDS, TritonWeight, prepare, table_offset
from dpllm.kernels.triton.select import decide
from dpllm.kernels.weight import WORD, Int8Weight

__all__ = ["chosen_gemv", "dequantize", "gemv", "int8_linear", "matmul", "prepare"]

ASM = os.environ.get("TRITON_INTERPRET") != "1"  # the interpreter does not support inline assembly
WARPS = 4
FEW_ROWS = 4  # so few rows are computed one by one, independently of each other
MANY_ROWS = 128  # from this number of rows on, cuBLAS multiplies dequantised float16 blocks
BLOCK_BYTES = 64 << 20  # bytes of such a block: about the L2 cache of large GPUs
BLOCK_ROWS = 256  # its rows are a multiple of this: whole tiles of a tensor core's product
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOLD = {
    "g": 0, "base_ptr": None, "signals_ptr": None, "threshold_ptr": None, "extra_ptr": None, "rest_ptr": None,
    "state_ptr": None, "left_ptr": None, "PARTS": 0,
}  # a gemv whose width is given, not chosen  # fmt: skip


def gemv(
    x: Tensor, w: TritonWeight, bits: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Computes x W_b^T + bias, each row of x at its own width, which is read on the device.

    x: [M, K]. bits: int32 [M] on x's device; each becomes the nearest of w.widths. bias: [N]. Returns [M, N] in x's
    dtype, in `out` where that is given. Up to 4 rows are computed one by one, and a row's result does not depend on the
    others. float16 activations are used as they are, wider types as float16 times a power of two. Where gradients are
    needed, torch multiplies dequantised weights.
    """
    _check(x, w.in_features)
    if bits.shape != (len(x),):
        raise ValueError(f"widths {list(bits.shape)} do not match {len(x)} rows of activations.")
    if torch.is_grad_enabled() and x.requires_grad:
        y = _differentiable(x, w, bits, bias)
        return y if out is None else out.copy_(y)
    shape = len(x), w.out_features
    if out is not None and out.shape == shape and out.is_contiguous() and out.dtype in DTYPES:
        y = out
    else:
        y = x.new_empty(shape)
    if y.numel():
        bits = bits.to(torch.int32).contiguous()
        torch.ops.dpllm.bitplane_product(
            x, w.planes, w.tables, w.table_count, w.seed_bits, w.scale, bias, bits, *w.widths, y
        )
    return y if out is None or y is out else out.copy_(y)


def chosen_gemv(
    x: Tensor, w: Any, bias: Tensor | None, group: int, table: PolicyTable, otherwise: Callable[..., Tensor]
) -> Tensor:
    """Computes x W_b^T + bias of one token at the width b that the group's signals decide, and writes b to table.bits.

    x: [1, K]. It takes one launch for a TritonWeight. For any other matrix, the width is chosen first, and `otherwise`
    computes the product.
    """
    if not isinstance(w, TritonWeight):
        decide(group, table)
        return otherwise(x, w, table.bits[group : group + 1], bias=bias)
    _check(x, w.in_features)
    t, y = table, x.new_empty(1, w.out_features)
    torch.ops.dpllm.chosen_product(
        x, w.planes, w.tables, w.table_count, w.seed_bits, w.scale, bias, *w.widths, group, t.base, t.signals,
        t.thresholds, t.extra, t.rest, t.state, t.left, t.bits, y,
    )  # fmt: skip
    return y


def matmul(x: Tensor, w: TritonWeight) -> Tensor:
    """Computes x W^T with every resident plane, for prompts. x: [M, K]. Returns [M, N] in x's dtype.

    From 128 rows on, blocks of W become float16 and cuBLAS multiplies them. That is faster than a fused kernel, which
    would decode W again for every tile of rows.
    """
    _check(x, w.in_features)
    if torch.is_grad_enabled() and x.requires_grad:
        return F.linear(x, dequantize(w, w.resident_bits, x.dtype))
    if len(x) < MANY_ROWS:
        bits = torch.empty(
            len(x), dtype=torch.int32, device=x.device
        )  # not read, because there is only one width
        return gemv(x, w.between(w.resident_bits, w.resident_bits), bits)
    return _by_blocks(x, w.out_features, w.in_features, lambda rows: _dense(w, w.resident_bits, rows))


def dequantize(w: TritonWeight, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the b-bit matrix [N, K]: the table value of each code, times the row's scale, rounded once."""
    if not w.seed_bits <= bits <= w.resident_bits:
        raise ValueError(f"bits {bits} are not resident: {w.seed_bits}..{w.resident_bits} are.")
    return _dense(w, bits, range(w.out_features), dtype)


def int8_linear(x: Tensor, w: Int8Weight) -> Tensor:
    """Computes x W^T for the int8 head. x: [M, K]. Returns [M, N] in x's dtype."""
    n, k = w.values.shape
    _check(x, k)
    odd = k % 16 or not w.values.is_contiguous() or n * k > 4 * MAX_WORDS
    if odd or (torch.is_grad_enabled() and x.requires_grad):
        return F.linear(x, w.values.to(x.dtype)) * w.scale.to(x.dtype)
    if len(x) >= MANY_ROWS:
        return _by_blocks(x, n, k, lambda rows: _scaled(w, slice(rows.start, rows.stop)))
    y = x.new_empty(len(x), n)
    if y.numel():
        torch.ops.dpllm.int8_product(x, w.values, w.scale, y)
    return y


# -- the operators --------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "dpllm::bitplane_product",
    mutates_args=("out",),
    schema="(Tensor x, Tensor planes, Tensor tables, int table_count, int seed_bits, Tensor? scale, Tensor? bias, "
    "Tensor bits, int low, int high, Tensor(a!) out) -> ()",
)
def bitplane_product(
    x: Tensor, planes: Tensor, tables: Tensor, table_count: int, seed_bits: int, scale: Tensor | None,
    bias: Tensor | None, bits: Tensor, low: int, high: int, out: Tensor,
) -> None:  # fmt: skip
    """Sets out [M, N] to x [M, K] times the matrix at each row's width. The width is `low` where low == high."""
    n, words = planes.shape[1:]
    m, share = len(x), n // table_count
    with torch.cuda.device_of(x):
        halves, factor = halves_of(x, words * WORD)
        pointers = halves, factor, planes, tables, scale, bias, bits, out
        if m <= FEW_ROWS:
            step = _step(words)
            grid = m, triton.cdiv(n, 2 * WARPS)
            gemv_kernel[grid](
                *pointers, n, words // 4, table_count, share, low, high, seed_bits, WARPS, step,
                words % step == 0, ASM, **TOLD, num_warps=WARPS,
            )  # fmt: skip
        else:
            # Few rows: small tiles, for more programs. Many: tall tiles, with fewer instructions per weight.
            bn, bm, step = (32, 16, 16) if m <= 16 else (128, min(64, triton.next_power_of_2(m)), 8)
            grid = triton.cdiv(n, bn), triton.cdiv(m, bm)
            gemm_kernel[grid](
                *pointers, m, n, words // 4, table_count, share, low, high, seed_bits, bn, bm, step,
                words % step == 0, ASM, num_warps=2 if m <= 16 else WARPS, num_stages=1,
            )  # fmt: skip


@torch.library.custom_op(
    "dpllm::chosen_product",
    mutates_args=("left", "bits", "out"),
    schema="(Tensor x, Tensor planes, Tensor tables, int table_count, int seed_bits, Tensor? scale, Tensor? bias, "
    "int low, int high, int group, Tensor base, Tensor signals, Tensor thresholds, Tensor extra, Tensor rest, "
    "Tensor state, Tensor(a!) left, Tensor(b!) bits, Tensor(c!) out) -> ()",
)
def chosen_product(
    x: Tensor, planes: Tensor, tables: Tensor, table_count: int, seed_bits: int, scale: Tensor | None,
    bias: Tensor | None, low: int, high: int, group: int, base: Tensor, signals: Tensor, thresholds: Tensor,
    extra: Tensor, rest: Tensor, state: Tensor, left: Tensor, bits: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Sets out [1, N] to x [1, K] times the matrix at the group's chosen width, and writes that to bits[group]."""
    n, words = planes.shape[1:]
    step = _step(words)
    with torch.cuda.device_of(x):
        halves, factor = halves_of(x, words * WORD)
        gemv_kernel[(1, triton.cdiv(n, 2 * WARPS))](
            halves, factor, planes, tables, scale, bias, bits, out, n, words // 4, table_count, n // table_count,
            low, high, seed_bits, WARPS, step, words % step == 0, ASM, group, base, signals, thresholds, extra, rest,
            state, left, signals.shape[1], num_warps=WARPS,
        )  # fmt: skip


@torch.library.custom_op(
    "dpllm::int8_product",
    mutates_args=("out",),
    schema="(Tensor x, Tensor values, Tensor scale, Tensor(a!) out) -> ()",
)
def int8_product(x: Tensor, values: Tensor, scale: Tensor, out: Tensor) -> None:
    """Sets out [M, N] to x [M, K] times int8 values [N, K] times scale [N]."""
    n, k = values.shape
    m, words = len(x), k // 4
    with torch.cuda.device_of(x):
        halves, factor = halves_of(x, k)
        if m <= FEW_ROWS:
            step = _step(words)
            int8_gemv_kernel[(m, triton.cdiv(n, 2 * WARPS))](
                halves, factor, values, scale, out, n, words // 4, WARPS, step, words % step == 0, ASM,
                num_warps=WARPS,
            )  # fmt: skip
        else:
            bm = min(64, max(16, triton.next_power_of_2(m)))
            grid = triton.cdiv(n, 64), triton.cdiv(m, bm)
            int8_gemm_kernel[grid](
                halves, factor, values, scale, out, m, n, k, 64, bm, 64, num_warps=WARPS, num_stages=2
            )


@torch.library.custom_op(
    "dpllm::dequantize_rows",
    mutates_args=("out",),
    schema="(Tensor planes, Tensor tables, int table_count, int seed_bits, Tensor? scale, int bits, int first, "
    "Tensor(a!) out) -> ()",
)
def dequantize_rows(
    planes: Tensor, tables: Tensor, table_count: int, seed_bits: int, scale: Tensor | None, bits: int, first: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Sets out [rows, K] to rows first, first + 1, ... of the b-bit matrix."""
    n, words = planes.shape[1:]
    table = tables[table_offset(table_count, bits, seed_bits) :]
    with torch.cuda.device_of(out):
        grid = triton.cdiv(len(out), 16), triton.cdiv(words, 64)
        dequantize_kernel[grid](
            planes, table, scale, out, first, len(out), n, out.shape[1], words // 4, n // table_count, bits, 16,
            64, ASM, num_warps=WARPS,
        )  # fmt: skip


@torch.library.custom_op(
    "dpllm::halve",
    mutates_args=("out", "factor"),
    schema="(Tensor x, Tensor(a!) out, Tensor(b!) factor) -> ()",
)
def halve_rows(x: Tensor, out: Tensor, factor: Tensor) -> None:
    """Splits x [M, K] into float16 out [M, K] and float32 factor [M], as activations.halves_of describes it."""
    with torch.cuda.device_of(x):
        halve(x, out, factor)


for _operator in (bitplane_product, chosen_product, int8_product, dequantize_rows, halve_rows):
    _operator.register_fake(lambda *args: None)  # `out` has the shape of the result


# -- helpers --------------------------------------------------------------------------------------------------


def _step(words: int) -> int:
    """Returns the words that a warp reads at a time: two or four a lane, so that few lanes are idle at the end."""
    return 64 if 0 < words % 128 <= 64 else 128


def _dense(w: TritonWeight, bits: int, rows: range, dtype: torch.dtype = torch.float16) -> Tensor:
    out = torch.empty(len(rows), w.in_features, dtype=dtype, device=w.planes.device)
    if out.numel():
        torch.ops.dpllm.dequantize_rows(
            w.planes, w.tables, w.table_count, w.seed_bits, w.scale, bits, rows.start, out
        )
    return out


def _scaled(w: Int8Weight, rows: slice) -> Tensor:
    return (w.values[rows] * w.scale[rows].float()[:, None]).to(torch.float16)


def _by_blocks(x: Tensor, n: int, k: int, dense: Callable[[range], Tensor]) -> Tensor:
    """Multiplies x [M, K] by float16 blocks of rows that `dense` makes. Returns [M, N] in x's dtype."""
    halves, factor = x, None
    if x.dtype != torch.float16:
        halves = torch.empty(len(x), k, dtype=torch.float16, device=x.device)
        factor = torch.empty(len(x), device=x.device)
        torch.ops.dpllm.halve(x, halves, factor)
    y = torch.empty(len(x), n, dtype=torch.float16, device=x.device)
    rows = max(1, BLOCK_BYTES // (2 * k * BLOCK_ROWS)) * BLOCK_ROWS
    for first in range(0, n, rows):
        block = range(first, min(first + rows, n))
        torch.mm(halves, dense(block).T, out=y[:, block.start : block.stop])
    return y if factor is None else (y.float() * factor[:, None]).to(x.dtype)


def _check(x: Tensor, columns: int) -> None:
    """Checks shapes, because the kernels do not: they would read beyond the end of what does not match."""
    if x.ndim != 2 or x.shape[1] != columns or x.dtype not in DTYPES:
        raise ValueError(
            f"activations {list(x.shape)}, {x.dtype} do not match a matrix of {columns} columns: "
            "float16, bfloat16 or float32 [M, K] is needed."
        )


def _differentiable(x: Tensor, w: TritonWeight, bits: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_zeros(len(x), w.out_features)
    for width in bits.unique().tolist():
        rows = (bits == width).nonzero()[:, 0]
        y = y.index_add(0, rows, F.linear(x[rows], dequantize(w, width, x.dtype)))
    return y if bias is None else y + bias
