"""Chooses widths on the device, by comparing signals of an input with thresholds in device memory.

A kernel that produces a vector of the step (norm_silu_finish.py, attention.py) also writes weighted squares of it, one
part for each of its programs or warps, without waiting for another. The product that reads a group's planes adds the
parts, compares the sum, and so knows its width (`chosen`, the same in every program), while the planes that every width
needs are already being loaded. Choosing therefore takes no launch, no counter, and no load that waits for another.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from dpllm.kernels.gpu_step import tables
from dpllm.kernels.gpu_step.tables import PolicyTable, Site

MULTIPLIER, GAIN = tl.constexpr(tables.MULTIPLIER), tl.constexpr(tables.GAIN)
MAX_STEPS, WARP = tl.constexpr(tables.MAX_STEPS), tl.constexpr(tables.PARTS)
BLOCK = 1024
ROW_BLOCKS = 32  # programs that divide the rows of a projection


@triton.jit
def chosen(
    g, base_ptr, signals_ptr, threshold_ptr, extra_ptr, rest_ptr, state_ptr, left_ptr, PARTS: tl.constexpr
):  # fmt: skip
    """Returns (group g's width, what the token may still cost after it), as PolicyTable defines it. A signal that is
    NaN exceeds no threshold."""
    step = tl.arange(0, MAX_STEPS)
    parts = tl.load(signals_ptr + g * PARTS + tl.arange(0, WARP))
    for i in tl.static_range(1, PARTS // WARP):  # sums within one warp need no barrier
        parts += tl.load(signals_ptr + g * PARTS + i * WARP + tl.arange(0, WARP))
    threshold = tl.load(threshold_ptr + g * MAX_STEPS + step)
    extra = tl.load(extra_ptr + g * MAX_STEPS + step)
    base, rest, left = tl.load(base_ptr + g), tl.load(rest_ptr + g), tl.load(left_ptr + g)
    multiplier, gain = tl.load(state_ptr + MULTIPLIER), tl.load(state_ptr + GAIN)
    paced = tl.exp2(gain * tl.log2(left.to(tl.float32) / tl.maximum(rest, 1e-30)))
    signal = tl.sum(parts, 0) * tl.where(paced < multiplier, paced, multiplier)
    wanted = tl.sum((signal > threshold).to(tl.int32), 0)
    taken = tl.minimum(wanted, tl.sum((extra <= left).to(tl.int32), 0))
    return base + taken, left - tl.sum(tl.where(step == taken - 1, extra, 0), 0)


@triton.jit
def record(g, bits, left, bits_ptr, left_ptr):
    """Writes the width that was read, and what is left for the group after g."""
    tl.store(bits_ptr + g, bits)
    tl.store(left_ptr + g + 1, left)


@triton.jit
def arrived_last(counter_ptr, programs):
    """Tells whether every other program has arrived here. The counter is then zero again, for the next launch."""
    tl.debug_barrier()  # stores of this program's other threads come before the count
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


# -- in a launch of its own, for products of other libraries ---------------------------------------------------


@triton.jit(do_not_specialize=["g"])
def decide_kernel(
    bits_ptr, g, base_ptr, signals_ptr, threshold_ptr, extra_ptr, rest_ptr, state_ptr, left_ptr, PARTS: tl.constexpr
):  # fmt: skip
    """One program chooses the width of group g."""
    bits, left = chosen(
        g, base_ptr, signals_ptr, threshold_ptr, extra_ptr, rest_ptr, state_ptr, left_ptr, PARTS
    )
    record(g, bits, left, bits_ptr, left_ptr)


def decide(group: int, table: PolicyTable) -> None:
    """Chooses the width of a group of a WEIGHTED table from the group's signals in the table."""
    t = table
    torch.ops.dpllm.decide(group, t.base, t.signals, t.thresholds, t.extra, t.rest, t.state, t.left, t.bits)


@torch.library.custom_op("dpllm::decide", mutates_args=("left", "bits"))
def _decide(
    group: int, base: Tensor, signals: Tensor, thresholds: Tensor, extra: Tensor, rest: Tensor, state: Tensor,
    left: Tensor, bits: Tensor,
) -> None:  # fmt: skip
    decide_kernel[(1,)](
        bits, group, base, signals, thresholds, extra, rest, state, left, PARTS=signals.shape[1], num_warps=1
    )


# -- rows of many texts: the signature of kernels/reference.py ------------------------------------------------


@triton.jit
def select_kernel(x_ptr, diagonal_ptr, threshold_ptr, out_ptr, seed, K, steps, B: tl.constexpr):
    """Program r chooses the bits of row r."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([B], tl.float32)
    for k0 in range(0, K, B):
        k = k0 + tl.arange(0, B)
        x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        total += x * x * tl.load(diagonal_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    error = tl.sum(total, 0)
    step = tl.arange(0, MAX_STEPS)
    threshold = tl.load(threshold_ptr + step, mask=step < steps, other=float("inf"))
    tl.store(out_ptr + row, seed + tl.sum((error > threshold).to(tl.int32), 0))


def select(signal: Tensor, diagonal: Tensor, thresholds: Tensor, seed_bits: int) -> Tensor:
    """Chooses the bits of each row, as kernels/reference.py defines it. signal: [M, K]. Returns int32 [M]."""
    return torch.ops.dpllm.select(signal, diagonal, thresholds, seed_bits)


@torch.library.custom_op("dpllm::select", mutates_args=())
def _select(signal: Tensor, diagonal: Tensor, thresholds: Tensor, seed_bits: int) -> Tensor:
    signal, diagonal, thresholds = (t.contiguous() for t in (signal, diagonal, thresholds))
    assert len(thresholds) <= MAX_STEPS.value
    out = torch.empty(len(signal), dtype=torch.int32, device=signal.device)
    if not len(signal):
        return out
    with torch.cuda.device_of(signal):
        select_kernel[(len(signal),)](
            signal, diagonal, thresholds, out, seed_bits, signal.shape[1], len(thresholds), B=BLOCK
        )
    return out


@_select.register_fake
def _(signal: Tensor, diagonal: Tensor, thresholds: Tensor, seed_bits: int) -> Tensor:
    return torch.empty(len(signal), dtype=torch.int32, device=signal.device)


# -- estimates that need more than a weighted square ----------------------------------------------------------


@triton.jit
def estimate_kernel(
    x_ptr, ids_ptr, address_ptr, rows_ptr, line_ptr, base_ptr, threshold_ptr, bits_ptr, partial_ptr, counter_ptr, K,
    PARTS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Chooses bits[g] from slope * ||G x|| + intercept. The PARTS programs of a group divide G's rows in turns. Without
    a G, the first program computes ||x||."""
    e, part = tl.program_id(0), tl.program_id(1)
    g = tl.load(ids_ptr + e)
    rows, base = tl.load(rows_ptr + g), tl.load(base_ptr + g)
    slope, intercept = tl.load(line_ptr + 2 * g), tl.load(line_ptr + 2 * g + 1)
    threshold = tl.load(threshold_ptr + g * MAX_STEPS + tl.arange(0, MAX_STEPS))
    matrix = tl.multiple_of(tl.load(address_ptr + g).to(tl.pointer_type(tl.float16)), 16)
    square = 0.0
    if rows > 0:
        for r in range(part, rows, PARTS):
            product = tl.zeros([B], tl.float32)
            for k0 in range(0, K, B):
                k = k0 + tl.arange(0, B)
                x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
                product += x * tl.load(matrix + r * K + k, mask=k < K, other=0.0).to(tl.float32)
            whole = tl.sum(product, 0)
            square += whole * whole
    elif part == 0:
        total = tl.zeros([B], tl.float32)
        for k0 in range(0, K, B):
            k = k0 + tl.arange(0, B)
            x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            total += x * x
        square = tl.sum(total, 0)
    tl.store(partial_ptr + e * PARTS + part, square)
    if arrived_last(counter_ptr + e, PARTS):
        parts = tl.load(partial_ptr + e * PARTS + tl.arange(0, PARTS), cache_modifier=".cg")
        size = tl.sqrt_rn(tl.sum(parts, 0))
        exceeded = slope * size + intercept > threshold  # false where it is NaN
        tl.store(bits_ptr + g, base + tl.sum(exceeded.to(tl.int32), 0))


def estimate(x: Tensor, site: Site, table: PolicyTable, partial: Tensor, counter: Tensor) -> None:
    """Chooses the widths of the site's groups by the estimates of an ESTIMATED table.

    x: [1, K]. partial: float32 scratch of at least 32 * E. counter: int32 [E], zero before and after.
    """
    if site.groups:
        t = table
        torch.ops.dpllm.estimate(
            x, len(site.groups), site.ids, t.address, t.rows, t.line, t.base, t.thresholds, t.bits, partial, counter
        )  # fmt: skip


@torch.library.custom_op("dpllm::estimate", mutates_args=("bits", "partial", "counter"))
def _estimate(
    x: Tensor, groups: int, ids: Tensor, address: Tensor, rows: Tensor, line: Tensor, base: Tensor,
    thresholds: Tensor, bits: Tensor, partial: Tensor, counter: Tensor,
) -> None:  # fmt: skip
    estimate_kernel[(groups, ROW_BLOCKS)](
        x,
        ids,
        address,
        rows,
        line,
        base,
        thresholds,
        bits,
        partial,
        counter,
        x.shape[1],
        PARTS=ROW_BLOCKS,
        B=BLOCK,
    )


for _operator in (_estimate, _decide):
    _operator.register_fake(lambda *args: None)  # they write only to their arguments
