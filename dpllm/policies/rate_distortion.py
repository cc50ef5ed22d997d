"""Who decides how many planes a token reads at a group: one small class per policy.

A policy is a callable `select(group, x [T, K]) -> int32 [T]`. It sees each position once and in order, so a
batched pass and token-by-token decoding get the same widths; except where it is `stepwise`: then it also
learns from each finished step (`observe`), and only decoding step by step is the real thing.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from dpllm.calib.runtime.bits_correction import Correction
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.calib.runtime.threshold_rule import RateDistortionRule
from dpllm.calib.runtime.token_sensitivity import step_context
from dpllm.model.decoder import Decoder, Group
from dpllm.policies.base import Learner
from dpllm.policies.token_limit import Allowance, Pace, Prices

STEER = 0.05  # bits between the targets whose thresholds are kept; the correction does the rest


class RateDistortionPolicy(RateDistortionRule):
    """Reads one more plane wherever the expected loss it saves is worth lambda times its bytes.

    The expected saving is calibrated per group as a function of one cheap number, m_t * sum_k d_k x_k^2, and
    grows with it; so at a given lambda the rule is a few thresholds per group (calib/runtime/threshold_rule.py). m_t
    predicts
    how much this token cares, from its embedding and the previous step (`observe`); it also carries the
    correction that keeps effective bits on target (calib/runtime/bits_correction.py).
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

        allowance: what no token may exceed, whatever it is worth (dpllm/policies/token_limit.py); None: no limit.
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
