"""The rate-distortion policy: a plane is read where the loss that it saves is worth its bytes.

The policy holds what all texts share: the rule, thresholds and paces of the targets. Each text has a
`RateDistortionText` of its own.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from dpllm.calib.runtime.bits_correction import RATE, Correction
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.calib.runtime.threshold_rule import RateDistortionRule, ThresholdText
from dpllm.calib.runtime.token_sensitivity import step_context
from dpllm.model.decoder import Decoder, Group
from dpllm.policies.base import PrecisionPolicy, TextPolicy
from dpllm.policies.token_limit import SpendingPace, TokenLimit, WidthCosts

STEER = 0.05  # bits between the targets whose thresholds are kept; the correction does the rest


class RateDistortionPolicy(PrecisionPolicy):
    """Reads one more plane wherever the expected loss that the plane saves is worth lambda times its bytes.

    The expected saving is calibrated per group as a function of one cheap number, m_t * sum_k d_k x_k^2, and grows with
    it; so at a given lambda the rule is a few thresholds per group (calib/runtime/threshold_rule.py). m_t predicts how
    much this token cares, from its embedding and the previous step. m_t also carries the correction that keeps
    effective bits on target (calib/runtime/bits_correction.py), unless `corrected` is False.
    """

    name = "rate-distortion"
    stepwise = True

    def __init__(
        self, profile: CalibrationProfile, decoder: Decoder, target_bits: float, corrected: bool = True
    ):
        planes = np.asarray([g.resident_bits for g in decoder.groups])
        self.rule = RateDistortionRule(profile, decoder.backend.select, decoder.device, planes)
        self.profile, self.target_bits = profile, target_bits
        self.correction_rate = RATE if corrected else 0.0
        self.extra_bytes = profile.estimator_bytes()
        # With nothing but the seed planes resident there is nothing to choose.
        self.chooses = bool(planes.max() > profile.bits[0])
        self.lam = profile.lambda_for(target_bits, self.rule.planes) if self.chooses else 1.0
        nothing = torch.empty(len(planes), 0, device=decoder.device)
        self.thresholds = self.rule.thresholds_at(self.lam) if self.chooses else nothing
        self._near: dict[float, Tensor] = {}  # thresholds by target, in steps of STEER
        self._paces: dict[tuple[float, WidthCosts], SpendingPace] = {}  # by target and costs

    def begin_text(self) -> RateDistortionText:
        """A text without a previous step and without a correction: the same text gets the same widths again."""
        return RateDistortionText(self)

    def thresholds_near(self, target_bits: float) -> Tensor:
        """Thresholds float32 [G, steps] of the nearest target that is a multiple of STEER."""
        near = self._nearest(target_bits)
        if near not in self._near:
            low, high = self.profile.target_range(self.rule.planes)
            lam = self.profile.lambda_for(min(max(near, low), high), self.rule.planes)
            self._near[near] = self.rule.thresholds_at(lam)
        return self._near[near]

    def pace_near(self, target_bits: float, width_costs: WidthCosts) -> SpendingPace:
        """The pace at which a token of the nearest target spends what it may."""
        key = self._nearest(target_bits), width_costs
        if key not in self._paces:
            self._paces[key] = SpendingPace.of(
                width_costs, self.profile, self.thresholds_near(target_bits).cpu().numpy()
            )
        return self._paces[key]

    @staticmethod
    def _nearest(target_bits: float) -> float:
        return round(target_bits / STEER) * STEER


class RateDistortionText(ThresholdText, TextPolicy):  # type: ignore[misc]  # rule and thresholds: never None
    """One text decoded with a rate-distortion policy: the previous step, the correction, and the limit per token."""

    name = RateDistortionPolicy.name
    stepwise = True

    def __init__(self, policy: RateDistortionPolicy):
        super().__init__(policy.rule, policy.thresholds)
        self.policy, self.extra_bytes = policy, policy.extra_bytes
        self.bits_correction = self._control = Correction(policy.target_bits, policy.correction_rate)
        self.lag = 0
        self._coming: deque[float] = deque()  # corrections of the next tokens, of a delayed text
        self._budget_left: Tensor | None = None  # int64 [R], what the tokens under way may still spend

    def steer(self, target_bits: float, limit: TokenLimit | None = None) -> None:
        """Moves the target between two tokens; the correction continues from its value.

        limit: the most that a token may cost, however much it is worth (dpllm/policies/token_limit.py); None for no
        limit.
        """
        self._control.target_bits, self.limit = target_bits, limit
        if not self.policy.chooses:
            return
        self.thresholds = self.policy.thresholds_near(target_bits)
        if limit is not None:
            self.pace = self.policy.pace_near(target_bits, limit.width_costs)

    def delay(self, tokens: int) -> None:
        """Corrects each token by what was known `tokens` tokens before, and leaves out the previous step's features.

        A token's widths then depend on nothing that a pass over up to `tokens` tokens would still have to find out, so
        they do not depend on how tokens are grouped into passes. To be called before the first token.
        """
        self.lag, self._coming = tokens, deque([0.0] * tokens)

    def corrections(self, count: int) -> list[float]:
        """The corrections of the next `count` tokens; more than one only of a text that is delayed by as many."""
        return list(islice(self._coming, count)) if self.lag else [float(self.correction)]

    def passes_limited_to_one(self) -> str | None:
        """See TextPolicy. A native pass over several tokens needs groups that decide by their own inputs."""
        if self.rule.own_inputs:
            return None
        return "this profile's asynchronous estimates are made one token at a time"

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """Seed width plus one bit for each threshold that the group's signal exceeds, int32 [R] for x [R, K]."""
        bits = super().__call__(group, x)
        return bits if self.limit is None or self.pace is None else self._afford(group, bits, self.limit)

    def multiplier_at(self, group: int) -> Tensor:
        """The multiplier float32 [R], held to the pace at which the token may spend."""
        m = self.multiplier
        if self.limit is None or self.pace is None:
            return m
        if group == 0 or self._budget_left is None:
            self._budget_left = torch.full(
                (len(m),), self.limit.beyond_seed, dtype=torch.int64, device=m.device
            )
        return torch.minimum(m, self.pace.largest_multiplier(self._budget_left, group))

    def _afford(self, group: Group, bits: Tensor, limit: TokenLimit) -> Tensor:
        """The widths, or lower ones where the token has spent its limit."""
        assert self._budget_left is not None
        extra = limit.width_costs.extra[group.index].to(bits.device)  # [steps], ascending
        affordable = group.seed_bits + (extra[None] <= self._budget_left[:, None]).sum(1)
        bits = torch.minimum(bits, affordable.to(bits.dtype))
        step = (bits - group.seed_bits).long()
        self._budget_left = self._budget_left - torch.where(step > 0, extra[(step - 1).clamp(min=0)], 0)
        return bits

    def learn(self, logits: Tensor, tokens: Tensor, read_bits: float | Tensor | None = None) -> None:
        """See TextPolicy."""
        if not self.lag:
            previous = None if self.previous is None else self.previous[: len(tokens)]
            self.previous = step_context(logits, tokens.to(logits.device), previous)
        if read_bits is None:
            return
        self._control.update(read_bits)
        if self.lag:
            self._coming.append(float(self._control.value))
            self._coming.popleft()
            self.correction = self._coming[0]
        else:
            self.correction = self._control.value
