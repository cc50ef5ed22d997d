"""Converts activations to the form that products read: float16 in rows of whole words, with a factor for each row."""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl


@triton.jit
def halve_kernel(x_ptr, row_stride, out_ptr, factor_ptr, K, KP, BLOCK: tl.constexpr):
    """out[m] = x[m] / factor[m] in float16, zeros from K to KP. factor: the power of two at the row's maximum."""
    m = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    factor = 1.0
    if factor_ptr is not None:
        largest = tl.zeros([BLOCK], tl.float32)
        for k0 in range(0, K, BLOCK):
            x = tl.load(x_ptr + m * row_stride + k0 + column, mask=k0 + column < K, other=0.0).to(tl.float32)
            x = tl.abs(x)  # infinities and NaN do not count
            largest = tl.maximum(largest, tl.where(x < float("inf"), x, 0.0))
        exponent = tl.max(largest, 0).to(tl.int32, bitcast=True) & 0x7F800000
        exponent = tl.minimum(
            tl.maximum(exponent, 1 << 23), 253 << 23
        )  # so that its reciprocal is finite, too
        factor = exponent.to(tl.float32, bitcast=True)
        tl.store(factor_ptr + m, factor)
        factor = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    for k0 in range(0, KP, BLOCK):
        x = tl.load(x_ptr + m * row_stride + k0 + column, mask=k0 + column < K, other=0.0).to(tl.float32)
        tl.store(out_ptr + m * KP + k0 + column, (x * factor).to(tl.float16), mask=k0 + column < KP)


def halve(x: Tensor, out: Tensor, factor: Tensor | None) -> None:
    """Writes out [M, columns] and, where it is given, factor [M] from x [M, K], where K <= columns."""
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    columns = out.shape[1]
    if out.numel():
        block = min(4096, triton.next_power_of_2(columns))
        halve_kernel[(len(x),)](x, x.stride(0), out, factor, x.shape[1], columns, block)


def halves_of(x: Tensor, columns: int) -> tuple[Tensor, Tensor | None]:
    """Returns (halves float16 [M, columns], factor float32 [M] or None), with x = halves * factor in every row.

    x: [M, K], where K <= columns; halves are zero after column K. float16 input that already has the right layout is
    returned as it is. Wider types are divided by a power of two, so that any range fits. This drops the bits of a value
    from the 12th on, and values that are 2^24 times smaller than the largest of their row.
    """
    narrow = x.dtype == torch.float16
    if narrow and x.shape[1] == columns and x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x, None
    out = torch.empty(len(x), columns, dtype=torch.float16, device=x.device)
    factor = None if narrow else torch.empty(len(x), device=x.device)
    halve(x, out, factor)
    return out, factor
