"""Who decides how many planes a token reads at a group: one small class per policy.

A policy is a callable `select(group, x [T, K]) -> int32 [T]`. It sees each position once and in order, so a
batched pass and token-by-token decoding get the same widths.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dpllm.calib.allocation import static_bits
from dpllm.calib.profile import CalibrationProfile
from dpllm.decoder import Decoder, Group
from dpllm.kernels.errors import InputError

POLICIES = ("uniform", "static", "random", "rate-distortion")


class PrecisionPolicy(Protocol):
    """Chooses widths. `extra_bytes` is what choosing itself reads per token."""

    name: str
    extra_bytes: int

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """Bits of each token at this group. x: [T, K], the group's input. Returns int32 [T]."""
        ...


class StaticPolicy:
    """One width per group, the same for every token. The uniform policy is the case of equal widths."""

    extra_bytes = 0

    def __init__(self, bits: list[int], name: str = "static"):
        self.bits, self.name = bits, name

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """The group's width, T times."""
        return torch.full((len(x),), self.bits[group.index], dtype=torch.int32, device=x.device)


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
        return torch.as_tensor(self.low + upper, dtype=torch.int32, device=x.device)


class RateDistortionPolicy:
    """Reads one more plane wherever the expected loss it saves is worth lambda times its bytes.

    The expected saving is calibrated per group as a function of one cheap number, sum_k d_k x_k^2, and
    grows with it; so at a given lambda the rule is a few thresholds per group (CalibrationProfile).
    Retargeting rewrites the thresholds in place, between any two tokens.
    """

    name = "rate-distortion"

    def __init__(self, profile: CalibrationProfile, decoder: Decoder, target_bits: float):
        self.profile = profile
        self.extra_bytes = profile.estimator_bytes()
        self.select = decoder.backend.select
        self.diagonals = [torch.from_numpy(d).to(decoder.device) for d in profile.diagonals]
        self.max_bits = min(
            profile.bits[1], decoder.groups[0].resident_bits
        )  # planes beyond are not resident
        steps = self.max_bits - profile.bits[0]
        self.thresholds = torch.empty(len(self.diagonals), steps, device=decoder.device)
        self.set_target(target_bits)

    def set_target(self, target_bits: float) -> None:
        """Moves lambda to where calibration measured these effective bits."""
        if self.max_bits > self.profile.bits[0]:  # else only the seed is resident: nothing to choose
            self.set_lambda(self.profile.lambda_for(target_bits, self.max_bits))

    def set_lambda(self, lam: float) -> None:
        """Rewrites the thresholds for this price of a byte."""
        self.thresholds.copy_(torch.from_numpy(self.profile.thresholds(lam, self.max_bits)))

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """Seed width plus one bit per threshold the group's signal exceeds."""
        g = group.index
        return self.select(x, self.diagonals[g], self.thresholds[g], group.seed_bits)


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
    if not first.seed_bits <= target_bits <= first.resident_bits:
        raise InputError(
            f"target {target_bits:g} bits is impossible: {first.seed_bits} (seed) to {first.resident_bits} "
            "(resident) can be read. Choose a target in between."
        )
    if name == "uniform":
        if target_bits != int(target_bits):
            raise InputError(
                f"policy 'uniform' reads whole bits, not {target_bits:g}. "
                f"Choose {int(target_bits)} or {int(target_bits) + 1}."
            )
        return StaticPolicy([int(target_bits)] * len(decoder.groups), name="uniform")
    if name == "random":
        return RandomPolicy(target_bits, len(decoder.groups), seed)
    if profile is None:
        raise InputError(f"policy '{name}' needs a calibration profile. Run: dpllm calibrate OVERLAY")
    if name == "static":
        widths = first.resident_bits - first.seed_bits + 1
        chosen = static_bits(profile.mean_loss[:, :widths], profile.weights, first.seed_bits, target_bits)
        return StaticPolicy([int(b) for b in chosen])
    return RateDistortionPolicy(profile, decoder, target_bits)
