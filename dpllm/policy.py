"""Who decides how many planes a token reads at a group: one small class per policy.

A policy is a callable `select(group, x [T, K]) -> int32 [T]`. It sees each position once and in order, so a
batched pass and token-by-token decoding get the same widths; except where it is `stepwise`: then it also
learns from each finished step (`observe`), and only decoding step by step is the real thing.
"""

from __future__ import annotations

import copy
from collections import deque
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dpllm.allowance import Allowance, Pace, Prices
from dpllm.base.errors import InputError
from dpllm.calib.allocation import static_bits
from dpllm.calib.correction import Correction
from dpllm.calib.profile import CalibrationProfile
from dpllm.calib.rule import RateDistortionRule
from dpllm.calib.sensitivity import step_context
from dpllm.dp_policy import DPLLMPolicy
from dpllm.model.decoder import Decoder, Group
from dpllm.oracle import OracleRateDistortion

POLICIES = (
    "uniform", "static", "random", "dp-llm", "rate-distortion", "oracle-dp-llm", "oracle-rate-distortion",
)  # fmt: skip


STEER = 0.05  # bits between the targets whose thresholds are kept; the correction does the rest


class PrecisionPolicy(Protocol):
    """Chooses widths. `extra_bytes` is what choosing itself reads per token."""

    name: str
    extra_bytes: int

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """Bits of each token at this group. x: [T, K], the group's input. Returns int32 [T]."""
        ...


def begin_text(policy: PrecisionPolicy) -> PrecisionPolicy:
    """The policy to decode one text with: its tables are shared, what it learns from finished steps is not."""
    if not getattr(policy, "stepwise", False):
        return policy
    own = copy.copy(policy)
    own.reset()  # type: ignore[attr-defined]
    return own


def observe(policy: object, logits: Tensor, tokens: Tensor) -> None:
    """Tells a policy that learns from finished steps: logits [R, V] of the step, tokens int64 [R] that follow."""
    if getattr(policy, "stepwise", False):
        policy.observe(logits, tokens)  # type: ignore[attr-defined]


class StaticPolicy:
    """One width per group, the same for every token. The uniform policy is the case of equal widths."""

    extra_bytes = 0

    def __init__(self, bits: list[int], name: str = "static"):
        self.bits, self.name = bits, name

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """The group's width, T times."""
        return torch.full((len(x),), self.bits[group.index], dtype=torch.int32, device=x.device)


class Learner(Protocol):
    """Who learns from finished steps in a policy's stead while it decodes with the policy's rule elsewhere."""

    def observe(self, logits: Tensor, tokens: Tensor) -> bool:
        """What the policy would take in; False where it is to do so itself."""
        ...

    def release(self) -> None:
        """Gives what has been learnt back to the policy."""
        ...


class RandomPolicy:
    """Each token and group draws one of the two widths around the target: the control that spends the
    same bits without looking."""

    extra_bytes = 0
    name = "random"

    def __init__(self, target_bits: float, groups: int, seed: int = 0):
        self.low = int(np.floor(target_bits))
        self.share = target_bits - self.low
        # One stream per group: the n-th draw belongs to the n-th position, however positions are batched.
        self.streams = [np.random.default_rng([seed, g]) for g in range(groups)]

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """floor(target) or one more, with the odds that give the target on average."""
        upper = self.streams[group.index].random(len(x)) < self.share
        drawn = np.minimum(self.low + upper, group.resident_bits)
        return torch.as_tensor(drawn, dtype=torch.int32, device=x.device)


