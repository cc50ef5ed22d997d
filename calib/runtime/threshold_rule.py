"""The rate-distortion rule at one lambda: thresholds on a signal. Shared by calibration and the policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpllm.calib.runtime.profile import CalibrationProfile, Resident
from dpllm.calib.runtime.token_sensitivity import TokenProbe


class RateDistortionRule:
    """Bits = seed + number of thresholds exceeded by m_t * sum_k d_k x_k^2, x the input of group `source`.

    `multiplier` (float32 [R], of the last token) is computed once a token from group 0's input and `context`.
    `diagonals[g]` float16 [K], `source[g]`, `thresholds` float32 [G, steps] are what a kernel needs.
    """

    def __init__(
        self,
        profile: CalibrationProfile,
        select: Callable[..., Tensor],
        device: Any,
        resident: Resident = None,
    ):
        self.profile, self.select = profile, select
        self.planes = profile.planes(resident)
        self.diagonals = [torch.from_numpy(d).to(device) for d in profile.diagonals]
        self.probe = TokenProbe.of(profile.probe, profile.context, device)
        self.source = profile.source.tolist()
        steps = int(self.planes.max()) - profile.bits[0]
        self.thresholds = torch.empty(len(self.diagonals), steps, device=device)
        self.context: Tensor | None = None  # float32 [R, 3] of the tokens about to be decoded
        self.correction: float | Tensor = 0.0
        self.multiplier = torch.ones(1, device=device)
        self._inputs: dict[int, Tensor] = {}  # inputs that a later group's signal is computed from
        self._kept = {s for g, s in enumerate(self.source) if s != g}

    def set_lambda(self, lam: float) -> None:
        """Rewrites the thresholds, in place, for this price of a byte."""
        self.thresholds.copy_(torch.from_numpy(self.profile.thresholds(lam, self.planes)))

    def __call__(self, group: Any, x: Tensor) -> Tensor:
        """Bits int32 [R] of each row of x [R, K], the group's input."""
        g = group.index
        if g == 0:
            self._inputs.clear()
            self.multiplier = self.probe.multiplier(x, self.context, self.correction)
        if g in self._kept:
            self._inputs[g] = x
        read = x if self.source[g] == g else self._inputs[self.source[g]]
        # The kernel squares its input, so the multiplier enters by its root.
        root = self.multiplier_at(g).sqrt()[:, None]
        return self.select(read.float() * root, self.diagonals[g], self.thresholds[g], group.seed_bits)

    def multiplier_at(self, group: int) -> Tensor:
        """float32 [R]: the multiplier of the tokens under way, as it counts at a group."""
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
