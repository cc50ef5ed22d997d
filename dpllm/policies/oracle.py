"""What rate-distortion would do if it knew every width's exact output error: the ceiling for its estimator."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.calib.runtime.bits_correction import RATE, Correction
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.calib.runtime.token_sensitivity import TokenProbe, step_context
from dpllm.model.decoder import Decoder, Group
from dpllm.policies.base import PrecisionPolicy, TextPolicy


class OracleRateDistortion(PrecisionPolicy):
    """The width of least m_t * sum_n saliency_n ((W_max - W_b) x)_n^2 + lambda * bytes, computed exactly.

    It reads every plane to decide, so its bytes say nothing; only its quality at equal bits does.
    """

    name = "oracle-rate-distortion"
    stepwise = True

    def __init__(
        self, profile: CalibrationProfile, decoder: Decoder, target_bits: float, corrected: bool = True
    ):
        if "oracle.bits" not in profile.extra:
            raise InputError(
                "this profile holds nothing for policy 'oracle-rate-distortion'. Run: dpllm calibrate OVERLAY"
            )
        device = decoder.device
        self.dequantize = decoder.backend.dequantize
        self.seed_bits, self.target_bits = profile.bits[0], target_bits
        self.correction_rate = RATE if corrected else 0.0
        self.probe = TokenProbe.of(profile.probe, profile.context, device)
        names = [f"oracle.saliency.{g}" for g in range(len(decoder.groups))]
        self.saliency = [torch.from_numpy(profile.extra[n]).float().to(device) for n in names]
        low, high = profile.extra["oracle.bits"][[0, -1]]
        wanted = min(max(target_bits, float(low)), float(high))
        log2_lambda = np.interp(wanted, profile.extra["oracle.bits"], profile.extra["oracle.log2_lambda"])
        cost = torch.from_numpy(profile.cost).double().to(device)
        self.price = (2.0**log2_lambda * cost).float()

    def reading_from(self, decoder: Decoder) -> OracleRateDistortion:
        """A copy that reads its matrices from another view of the same decoder."""
        own = copy.copy(self)
        own.dequantize = decoder.backend.dequantize
        return own

    def begin_text(self) -> OracleText:
        """A text without a previous step and without a correction."""
        return OracleText(self)


class OracleText(TextPolicy):
    """One text decoded with the oracle."""

    name = OracleRateDistortion.name
    stepwise = True

    def __init__(self, policy: OracleRateDistortion):
        self.policy = policy
        self.bits_correction = self._control = Correction(policy.target_bits, policy.correction_rate)
        self._multiplier = torch.ones(1)

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """Bits int32 [T] of each row of x [T, K]."""
        policy = self.policy
        if group.index == 0:
            self._multiplier = policy.probe.multiplier(x, self.previous, self.correction)
        widths = range(policy.seed_bits, group.resident_bits + 1)
        dequantize = policy.dequantize
        full = x @ dequantize(group.weight, widths[-1], x.dtype).T
        loss = torch.zeros(len(x), len(widths), device=x.device)
        for i, width in enumerate(widths[:-1]):
            error = (full - x @ dequantize(group.weight, width, x.dtype).T).float()
            loss[:, i] = (error**2) @ policy.saliency[group.index]
        total = loss * self._multiplier[:, None] + policy.price[group.index, : len(widths)]
        return policy.seed_bits + total.argmin(dim=1).to(torch.int32)

    def learn(self, logits: Tensor, tokens: Tensor, read_bits: float | Tensor | None = None) -> None:
        """See TextPolicy."""
        previous = None if self.previous is None else self.previous[: len(tokens)]
        self.previous = step_context(logits, tokens, previous)
        if read_bits is not None:
            self._control.update(read_bits)
            self.correction = self._control.value
