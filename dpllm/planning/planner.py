"""Turns targets into a plan: the planes to hold, the bits to read, and the share of the cache to keep.

The planner prices every plan on a grid: milliseconds by the cost model, nats by the quality model, and bytes. It takes
the best plan that meets all targets. With a limit on time or memory, the best plan has the best quality. With a limit
on quality alone, the best plan is the fastest one. Weights and cache are planned together, so that each byte goes where
it improves quality most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from dpllm.base.errors import InputError
from dpllm.base.machine import available_bytes
from dpllm.base.quantities import field, rise
from dpllm.control.cost_model import CostModel
from dpllm.model.memory import resident_bytes
from dpllm.planning.quality_model import QualityModel, expected_loss
from dpllm.quant.overlay import Overlay

if TYPE_CHECKING:
    from dpllm.engine import Engine

BITS_STEP, KEEP_STEP = 0.05, 0.05
ALTERNATIVES = 8
NOTHING = 1e-6  # smaller differences in quality or milliseconds do not count


@dataclass(frozen=True)
class Targets:
    """The limits that a plan must meet; None sets no limit.

    tpot_ms: time per token at the end of the context, in ms. max_memory: bytes of weights and cache. max_quality_loss:
    rise of perplexity over the resident maximum with the whole cache (0.02 is 2%). context: tokens in the cache.
    Raises InputError for a value that is out of range.
    """

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
class PlanInputs:
    """The facts of a model that a planner needs.

    held: planes -> bytes of the resident weights. read_bytes: effective bits -> bytes of weights that a token reads.
    pairs: key-value pairs that a token adds to the whole cache, over all layers and heads. pair_bytes: bytes of one
    pair. max_positions: greatest context in tokens. penalty: (planes, bits) -> nats that are lost at these bits because
    no more planes are held. usable: bytes that weights and cache may take on this machine; None if it does not say.
    """

    held: Mapping[int, int]
    read_bytes: Callable[[float], int]
    pairs: int
    pair_bytes: int
    max_positions: int
    penalty: Callable[[int, float], float] = lambda planes, bits: 0.0
    usable: int | None = None


@dataclass(frozen=True)
class Plan:
    """One plan and its predicted cost.

    resident_bits: planes held. target_bits: effective bits to read. keep_ratio: share of the cache to keep. tpot_ms:
    time per token, in ms. quality_loss: rise of perplexity, as a fraction. weight_bytes, kv_bytes: bytes held.
    read_bytes: bytes that a token reads.
    """

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
        """Bytes of weights and cache that are held."""
        return self.weight_bytes + self.kv_bytes

    def as_json(self, lam: float | None = None) -> dict[str, Any]:
        """Returns the object that `dpllm plan --json` prints. lam: the lambda of `target_bits`, if known."""
        return {
            "resident_bits": self.resident_bits, "target_bits": round(self.target_bits, 3), "lambda": lam,
            "keep_ratio": round(self.keep_ratio, 3), "predicted_tpot_ms": round(self.tpot_ms, 4),
            **field("predicted_quality_loss", round(self.quality_loss, 5)),
            "bytes": {"weights": self.weight_bytes, "kv": self.kv_bytes, "read_per_token": self.read_bytes},
        }  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """The answer of a planner.

    plan: the best plan. binding: names of the targets that prevent a better plan. alternatives: the frontier of time
    and quality within the limit on memory, fastest first.
    """

    plan: Plan
    binding: tuple[str, ...]
    alternatives: tuple[Plan, ...]
    targets: Targets
    cost: CostModel
    quality: QualityModel


class Planner:
    """Finds plans for one engine on one machine."""

    def __init__(self, inputs: PlanInputs, cost: CostModel, quality: QualityModel):
        self.inputs, self.cost, self.quality = inputs, cost, quality

    def plan(self, targets: Targets) -> Planned:
        """Returns the best plan.

        Raises InputError if no plan meets the targets; the error names the nearest targets that can be met.
        """
        if targets.context > self.inputs.max_positions:
            raise InputError(
                f"a context of {targets.context} tokens is longer than the model's {self.inputs.max_positions} "
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
        """Returns every plan on the grid for a context of `context` tokens that fits into this machine.

        Raises InputError if none fits.
        """
        keeps = [1.0]
        if context > 1 and len(self.quality.keep) > 1:
            keeps = [round(float(k), 6) for k in np.arange(self.quality.keep[0], 1 + 1e-9, KEEP_STEP)]
        low, high = self.cost.bits[0], self.cost.bits[-1]
        grid = [float(b) for b in np.arange(low, high, BITS_STEP)] + [high]
        priced = [self._priced(bits, keeps, context) for bits in grid]
        every = [
            self._held(planes, plan)
            for planes in self.inputs.held
            for plans in priced
            if plans[0].target_bits <= planes + 1e-9
            for plan in plans
        ]
        usable = self.inputs.usable
        fitting = every if usable is None else [p for p in every if p.memory <= usable]
        if usable is not None and not fitting:
            raise InputError(
                f"even the smallest plan needs {min(p.memory for p in every) / 1e9:.2f} GB; this process may use "
                f"{usable / 1e9:.2f} GB. Free some memory, or shorten the context."
            )
        return fitting

    def _priced(self, bits: float, keeps: list[float], context: int) -> list[Plan]:
        """Returns one plan for each share of the cache, with every plane held."""
        m, found = self.inputs, []
        planes = max(m.held)
        weights_ms, read = self.cost.token_ms(bits), m.read_bytes(bits)
        for keep in keeps:
            pairs = keep * context * m.pairs
            ms, kv = weights_ms + self.cost.kv_ms(pairs), round(pairs * m.pair_bytes)
            loss = rise(self.quality.loss(bits, keep))
            found.append(Plan(planes, bits, keep, ms, loss, m.held[planes], kv, read + kv))
        return found

    def _held(self, planes: int, plan: Plan) -> Plan:
        """Returns the same plan with only `planes` planes held."""
        penalty, loss = self.inputs.penalty(planes, plan.target_bits), plan.quality_loss
        if penalty:
            loss = rise(math.log1p(loss) + penalty)
        return Plan(
            planes, plan.target_bits, plan.keep_ratio, plan.tpot_ms, loss, self.inputs.held[planes], plan.kv_bytes,
            plan.read_bytes,
        )  # fmt: skip

    def _impossible(self, every: list[Plan], targets: Targets) -> str:
        """Returns the error's text: for each target, the nearest value that can be met while the others hold."""
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
        if not ways:  # changing a single target does not suffice
            ways = [
                f"{_option(name)} {show(min(map(reach, every)))} at best, alone"
                for (name, reach, show), _ in given
            ]
        return (
            f"no plan meets {asked} with {targets.context} tokens of context. Nearest: {'; or '.join(ways)}. "
            "Change one of the targets."
        )


