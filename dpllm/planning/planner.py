"""From targets to a plan: how many planes to hold, how many bits to read, how much of the cache to keep.

Every plan on a grid is priced by the cost model (milliseconds), the quality model (nats) and bytes; the best one that
meets all targets is taken. With a bound on time or memory that is the plan of the best quality, with a bound on
quality alone the fastest one. Weights and cache are chosen together: a byte goes where it buys more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from dpllm.base.errors import InputError
from dpllm.control.cost_model import CostModel
from dpllm.model.memory import resident_bytes
from dpllm.planning.quality_model import QualityModel, expected_loss
from dpllm.quant.overlay import Overlay

if TYPE_CHECKING:
    from dpllm.engine import Engine

BITS_STEP, KEEP_STEP = 0.05, 0.05
ALTERNATIVES = 8
NOTHING = 1e-6  # of quality or milliseconds


@dataclass(frozen=True)
class Targets:
    """tpot_ms: time per token at the end of the context. max_memory: bytes of weights and cache. max_quality_loss: rise
    of perplexity over the resident maximum with the whole cache, 0.02 = 2%. context: tokens in the cache."""

    tpot_ms: float | None = None
    max_memory: int | None = None
    max_quality_loss: float | None = None
    context: int = 1024

    def __post_init__(self) -> None:
        for name, value in (("tpot_ms", self.tpot_ms), ("max_memory", self.max_memory)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value:g}; a target must be above 0.")
        loss = self.max_quality_loss
        if loss is not None and not (math.isfinite(loss) and loss >= 0):
            raise InputError(f"max_quality_loss is {loss:g}; it must be 0 or more (0.02 is 2%).")
        if self.context < 1:
            raise InputError(f"a context of {self.context} tokens is impossible. Give at least 1.")


@dataclass(frozen=True)
class Machine:
    """What a plan is made for.

    held: planes -> bytes of the weights then resident. read_bytes: effective bits -> bytes of weights a token reads.
    pairs: key-value pairs a token adds to the whole cache, over all layers and heads; pair_bytes: of one of them.
    penalty: (planes, bits) -> nats that holding no more planes costs at these bits.
    """

    held: Mapping[int, int]
    read_bytes: Callable[[float], int]
    pairs: int
    pair_bytes: int
    max_positions: int
    penalty: Callable[[int, float], float] = lambda planes, bits: 0.0


@dataclass(frozen=True)
class Plan:
    """quality_loss: rise of perplexity, as a fraction. memory, read: bytes held, and read by a token."""

    resident_bits: int
    target_bits: float
    keep_ratio: float
    tpot_ms: float
    quality_loss: float
    weight_bytes: int
    kv_bytes: int
    read_bytes: int

    @property
    def memory(self) -> int:
        """Bytes held."""
        return self.weight_bytes + self.kv_bytes

    def as_json(self, lam: float | None = None) -> dict[str, Any]:
        """The object of `dpllm plan --json`."""
        return {
            "resident_bits": self.resident_bits, "target_bits": round(self.target_bits, 3), "lambda": lam,
            "keep_ratio": round(self.keep_ratio, 3), "predicted_tpot_ms": round(self.tpot_ms, 4),
            "predicted_quality_loss": round(self.quality_loss, 5),
            "bytes": {"weights": self.weight_bytes, "kv": self.kv_bytes, "read_per_token": self.read_bytes},
        }  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """The best plan and what it was chosen from.

    binding: names of the targets that keep it from being better. alternatives: the frontier of time and quality under
    the other targets, fastest first. targets, cost, quality: what was asked for, and the measurements it rests on.
    """

    plan: Plan
    binding: tuple[str, ...]
    alternatives: tuple[Plan, ...]
    targets: Targets
    cost: CostModel
    quality: QualityModel


class Planner:
    """Plans for one engine on one machine."""

    def __init__(self, machine: Machine, cost: CostModel, quality: QualityModel):
        self.machine, self.cost, self.quality = machine, cost, quality

    def plan(self, targets: Targets) -> Planned:
        """The best plan. Raises InputError where none meets the targets: it says which of them could be met."""
        if targets.context > self.machine.max_positions:
            raise InputError(
                f"a context of {targets.context} tokens is longer than the model's {self.machine.max_positions} "
                "positions. Shorten it."
            )
        every = self.candidates(targets.context)
        best = _best(every, targets)
        if best is None:
            raise InputError(self._impossible(every, targets))
        return Planned(
            plan=best, binding=_binding(every, targets, best), alternatives=_frontier(every, targets, best),
            targets=targets, cost=self.cost, quality=self.quality,
        )  # fmt: skip

    def candidates(self, context: int) -> list[Plan]:
        """Every plan on the grid, for a context of `context` tokens."""
        keeps = [1.0]
        if context > 1 and len(self.quality.keep) > 1:
            keeps = [round(float(k), 6) for k in np.arange(self.quality.keep[0], 1 + 1e-9, KEEP_STEP)]
        low, high = self.cost.bits[0], self.cost.bits[-1]
        grid = [float(b) for b in np.arange(low, high, BITS_STEP)] + [high]
        priced = [self._priced(bits, keeps, context) for bits in grid]
        return [
            self._held(planes, plan)
            for planes in self.machine.held
            for plans in priced
            if plans[0].target_bits <= planes + 1e-9
            for plan in plans
        ]

    def _priced(self, bits: float, keeps: list[float], context: int) -> list[Plan]:
        """Plans that read these bits, one a share of the cache, with every plane held."""
        m, found = self.machine, []
        planes = max(m.held)
        weights_ms, read = self.cost.step_ms(bits), m.read_bytes(bits)
        for keep in keeps:
            pairs = keep * context * m.pairs
            ms, kv = weights_ms + self.cost.kv_ms(pairs), round(pairs * m.pair_bytes)
            loss = math.expm1(self.quality.loss(bits, keep))
            found.append(Plan(planes, bits, keep, ms, loss, m.held[planes], kv, read + kv))
        return found

    def _held(self, planes: int, plan: Plan) -> Plan:
        """The same plan with no more planes held than these."""
        penalty, loss = self.machine.penalty(planes, plan.target_bits), plan.quality_loss
        if penalty:
            loss = math.expm1(math.log1p(loss) + penalty)
        return Plan(
            planes, plan.target_bits, plan.keep_ratio, plan.tpot_ms, loss, self.machine.held[planes], plan.kv_bytes,
            plan.read_bytes,
        )  # fmt: skip

    def _impossible(self, every: list[Plan], targets: Targets) -> str:
        """What would have to give: for each target, the nearest that can be had while the others are kept."""
        ways = []
        for name, reach, show in _KINDS:
            if getattr(targets, name) is None:
                continue
            if kept := _meeting(every, _without(targets, name)):
                ways.append(f"{_option(name)} {show(min(map(reach, kept)))}")
        given = [
            (kind, getattr(targets, kind[0])) for kind in _KINDS if getattr(targets, kind[0]) is not None
        ]
        asked = ", ".join(f"{_option(name)} {show(value)}" for (name, _, show), value in given)
        if not ways:  # no single one suffices
            ways = [
                f"{_option(name)} {show(min(map(reach, every)))} at best, alone"
                for (name, reach, show), _ in given
            ]
        return (
            f"no plan meets {asked} with {targets.context} tokens of context. Nearest: {'; or '.join(ways)}. "
            "Change one of the targets."
        )


def machine_of(engine: Engine) -> Machine:
    """The sizes that plans for this engine are computed from. Raises InputError for a model without bits to choose."""
    profile, c = engine.calibration(), engine.decoder.config
    overlay = Overlay.open(engine.path)
    high = max(g.resident_bits for g in engine.decoder.groups)
    uniform = {int(row[0]) for row in profile.resident if (row == row[0]).all()}
    planes = sorted(b for b in uniform if profile.bits[0] < b <= high)
    whole = profile.planes(high)

    def penalty(held: int, bits: float) -> float:
        top = min(bits, profile.target_range(held)[1])
        return max(0.0, expected_loss(profile, top, held) - expected_loss(profile, top, whole))

    head = engine.decoder.head_bytes() + profile.estimator_bytes()
    return Machine(
        held={b: resident_bytes(overlay, b) for b in planes},
        read_bytes=lambda bits: engine.bytes_for(bits) + head, pairs=c.num_layers * c.num_kv_heads,
        pair_bytes=2 * c.head_dim * engine.decoder.kv_dtype.itemsize, max_positions=c.max_positions,
        penalty=cache(penalty),
    )  # fmt: skip


_KINDS: tuple[tuple[str, Callable[[Plan], float], Callable[[float], str]], ...] = (
    ("tpot_ms", lambda p: p.tpot_ms, lambda v: f"{v:.3g}"),
    ("max_memory", lambda p: p.memory, lambda v: f"{v / 1e6:.1f} MB"),
    ("max_quality_loss", lambda p: p.quality_loss, lambda v: f"{v:.2%}"),
)


def _without(targets: Targets, name: str) -> Targets:
    nothing: dict[str, Any] = {name: None}
    return replace(targets, **nothing)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _meeting(every: list[Plan], targets: Targets) -> list[Plan]:
    """The plans that meet the targets."""
    for name, reach, _ in _KINDS:
        most = getattr(targets, name)
        if most is not None:
            every = [p for p in every if reach(p) <= most * (1 + 1e-9)]
    return every


def _best(every: list[Plan], targets: Targets, fastest: bool | None = None) -> Plan | None:
    """The plan of the best quality; under a bound on quality alone, the fastest. Ties: fewer bytes read, then held."""
    if fastest is None:
        fastest = targets.tpot_ms is None and targets.max_quality_loss is not None
    return min(_meeting(every, targets), key=lambda p: _rank(p, fastest), default=None)


def _rank(p: Plan, fastest: bool) -> tuple[float, ...]:
    first = (p.tpot_ms, p.quality_loss) if fastest else (p.quality_loss, p.tpot_ms)
    return (*first, p.read_bytes, p.memory)


def _binding(every: list[Plan], targets: Targets, best: Plan) -> tuple[str, ...]:
    """Targets without which there would be a better plan."""
    fastest = targets.tpot_ms is None and targets.max_quality_loss is not None
    found = []
    for name, _, _ in _KINDS:
        if getattr(targets, name) is None:
            continue
        freed = _best(every, _without(targets, name), fastest)
        assert freed is not None
        if _rank(freed, fastest)[0] < _rank(best, fastest)[0] - NOTHING:
            found.append(name)
    return tuple(found)


def _frontier(every: list[Plan], targets: Targets, best: Plan) -> tuple[Plan, ...]:
    """Plans that no other beats in both time and quality while memory is kept to: corners of the lower convex hull, the
    chosen one among them."""
    kept = sorted(
        _meeting(every, Targets(max_memory=targets.max_memory, context=targets.context)),
        key=lambda p: (p.tpot_ms, p.quality_loss),
    )
    hull: list[Plan] = []
    for p in kept:
        if hull and p.quality_loss >= hull[-1].quality_loss:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], p):
            hull.pop()
        hull.append(p)
    if len(hull) > ALTERNATIVES:
        at = np.linspace(0, len(hull) - 1, ALTERNATIVES).round().astype(int)
        hull = [hull[i] for i in at]
    return tuple(sorted({*hull, best}, key=lambda p: (p.tpot_ms, p.quality_loss)))


def _above(a: Plan, b: Plan, c: Plan) -> bool:
    """Whether b lies on or above the line from a to c."""
    slope = (c.quality_loss - a.quality_loss) / max(c.tpot_ms - a.tpot_ms, 1e-12)
    return b.quality_loss >= a.quality_loss + slope * (b.tpot_ms - a.tpot_ms) - 1e-12
