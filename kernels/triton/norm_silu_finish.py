"""Fused kernels for the operations of a decode step between its matrix products, one launch each.

`norm` adds the residual and applies RMSNorm. `silu_mul` computes SiLU(gate) * up. `finish` finds the greedy token and
the entropy of the prediction. `observe` prepares the multiplier of the next token. A kernel that produces a vector also
writes weighted squares of it, in parts: the signals by which the next products choose their width (select.py)."""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from dpllm.kernels.gpu_step import tables
from dpllm.kernels.gpu_step.tables import CacheTable, PolicyTable, Site
from dpllm.kernels.triton.select import arrived_last

TOKEN, OBSERVE, SPARE = (tl.constexpr(place) for place in (tables.TOKEN, tables.OBSERVE, tables.SPARE))
MULTIPLIER, OFFSET = tl.constexpr(tables.MULTIPLIER), tl.constexpr(tables.OFFSET)
CONTEXT, WEIGHTS = tl.constexpr(tables.CONTEXT), tl.constexpr(tables.WEIGHTS)
MEANS, BIAS = tl.constexpr(tables.MEANS), tl.constexpr(tables.BIAS)
CORRECTION, TARGET = tl.constexpr(tables.CORRECTION), tl.constexpr(tables.TARGET)
RATE, LIMIT = tl.constexpr(tables.RATE), tl.constexpr(tables.LIMIT)
ALL = tl.constexpr(tables.ALL)
LOG_TOTAL, ENTROPY = tl.constexpr(tables.LOG_TOTAL), tl.constexpr(tables.ENTROPY)


# -- residual + norm --------------------------------------------------------------------------------------------