class RateDistortionPolicy(RateDistortionRule):
    """Reads one more plane wherever the expected loss it saves is worth lambda times its bytes.

    The expected saving is calibrated per group as a function of one cheap number, m_t * sum_k d_k x_k^2, and
    grows with it; so at a given lambda the rule is a few thresholds per group (calib/rule.py). m_t foretells
    how much this token cares, from its embedding and the previous step (`observe`); it also carries the
    correction that keeps effective bits on target (calib/correction.py).
    Retargeting rewrites the thresholds in place, between any two tokens.
    """

    name = "rate-distortion"
    stepwise = True

    def __init__(
        self, profile: CalibrationProfile, decoder: Decoder, target_bits: float, corrected: bool = True
    ):
        planes = np.asarray([g.resident_bits for g in decoder.groups])
        super().__init__(profile, decoder.backend.select, decoder.device, planes)
        self.extra_bytes = profile.estimator_bytes()
        self.corrected = corrected
        self.allowance: Allowance | None = None
        self.pace: Pace | None = None  # of the allowance
        self._left: Tensor | None = None  # int64 [R], of the allowance of the tokens under way
        self._steered: dict[float, Tensor] = {}  # thresholds by target, in steps of STEER
        self._told: list[float | None] = [None]  # whose of them the thresholds are, in all texts
        self._paces: dict[tuple[float, Prices], Pace] = {}  # by target and prices
        self._weights = torch.from_numpy(profile.weights.astype(np.float64))
        self._total = float(profile.weights.sum())
        self._used: Tensor | None = None  # float64 [R], weights times bits of the tokens under way
        self.lag = 0
        self.deferred: Learner | None = None
        self.set_target(target_bits)

    def set_target(self, target_bits: float) -> None:
        """Moves lambda to where calibration measured these effective bits. The correction starts anew."""
        self._begin(target_bits)
        if self.planes.max() > self.profile.bits[0]:  # else only the seed is resident: nothing to choose
            self.set_lambda(self.profile.lambda_for(target_bits, self.planes))

    def set_lambda(self, lam: float) -> None:
        """Rewrites the thresholds, in place, for this price of a byte."""
        super().set_lambda(lam)
        self._told[0] = None

    def steer(self, target_bits: float, allowance: Allowance | None = None) -> None:
        """Moves the target between two tokens of a text; the correction goes on from where it is.

        allowance: what no token may exceed, whatever it is worth (dpllm/allowance.py); None: no limit.
        """
        self.controller.target_bits, self.allowance = target_bits, allowance
        if self.planes.max() == self.profile.bits[0]:  # nothing to choose
            return
        near = round(target_bits / STEER) * STEER
        if near not in self._steered:
            low, high = self.profile.target_range(self.planes)
            lam = self.profile.lambda_for(min(max(near, low), high), self.planes)
            self._steered[near] = torch.from_numpy(self.profile.thresholds(lam, self.planes))
        if self._told[0] != near:
            self._told[0] = near
            self.thresholds.copy_(self._steered[near])
        if allowance is not None:
            key = near, allowance.prices
            if key not in self._paces:
                self._paces[key] = Pace.of(allowance.prices, self.profile, self._steered[near].numpy())
            self.pace = self._paces[key]

    def reset(self) -> None:
        """A new text: no previous step, no correction (the same text is to get the same widths)."""
        self.context, self._inputs, self._used, self.deferred = None, {}, None, None
        self._begin(self.controller.target_bits)

    def _begin(self, target_bits: float) -> None:
        self.controller, self.correction = Correction(target_bits), 0.0
        self._coming = deque([0.0] * self.lag)

    def delay(self, tokens: int) -> None:
        """Corrects each token by what was known so many tokens before, and leaves the previous step's context out: what
        a token reads then depends on nothing that a pass over up to so many tokens would still have to find out, so it
        is the same however tokens are grouped into passes. For one text at a time; starts it anew."""
        self.lag = tokens
        self.reset()

    def corrections(self, count: int) -> list[float]:
        """Of the tokens about to be decoded; of more than one only where it is delayed by as many."""
        return list(islice(self._coming, count)) if self.lag else [float(self.correction)]

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """Seed width plus one bit per threshold the group's signal exceeds."""
        if self.deferred is not None:  # the policy decides by itself again
            self.deferred.release()
        bits = super().__call__(group, x)
        if self.allowance is not None and self.pace is not None:
            bits = self._afford(group, bits, self.allowance)
        used = bits.double() * group.weights
        self._used = used if group.index == 0 or self._used is None else self._used + used
        return bits

    def multiplier_at(self, group: int) -> Tensor:
        """The multiplier, kept to the pace of the allowance."""
        m = self.multiplier
        if self.allowance is None or self.pace is None:
            return m
        if group == 0 or self._left is None:
            self._left = torch.full((len(m),), self.allowance.spare, dtype=torch.int64, device=m.device)
        return torch.minimum(m, self.pace.limit(self._left, group))

    def _afford(self, group: Group, bits: Tensor, allowance: Allowance) -> Tensor:
        """The widths, or less where the token's allowance is used up."""
        assert self._left is not None
        extra = allowance.prices.extra[group.index].to(bits.device)  # [steps], ascending
        affordable = group.seed_bits + (extra[None] <= self._left[:, None]).sum(1)
        bits = torch.minimum(bits, affordable.to(bits.dtype))
        step = (bits - group.seed_bits).long()
        self._left = self._left - torch.where(step > 0, extra[(step - 1).clamp(min=0)], 0)
        return bits

    def record(self, bits: Tensor) -> None:
        """What a native step chose by this rule: int32 [R, G]."""
        self._used = bits.double() @ self._weights.to(bits.device)

    def observe(self, logits: Tensor, tokens: Tensor) -> None:
        """After a decode step. logits: [R, V] of R sequences side by side; tokens: int64 [R], what comes
        next in each. Fewer rows than before: the last sequences have ended."""
        if self.deferred is not None and self.deferred.observe(logits, tokens):
            return
        tokens = tokens.to(logits.device)
        if not self.lag:
            previous = None if self.context is None else self.context[: len(tokens)]
            self.context = step_context(logits, tokens, previous)
        if self.corrected and self._used is not None:
            self.controller.update(self._used[: len(tokens)] / self._total)
            self.correction, self._used = self.controller.value, None
            if self.lag:
                self._coming.append(float(self.correction))
                self._coming.popleft()
                self.correction = self._coming[0]


