"""The rate-distortion rule: at one lambda, a few thresholds per group. Calibration and the policy share the rule.

A rule is immutable and serves any number of texts. Everything that changes from token to token is kept by a
`ThresholdText`, one for each text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpllm.calib.runtime.profile import CalibrationProfile, Resident
from dpllm.calib.runtime.token_sensitivity import TokenProbe


class ThresholdRule:
    """Bits = seed width + number of thresholds that m_t * sum_k d_k x_k^2 exceeds.

    diagonals: for each group g, d float16 [K]. source: for each group, the number of the group whose input x its signal
    is computed from. probe: computes m_t of each token from the input of group 0; None means m_t = 1.
    """

    def __init__(self, diagonals: list[Tensor], source: list[int], probe: TokenProbe | None = None):
        self.diagonals, self.source, self.probe = diagonals, source, probe
        self.kept = frozenset(s for g, s in enumerate(source) if s != g)  # inputs that later groups need

    @property
    def own_inputs(self) -> bool:
        """Whether every group decides by its own input, as a native decode step requires."""
        return not self.kept


class RateDistortionRule(ThresholdRule):
    """The rule of a calibration profile, for the planes that are resident.

    select: the kernel that counts exceeded thresholds (kernels/reference.py: select).
    """

    def __init__(
        self,
        profile: CalibrationProfile,
        select: Callable[..., Tensor],
        device: Any,
        resident: Resident = None,
    ):
        super().__init__(
            [torch.from_numpy(d).to(device) for d in profile.diagonals],
            profile.source.tolist(),
            TokenProbe.of(profile.probe, profile.context, device),
        )
        self.profile, self.select, self.device = profile, select, device
        self.planes = profile.planes(resident)

    def thresholds_at(self, lam: float) -> Tensor:
        """Thresholds float32 [G, steps] at which a plane is worth lambda times its bytes."""
        return torch.from_numpy(self.profile.thresholds(lam, self.planes)).to(self.device)


class ThresholdText:
    """The state of one text whose widths a rule chooses.

    thresholds: float32 [G, steps], never written to. previous: features of the step before, float32 [R, 3] for R tokens
    that are decoded together, or None at the beginning of a text. correction: added to the exponent of m_t, a number or
    [R]. multiplier: m_t of the tokens of the last pass, float32 [R].
    """

    def __init__(self, rule: RateDistortionRule, thresholds: Tensor):
        self.rule, self.thresholds = rule, thresholds
        self.previous: Tensor | None = None
        self.correction: float | Tensor = 0.0
        self.multiplier = torch.ones(1, device=rule.device)
        self._inputs: dict[int, Tensor] = {}  # inputs that a later group's signal is computed from

    def __call__(self, group: Any, x: Tensor) -> Tensor:
        """Bits int32 [R] of each row of x [R, K], the input of a group. Groups must be asked in their order."""
        g, rule = group.index, self.rule
        if g == 0:
            assert rule.probe is not None
            self._inputs.clear()
            self.multiplier = rule.probe.multiplier(x, self.previous, self.correction)
        if g in rule.kept:
            self._inputs[g] = x
        read = x if rule.source[g] == g else self._inputs[rule.source[g]]
        # The kernel squares its input, so the multiplier enters by its root.
        root = self.multiplier_at(g).sqrt()[:, None]
        return rule.select(read.float() * root, rule.diagonals[g], self.thresholds[g], group.seed_bits)

    def multiplier_at(self, group: int) -> Tensor:
        """The multiplier float32 [R] that a group uses."""
        return self.multiplier


def stale_sources(layers: Any) -> tuple[list[int], list[Tensor | None]]:
    """Which input an asynchronous estimate reads for each group, and how to carry it over.

    As in DP-LLM (arXiv:2508.06041): q/k/v read what the previous layer's gate/up read, gate/up what their own
    layer's q/k/v read: the residual one sub-block earlier, normalised anew. The first q/k/v, o and down read
    their own input. Returns (source [G], ratio: per group [K], stale input * ratio stands for the fresh one,
    None where it is fresh).
    """
    source: list[int] = []
    ratio: list[Tensor | None] = []
    last: Any = None  # (group whose input was the last normalised residual, its norm's weight)
    for layer in layers:
        for groups, weight in ((layer.qkv, layer.input_norm), ([layer.o], None), (layer.gate_up, layer.post_norm),
                               ([layer.down], None)):  # fmt: skip
            for g in groups:
                stale = weight is not None and last is not None
                source.append(last[0] if stale else g.index)
                ratio.append(_ratio(weight, last[1]) if stale else None)
            if weight is not None:
                last = (groups[-1].index, weight)
    return source, ratio


def _ratio(fresh: Any, stale: Any) -> Tensor:
    """New norm weight over old; 0 where the old one let nothing through."""
    return torch.where(stale != 0, fresh / torch.where(stale != 0, stale, 1.0), 0.0).float()
