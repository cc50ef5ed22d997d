"""DP-LLM's policy (arXiv:2508.06041) from what calib/dp_llm.py calibrated: two widths, one threshold."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.calib.dp_llm import PROJECTION
from dpllm.calib.dp_llm_averages import lower_width
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.model.decoder import Decoder, Group
from dpllm.policies.base import PrecisionPolicy, TextPolicy

NEAR = (
    1e-5  # a quantile may be a value that occurs again and again; the last bit of a sum must not decide on it
)
CERTAIN = 0.01  # shares of the wider width below this, or above one less this, are taken as never and always


class DPLLMPolicy(PrecisionPolicy):
    """Each group reads l or l + 1 planes: l + 1 where the estimated ||(W_{l+1} - W_l) x|| exceeds a threshold.

    exact: compare the exact error instead of the estimate (the oracle of the same rule).
    """

    def __init__(
        self, profile: CalibrationProfile, decoder: Decoder, target_bits: float, exact: bool = False
    ):
        self.name = "oracle-dp-llm" if exact else "dp-llm"
        row = _row(profile, decoder, target_bits)
        arrays, device = profile.extra, decoder.device
        seed, average, caps = profile.bits[0], arrays["dp-llm.averages"][row], arrays["dp-llm.caps"][row]
        self.low = [lower_width(p, seed, int(c)) for p, c in zip(average, caps, strict=True)]
        share = average - np.asarray(self.low)  # of tokens that take the wider width
        self.fixed = [bool(c == seed) for c in caps]
        self.exact = exact
        self.source = arrays["dp-llm.source"].tolist()
        self.kept = frozenset(s for g, s in enumerate(self.source) if s != g)
        steps = [low - seed for low in self.low]
        stored = arrays["dp-llm.exact" if exact else "dp-llm.quantiles"]
        self.thresholds = [threshold(stored[g, s], share[g]) for g, s in enumerate(steps)]
        self.lines = [arrays["dp-llm.line"][g, s].tolist() for g, s in enumerate(steps)]
        self.projections: list[Tensor | None] = [None] * len(steps)
        for g, s in enumerate(steps):
            if arrays["dp-llm.kind"][g, s] == PROJECTION and not self.fixed[g] and not exact:
                self.projections[g] = torch.from_numpy(arrays[f"dp-llm.projection.{g}.{s}"]).to(device)
        self.backend = decoder.backend
        self._delta: dict[int, Tensor] = {}
        self.extra_bytes = sum(
            8 if p is None else p.numel() * p.element_size()
            for p, fixed in zip(self.projections, self.fixed, strict=True)
            if not fixed
        )

    def begin_text(self) -> DPLLMText:
        """The state of one text: the inputs that later groups are estimated from."""
        return DPLLMText(self)

    def error_matrix(self, group: Group) -> Tensor:
        """W_{l+1} - W_l of a group, float32 [N, K]."""
        g = group.index
        if g not in self._delta:
            wide = self.backend.dequantize(group.weight, self.low[g] + 1)
            self._delta[g] = wide - self.backend.dequantize(group.weight, self.low[g])
        return self._delta[g]


class DPLLMText(TextPolicy):
    """One text decoded with DP-LLM's policy."""

    def __init__(self, policy: DPLLMPolicy):
        self.policy, self.name, self.extra_bytes = policy, policy.name, policy.extra_bytes
        self.estimates = None if policy.exact else policy
        self._inputs: dict[int, Tensor] = {}

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """l or l + 1 for each row of x [T, K], int32 [T]."""
        g, policy = group.index, self.policy
        if g == 0:
            self._inputs.clear()
        if g in policy.kept:
            self._inputs[g] = x
        if policy.fixed[g]:
            return torch.full((len(x),), policy.low[g], dtype=torch.int32, device=x.device)
        return policy.low[g] + (self.estimate(group, x) > policy.thresholds[g]).to(torch.int32)

    def estimate(self, group: Group, x: Tensor) -> Tensor:
        """The number that is compared with the threshold, float32 [T]."""
        g, policy = group.index, self.policy
        if policy.exact:
            return (x.float() @ policy.error_matrix(group).T).norm(dim=1)
        read = (x if policy.source[g] == g else self._inputs[policy.source[g]]).float()
        if (projection := policy.projections[g]) is not None:
            return (read @ projection.float().T).norm(dim=1)
        slope, intercept = policy.lines[g]
        return slope * read.norm(dim=1) + intercept


def threshold(quantiles: np.ndarray, share: float) -> float:
    """The estimate that a given share of tokens exceeds, from a stored distribution."""
    if share < CERTAIN:
        return float("inf")
    if share > 1 - CERTAIN:
        return float("-inf")
    found = np.interp(1 - share, np.linspace(0, 1, len(quantiles)), quantiles)
    return float(found * (1 + NEAR))


def _row(profile: CalibrationProfile, decoder: Decoder, target_bits: float) -> int:
    """The stored averages for this target, under the planes that are resident."""
    if "dp-llm.targets" not in profile.extra:
        raise InputError(
            "this profile holds nothing for policy 'dp-llm'. Run: dpllm calibrate OVERLAY --dp-llm --targets "
            f"{target_bits:g}"
        )
    targets, caps = profile.extra["dp-llm.targets"], profile.extra["dp-llm.caps"]
    resident = np.asarray([g.resident_bits for g in decoder.groups])
    fits = np.isclose(targets, target_bits) & (caps <= resident).all(axis=1)
    if not fits.any():
        known = ", ".join(sorted({f"{t:g}" for t in targets}))
        raise InputError(
            f"policy 'dp-llm' was not calibrated for {target_bits:g} bits with these resident planes (targets: "
            f"{known}). Run: dpllm calibrate OVERLAY --dp-llm --targets {target_bits:g}"
        )
    # Of several budgets that fit, the one that uses most of what is resident.
    total = np.where(fits, (caps * profile.weights).sum(axis=1), -1)
    return int(total.argmax())
