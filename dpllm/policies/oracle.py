"""What rate-distortion would do if it knew every width's exact output error: the ceiling for its estimator."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.calib.runtime.bits_correction import Correction
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.calib.runtime.token_sensitivity import TokenProbe, step_context
from dpllm.model.decoder import Decoder, Group


class OracleRateDistortion:
    """The width of least m_t * sum_n saliency_n ((W_max - W_b) x)_n^2 + lambda * bytes, computed exactly.

    It reads every plane to decide, so its bytes say nothing; only its quality at equal bits does.
    """

    name = "oracle-rate-distortion"
    extra_bytes = 0
    stepwise = True

    def __init__(
        self, profile: CalibrationProfile, decoder: Decoder, target_bits: float, corrected: bool = True
    ):
        if "oracle.bits" not in profile.extra:
            raise InputError(
                "this profile holds nothing for policy 'oracle-rate-distortion'. Run: dpllm calibrate OVERLAY"
            )
        device = decoder.device
        self._dequantize = decoder.backend.dequantize
        self.seed_bits = profile.bits[0]
        self.probe = TokenProbe.of(profile.probe, profile.context, device)
        names = [f"oracle.saliency.{g}" for g in range(len(decoder.groups))]
        self.saliency = [torch.from_numpy(profile.extra[n]).float().to(device) for n in names]
        low, high = profile.extra["oracle.bits"][[0, -1]]
        wanted = min(max(target_bits, float(low)), float(high))
        log2_lambda = np.interp(wanted, profile.extra["oracle.bits"], profile.extra["oracle.log2_lambda"])
        cost = torch.from_numpy(profile.cost).double().to(device)
        self.price = (2.0**log2_lambda * cost).float()
        self.controller, self.corrected = Correction(target_bits), corrected
        self.correction: float | Tensor = 0.0
        self.context: Tensor | None = None
        self._total = float(profile.weights.sum())
        self._used: Tensor | None = None  # float64 [R], as in RateDistortionPolicy
        self._multiplier = torch.ones(1)

    def reading_from(self, decoder: Decoder) -> OracleRateDistortion:
        """A copy that reads its matrices from another view of the same decoder and has learned nothing yet."""
        own = copy.copy(self)
        own._dequantize = decoder.backend.dequantize
        own.reset()
        return own

    def reset(self) -> None:
        """A new text: no previous step, no correction."""
        self.context = self._used = None
        self.controller, self.correction = Correction(self.controller.target_bits), 0.0

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """Bits int32 [T] of each row of x [T, K]."""
        if group.index == 0:
            self._multiplier = self.probe.multiplier(x, self.context, self.correction)
            self._used = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        widths = range(self.seed_bits, group.resident_bits + 1)
        full = x @ self._dequantize(group.weight, widths[-1], x.dtype).T
        loss = torch.zeros(len(x), len(widths), device=x.device)
        for i, width in enumerate(widths[:-1]):
            error = (full - x @ self._dequantize(group.weight, width, x.dtype).T).float()
            loss[:, i] = (error**2) @ self.saliency[group.index]
        total = loss * self._multiplier[:, None] + self.price[group.index, : len(widths)]
        bits = self.seed_bits + total.argmin(dim=1).to(torch.int32)
        assert self._used is not None, "a step begins with group 0"
        self._used = self._used + bits.double() * group.weights
        return bits

    def observe(self, logits: Tensor, tokens: Tensor) -> None:
        """After a decode step, as RateDistortionPolicy.observe."""
        previous = None if self.context is None else self.context[: len(tokens)]
        self.context = step_context(logits, tokens, previous)
        if self.corrected and self._used is not None:
            self.controller.update(self._used[: len(tokens)] / self._total)
            self.correction, self._used = self.controller.value, None