class Recorder:
    """Wraps a policy and keeps what it chose: `bits()` is int32 [T, G] of the last forward pass."""

    def __init__(self, policy: PrecisionPolicy, groups: list[Group]):
        self.policy, self.groups = policy, groups
        self._chosen: list[Tensor] = []
        self._weights = torch.tensor([float(g.weights) for g in groups], dtype=torch.float64)
        width = max((len(g.bytes_at) for g in groups), default=0)
        rows = [list(g.bytes_at) + [0] * (width - len(g.bytes_at)) for g in groups]
        self._bytes = torch.tensor(rows, dtype=torch.float64)

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """The policy's choice, remembered."""
        bits = self.policy(group, x)
        if group.index == 0:
            self._chosen.clear()
        self._chosen.append(bits)
        return bits

    def take(self, bits: Tensor) -> None:
        """What a native step chose: int32 [T, G]."""
        self._chosen = list(bits.unbind(1))

    def bits(self) -> Tensor:
        """int32 [T, G] on the CPU."""
        return torch.stack(self._chosen, dim=1).cpu()

    def effective_bits(self) -> Tensor:
        """float64 [T]: mean width per token, weighted by matrix size."""
        return (self.bits().double() @ self._weights) / self._weights.sum()

    def weight_bytes(self) -> Tensor:
        """float64 [T]: planes, tables and scales read per token, the selector's own bytes included."""
        index = (self.bits() - self.groups[0].seed_bits).long().T  # [G, T]
        return self._bytes.gather(1, index).sum(0) + self.policy.extra_bytes


def make_policy(
    name: str, target_bits: float, decoder: Decoder, profile: CalibrationProfile | None, seed: int = 0
) -> PrecisionPolicy:
    """A policy by name at a target. Raises InputError for a target or a need that cannot be met."""
    if name not in POLICIES:
        raise InputError(f"unknown policy '{name}'. Choose one of: {', '.join(POLICIES)}.")
    first = decoder.groups[0]
    if first.dense:
        raise InputError(
            "this model is not quantised, so there are no bits to choose. Run dpllm quantize first."
        )
    high = resident_mean(decoder)
    if not first.seed_bits <= target_bits <= high + 1e-9:
        raise InputError(
            f"target {target_bits:g} bits is impossible: {first.seed_bits} (seed) to {high:g} "
            "(resident) can be read. Choose a target in between."
        )
    if name == "uniform":
        if target_bits != int(target_bits):
            raise InputError(
                f"policy 'uniform' reads whole bits, not {target_bits:g}. "
                f"Choose {int(target_bits)} or {int(target_bits) + 1}."
            )
        return StaticPolicy([min(int(target_bits), g.resident_bits) for g in decoder.groups], name="uniform")
    if name == "random":
        return RandomPolicy(target_bits, len(decoder.groups), seed)
    if profile is None:
        raise InputError(f"policy '{name}' needs a calibration profile. Run: dpllm calibrate OVERLAY")
    if name == "static":
        chosen = static_bits(capped_loss(profile, decoder), profile.weights, first.seed_bits, target_bits)
        # Beyond what is resident nothing is better, but where the budget is ample nothing is worse either.
        return StaticPolicy(
            [min(int(b), g.resident_bits) for b, g in zip(chosen, decoder.groups, strict=True)]
        )
    if name in ("dp-llm", "oracle-dp-llm"):
        return DPLLMPolicy(profile, decoder, target_bits, exact=name.startswith("oracle"))
    if name == "oracle-rate-distortion":
        return OracleRateDistortion(profile, decoder, target_bits)
    return RateDistortionPolicy(profile, decoder, target_bits)


def resident_mean(decoder: Decoder) -> float:
    """Mean width when every resident plane is read."""
    total = sum(g.weights for g in decoder.groups)
    return sum(g.resident_bits * g.weights for g in decoder.groups) / total


def capped_loss(profile: CalibrationProfile, decoder: Decoder) -> np.ndarray:
    """mean_loss float64 [G, B] with widths that are not resident made no better than the widest that is."""
    loss = profile.mean_loss[:, : max(g.resident_bits for g in decoder.groups) - profile.bits[0] + 1].copy()
    for row, g in zip(loss, decoder.groups, strict=True):
        row[g.resident_bits - g.seed_bits :] = row[g.resident_bits - g.seed_bits]
    return loss