def plan_inputs(engine: Engine) -> PlanInputs:
    """Returns the facts of this engine that a planner needs. Raises InputError for a model without a profile."""
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
    return PlanInputs(
        held={b: resident_bytes(overlay, b) for b in planes},
        read_bytes=lambda bits: engine.decoder.bytes_for(bits) + head, pairs=c.num_layers * c.num_kv_heads,
        pair_bytes=2 * c.head_dim * engine.decoder.kv_dtype.itemsize, max_positions=c.max_positions,
        penalty=cache(penalty), usable=_usable(engine, resident_bytes(overlay, high)),
    )  # fmt: skip


def _usable(engine: Engine, held: int) -> int | None:
    """Returns the memory that a plan may take on the CPU: what is left, and what the engine holds now already."""
    free = available_bytes() if engine.decoder.device.type == "cpu" else None
    return None if free is None else free + held


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
    """Returns the plans that meet the targets."""
    for name, reach, _ in _KINDS:
        most = getattr(targets, name)
        if most is not None:
            every = [p for p in every if reach(p) <= most * (1 + 1e-9)]
    return every


def _best(every: list[Plan], targets: Targets, fastest: bool | None = None) -> Plan | None:
    """Returns the best plan that meets the targets, or None.

    fastest: prefer time over quality; None: do so if quality alone is limited. Ties are broken by bytes read, then by
    bytes held.
    """
    if fastest is None:
        fastest = targets.tpot_ms is None and targets.max_quality_loss is not None
    return min(_meeting(every, targets), key=lambda p: _rank(p, fastest), default=None)


def _rank(p: Plan, fastest: bool) -> tuple[float, ...]:
    first = (p.tpot_ms, p.quality_loss) if fastest else (p.quality_loss, p.tpot_ms)
    return (*first, p.read_bytes, p.memory)


def _binding(every: list[Plan], targets: Targets, best: Plan) -> tuple[str, ...]:
    """Returns the names of the targets without which a better plan would exist."""
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
    """Returns the frontier of time and quality within the limit on memory, fastest first.

    The frontier holds at most ALTERNATIVES corners of the lower convex hull, and the best plan.
    """
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
    """Returns True if b lies on or above the line from a to c."""
    slope = (c.quality_loss - a.quality_loss) / max(c.tpot_ms - a.tpot_ms, 1e-12)
    return b.quality_loss >= a.quality_loss + slope * (b.tpot_ms - a.tpot_ms) - 1e-12