@triton.jit
def norm_kernel(
    x_ptr, delta_ptr, weight_ptr, h_ptr, eps, K, diagonal_ptr, ids_ptr, signals_ptr, probe_ptr, state_ptr,
    exponent_limit, E: tl.constexpr, STRIDE: tl.constexpr, PARTS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One program computes x += delta, h = rms_norm(x) * weight, and the signals of the E groups that read h. It
    divides K into PARTS rows, so that a warp adds the parts of a signal by itself, and no two threads have the same
    element (x is changed in place). All loads come before the sums, because a load after a sum would have to be waited
    for."""
    part = tl.arange(0, PARTS)
    k = part[:, None] * B + tl.arange(0, B)[None, :]
    inside = k < K
    x = tl.load(x_ptr + k, mask=inside, other=0.0)
    kind = x.dtype
    if delta_ptr is not None:
        x = (x.to(tl.float32) + tl.load(delta_ptr + k, mask=inside, other=0.0).to(tl.float32)).to(kind)
    weight = tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    diagonals, groups = (), ()
    for e in tl.static_range(E):
        d = tl.load(diagonal_ptr + e * K + k, mask=inside, other=0.0)
        diagonals = diagonals + (d,)  # noqa: RUF005 (no stars in kernels)
        groups = groups + (tl.load(ids_ptr + e),)  # noqa: RUF005
    if probe_ptr is not None:
        probe = tl.load(probe_ptr + k, mask=inside, other=0.0)
        offset, correction = tl.load(state_ptr + OFFSET), tl.load(state_ptr + CORRECTION)
    if delta_ptr is not None:
        tl.store(x_ptr + k, x, mask=inside)
    wide = x.to(tl.float32)
    root = tl.rsqrt(tl.sum(tl.sum(wide * wide, 1), 0) / K + eps)
    h = ((wide * root).to(kind).to(tl.float32) * weight).to(kind)
    tl.store(h_ptr + k, h, mask=inside)
    h = h.to(tl.float32)
    for e in tl.static_range(E):
        signal = tl.sum(h * h * diagonals[e].to(tl.float32), 1)
        tl.store(signals_ptr + groups[e] * STRIDE + part, signal)
    if probe_ptr is not None:
        exponent = tl.sum(tl.sum(h * probe, 1), 0) + offset
        exponent = tl.minimum(tl.maximum(exponent, -exponent_limit), exponent_limit)
        tl.store(state_ptr + MULTIPLIER, tl.exp(exponent + correction))


def norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, site: Site, table: PolicyTable, limit: float
) -> Tensor:
    """Adds delta to x [1, K] in place, returns rms_norm(x) * weight, [1, K], and writes the site's signals.

    limit: of the exponent of the token's multiplier, which the first site sets."""
    probe = table.probe if site.first else None
    return torch.ops.dpllm.norm(
        x, delta, weight, eps, site.diagonals, site.ids, table.signals, probe, table.state, limit
    )


@torch.library.custom_op("dpllm::norm", mutates_args=("x", "signals", "state"))
def _norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, diagonals: Tensor | None, ids: Tensor,
    signals: Tensor, probe: Tensor | None, state: Tensor, limit: float,
) -> Tensor:  # fmt: skip
    h, columns = torch.empty_like(x), x.shape[1]
    block = triton.next_power_of_2(triton.cdiv(columns, tables.PARTS))
    norm_kernel[(1,)](
        x, delta, weight, h, eps, columns, diagonals, ids, signals, probe, state, limit, E=_fed(diagonals),
        STRIDE=signals.shape[1], PARTS=tables.PARTS, B=block, num_warps=min(max(block // 8, 1), 16),
    )  # fmt: skip
    return h


@_norm.register_fake
def _(x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x)


def _fed(diagonals: Tensor | None) -> int:
    """Returns the number of groups whose signals are written."""
    return 0 if diagonals is None else len(diagonals)


# -- silu * mul -----------------------------------------------------------------------------------------------


@triton.jit
def silu_kernel(
    gate_up_ptr, out_ptr, K, diagonal_ptr, ids_ptr, signals_ptr, E: tl.constexpr, STRIDE: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """Program p computes B columns of silu(gate) * up, and part p of the signals of the E groups that read these."""
    p = tl.program_id(0)
    k = p * B + tl.arange(0, B)
    inside = k < K
    gate = tl.load(gate_up_ptr + k, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + K + k, mask=inside, other=0.0)
    diagonals, groups = (), ()
    for e in tl.static_range(E):
        d = tl.load(diagonal_ptr + e * K + k, mask=inside, other=0.0)
        diagonals = diagonals + (d,)  # noqa: RUF005 (no stars in kernels)
        groups = groups + (tl.load(ids_ptr + e),)  # noqa: RUF005
    kind = gate.dtype
    wide = gate.to(tl.float32)
    y = (wide / (1.0 + tl.exp(-wide))).to(kind).to(tl.float32) * up.to(tl.float32)
    y = y.to(kind)
    tl.store(out_ptr + k, y, mask=inside)
    y = y.to(tl.float32)
    for e in tl.static_range(E):
        signal = tl.sum(y * y * diagonals[e].to(tl.float32), 0)
        tl.store(signals_ptr + groups[e] * STRIDE + p, signal)


SILU_BLOCK = 512  # columns of a program; more columns where there would be more than PARTS programs


def silu_mul(gate_up: Tensor, site: Site, table: PolicyTable) -> Tensor:
    """Returns silu(gate) * up, [1, K], of gate_up [1, 2K], and writes the signals of the site's groups."""
    return torch.ops.dpllm.silu_mul(gate_up, site.diagonals, site.ids, table.signals)


@torch.library.custom_op("dpllm::silu_mul", mutates_args=("signals",))
def _silu_mul(gate_up: Tensor, diagonals: Tensor | None, ids: Tensor, signals: Tensor) -> Tensor:
    columns = gate_up.shape[1] // 2
    out = gate_up.new_empty(1, columns)
    block = max(SILU_BLOCK, triton.next_power_of_2(triton.cdiv(columns, tables.PARTS)))
    silu_kernel[(triton.cdiv(columns, block),)](
        gate_up, out, columns, diagonals, ids, signals, E=_fed(diagonals), STRIDE=signals.shape[1], B=block
    )
    return out


@_silu_mul.register_fake
def _(gate_up: Tensor, *others: object) -> Tensor:
    return gate_up.new_empty(1, gate_up.shape[1] // 2)


# -- after the head -------------------------------------------------------------------------------------------


@triton.jit
def finish_kernel(
    logits_ptr,
    token_ptr,
    state_ptr,
    partial_ptr,
    counter_ptr,
    V,
    programs,
    PROGRAMS: tl.constexpr,
    B: tl.constexpr,
):
    """Finds the greedy token, the log of the sum of exponentials, and the entropy. partial: [programs, 4]."""
    p = tl.program_id(0)
    i = p * B + tl.arange(0, B)
    inside = i < V
    x = tl.load(logits_ptr + i, mask=inside, other=float("-inf"))
    top = tl.max(x, 0)
    shifted = tl.where(inside, x - top, 0.0)
    e = tl.where(inside, tl.exp(shifted), 0.0)
    tl.store(partial_ptr + 4 * p, top)
    tl.store(partial_ptr + 4 * p + 1, tl.sum(e, 0))
    tl.store(partial_ptr + 4 * p + 2, tl.sum(e * shifted, 0))
    # float32 holds every index below 2^24 exactly, more than any vocabulary
    tl.store(
        partial_ptr + 4 * p + 3, tl.minimum(tl.min(tl.where(x == top, i, V - 1), 0), V - 1).to(tl.float32)
    )
    if arrived_last(counter_ptr, programs):
        q = tl.arange(0, PROGRAMS)
        there = q < programs
        tops = tl.load(partial_ptr + 4 * q, mask=there, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(partial_ptr + 4 * q + 1, mask=there, other=0.0, cache_modifier=".cg")
        means = tl.load(partial_ptr + 4 * q + 2, mask=there, other=0.0, cache_modifier=".cg")
        where = tl.load(partial_ptr + 4 * q + 3, mask=there, other=0.0, cache_modifier=".cg")
        best = tl.max(tops, 0)
        lower = tl.where(there, tops - best, 0.0)
        scale = tl.where(there, tl.exp(lower), 0.0)
        total = tl.sum(sums * scale, 0)
        log_total = tl.log(total)
        tl.store(state_ptr + LOG_TOTAL, best + log_total)
        tl.store(state_ptr + ENTROPY, log_total - tl.sum(scale * (means + sums * lower), 0) / total)
        first = tl.min(tl.where(tops == best, where.to(tl.int32), V - 1), 0)
        tl.store(token_ptr, first)


FINISH_BLOCK = 1024


def finish(logits: Tensor, token: Tensor, table: PolicyTable, partial: Tensor, counter: Tensor) -> None:
    """Sets token int32 [1] to the first largest of logits float32 [1, V], and writes the entropy to the table.

    partial: float32 scratch of 4 numbers for every 1024 logits. counter: int32, zero before and after."""
    torch.ops.dpllm.finish(logits, token, table.state, partial, counter)


@torch.library.custom_op("dpllm::finish", mutates_args=("token", "state", "partial", "counter"))
def _finish(logits: Tensor, token: Tensor, state: Tensor, partial: Tensor, counter: Tensor) -> None:
    vocabulary = logits.shape[1]
    programs = triton.cdiv(vocabulary, FINISH_BLOCK)
    finish_kernel[(programs,)](
        logits, token, state, partial, counter, vocabulary, programs,
        PROGRAMS=triton.next_power_of_2(programs), B=FINISH_BLOCK,
    )  # fmt: skip


@triton.jit
def observe_kernel(
    logits_ptr, request_ptr, state_ptr, bits_ptr, share_ptr, left_ptr, decay, G, B: tl.constexpr
):  # fmt: skip
    """Updates the context and the correction (calib/runtime) from the previous step, then sets the offset of the
    exponent of this token's multiplier, and what the token may cost."""
    tl.store(left_ptr, tl.load(request_ptr + SPARE))
    asked = tl.load(request_ptr + OBSERVE)
    if asked != 0:
        token = tl.load(request_ptr + TOKEN)
        level = tl.log(tl.load(state_ptr + ENTROPY) + 0.01)
        chosen = tl.maximum(tl.load(logits_ptr + token) - tl.load(state_ptr + LOG_TOTAL), -20.0)
        trend = tl.load(state_ptr + CONTEXT + 2)
        trend = tl.where(trend == trend, decay * trend + (1 - decay) * level, level)
        tl.store(state_ptr + CONTEXT, level)
        tl.store(state_ptr + CONTEXT + 1, chosen)
        tl.store(state_ptr + CONTEXT + 2, trend)
    if asked == ALL:
        g = tl.arange(0, B)
        bits = tl.load(bits_ptr + g, mask=g < G, other=0).to(tl.float32)
        used = tl.sum(bits * tl.load(share_ptr + g, mask=g < G, other=0.0), 0)
        limit = tl.load(state_ptr + LIMIT)
        moved = tl.load(state_ptr + CORRECTION) + tl.load(state_ptr + RATE) * (
            tl.load(state_ptr + TARGET) - used
        )
        tl.store(state_ptr + CORRECTION, tl.minimum(tl.maximum(moved, -limit), limit))
    tl.debug_barrier()
    offset = tl.load(state_ptr + BIAS)
    for i in tl.static_range(3):
        known = tl.load(state_ptr + CONTEXT + i) - tl.load(state_ptr + MEANS + i)
        offset += tl.load(state_ptr + WEIGHTS + i) * tl.where(known == known, known, 0.0)
    tl.store(state_ptr + OFFSET, offset)


def observe(logits: Tensor, cache: CacheTable, table: PolicyTable, decay: float) -> None:
    """Learns from the previous step where the request asks for it, then prepares the next token.

    It learns from the step's logits float32 [1, V], the bits that it read, and the token that followed. It then sets
    the offset of the token's multiplier, and what the token may cost."""
    t = table
    torch.ops.dpllm.observe(logits, cache.request, t.state, t.bits, t.share, t.left, decay)


@torch.library.custom_op("dpllm::observe", mutates_args=("state", "left"))
def _observe(
    logits: Tensor, request: Tensor, state: Tensor, bits: Tensor, share: Tensor, left: Tensor, decay: float
) -> None:
    observe_kernel[(1,)](
        logits, request, state, bits, share, left, decay, len(bits), B=triton.next_power_of_2(len(bits))
    )


for _operator in (_finish, _observe):
    _operator.register_fake(lambda *args: None)  # they write only to their arguments
