"""Choosing widths on the device: signals of an input, compared with thresholds in device memory, bits written there.

Every estimator fed by one vector is served by one launch. The kernels that produce a vector (small_ops.py,
attention.py) compute a weighted signal on the way; what they share is here: `decide_within`, and `arrived_last` for
sums over many programs, which are made in a fixed order and so do not depend on which program came last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from dpllm.kernels import step_tables as tables
from dpllm.kernels.step_tables import PolicyTable, Site

MULTIPLIER, GAIN = tl.constexpr(tables.MULTIPLIER), tl.constexpr(tables.GAIN)
MAX_STEPS = tl.constexpr(tables.MAX_STEPS)
BLOCK = 1024
ROW_BLOCKS = 32  # programs that share a projection's rows


@triton.jit
def thresholds_of(g, threshold_address_ptr, STEPS: tl.constexpr):
    """Group g's thresholds [8], infinite behind the last."""
    thresholds = tl.load(threshold_address_ptr).to(tl.pointer_type(tl.float32))
    step = tl.arange(0, MAX_STEPS)
    return tl.load(thresholds + g * STEPS + step, mask=step < STEPS, other=float("inf"))


@triton.jit
def limits_of(
    ids_ptr, base_ptr, threshold_address_ptr, extra_ptr, rest_ptr, E: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """What E groups decide by, as `decide_within` takes it. Kernels ask for it before they sum anything up: behind the
    sum they would wait for each load in turn, at every vector of a step."""
    limits = ()
    for e in tl.static_range(E):
        g = tl.load(ids_ptr + e)
        threshold = thresholds_of(g, threshold_address_ptr, STEPS)
        extra = tl.load(extra_ptr + g * MAX_STEPS + tl.arange(0, MAX_STEPS))
        found = g, threshold, extra, tl.load(rest_ptr + g), tl.load(base_ptr + g)
        limits = limits + (found,)  # noqa: RUF005 (no stars in kernels)
    return limits


@triton.jit
def decide_within(left, signal, multiplier, gain, limits, bits_ptr):
    """Writes a group's bits, by multiplier * signal, for a token of which only `left` may still be spent (PolicyTable
    says how). A signal that is no number exceeds nothing. Returns what is left then: the groups of a token come one
    after another, no two programs decide at once."""
    g, threshold, extra, rest, base = limits
    paced = tl.exp2(gain * tl.log2(left.to(tl.float32) / tl.maximum(rest, 1e-30)))
    signal *= tl.where(paced < multiplier, paced, multiplier)
    wanted = tl.sum((signal > threshold).to(tl.int32), 0)
    taken = tl.minimum(wanted, tl.sum((extra <= left).to(tl.int32), 0))
    tl.store(bits_ptr + g, base + taken)
    return left - tl.sum(tl.where(tl.arange(0, MAX_STEPS) == taken - 1, extra, 0), 0)


@triton.jit
def diagonal_of(address_ptr, g):
    """Pointer to group g's float16 estimator."""
    return tl.multiple_of(tl.load(address_ptr + g).to(tl.pointer_type(tl.float16)), 16)


@triton.jit
def arrived_last(counter_ptr, programs):
    """Whether every other program has been here. The counter is zero again then, for the next launch."""
    tl.debug_barrier()  # what this program's other threads have stored goes before the count
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def decide_sums(
    partial_ptr, limits, bits_ptr, state_ptr, left_ptr, programs, E: tl.constexpr, PROGRAMS: tl.constexpr
):  # fmt: skip
    """Decides for a vector's E groups from their sums by program, partial [E, programs]."""
    p = tl.arange(0, PROGRAMS)
    multiplier, gain, left = tl.load(state_ptr + MULTIPLIER), tl.load(state_ptr + GAIN), tl.load(left_ptr)
    parts = ()
    for e in tl.static_range(E):
        part = tl.load(partial_ptr + e * programs + p, mask=p < programs, other=0.0, cache_modifier=".cg")
        parts = parts + (part,)  # noqa: RUF005 (no stars in kernels)
    for e in tl.static_range(E):
        left = decide_within(left, tl.sum(parts[e], 0), multiplier, gain, limits[e], bits_ptr)
    tl.store(left_ptr, left)


def decision(site: Site, table: PolicyTable) -> dict[str, Any]:
    """What a kernel is given to decide for a site's groups by a weighted signal; E is 0 where it is not to."""
    return {
        "state_ptr": table.state, "ids_ptr": site.ids, "address_ptr": table.address, "base_ptr": table.base,
        "threshold_address_ptr": table.threshold_address, "bits_ptr": table.bits,
        "left_ptr": table.left, "extra_ptr": table.extra, "rest_ptr": table.rest,
        "E": len(site.groups) if table.kind == tables.WEIGHTED else 0, "STEPS": table.steps,
    }  # fmt: skip


def no_decision(any_tensor: Tensor) -> dict[str, Any]:
    """The same for a kernel that decides nothing."""
    pointers = (
        "state_ptr", "ids_ptr", "address_ptr", "base_ptr", "threshold_address_ptr", "bits_ptr", "left_ptr",
        "extra_ptr", "rest_ptr",
    )  # fmt: skip
    return dict.fromkeys(pointers, any_tensor) | {"E": 0, "STEPS": 0}


# -- rows of many texts: the signature of kernels/reference.py ------------------------------------------------


@triton.jit
def select_kernel(x_ptr, diagonal_ptr, threshold_ptr, out_ptr, seed, K, steps, B: tl.constexpr):
    """Program r: the bits of row r."""
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
    """Bits of each row, as kernels/reference.py says. signal: [M, K]. Returns int32 [M]."""
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
    x_ptr, ids_ptr, address_ptr, rows_ptr, line_ptr, base_ptr, threshold_address_ptr, bits_ptr, partial_ptr,
    counter_ptr, K, STEPS: tl.constexpr, PARTS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """bits[g] from slope * ||G x|| + intercept, the PARTS programs of a group taking turns at G's rows; without a G,
    ||x|| is computed by the first of them."""
    e, part = tl.program_id(0), tl.program_id(1)
    g = tl.load(ids_ptr + e)
    rows = tl.load(rows_ptr + g)
    matrix = diagonal_of(address_ptr, g)
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
        signal = tl.load(line_ptr + 2 * g) * size + tl.load(line_ptr + 2 * g + 1)
        exceeded = signal > thresholds_of(g, threshold_address_ptr, STEPS)  # never, where it is no number
        tl.store(bits_ptr + g, tl.load(base_ptr + g) + tl.sum(exceeded.to(tl.int32), 0))


def estimate(x: Tensor, site: Site, table: PolicyTable, partial: Tensor, counter: Tensor) -> None:
    """Decides for the site's groups by the estimates of a table of kind ESTIMATED.

    x: [1, K]. partial: float32 scratch of at least 32 * E. counter: int32 [E], zero before and after.
    """
    if site.groups:
        estimate_kernel[(len(site.groups), ROW_BLOCKS)](
            x, site.ids, table.address, table.rows, table.line, table.base, table.threshold_address, table.bits,
            partial, counter, x.shape[1], STEPS=table.steps, PARTS=ROW_BLOCKS, B=BLOCK,
        )  # fmt: skip
