"""Makes a policy from its name and a target."""

from __future__ import annotations

import numpy as np

from dpllm.base.errors import InputError
from dpllm.calib.allocation import static_bits
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.model.decoder import Decoder
from dpllm.policies.base import PrecisionPolicy
from dpllm.policies.dp_llm import DPLLMPolicy
from dpllm.policies.fixed import RandomPolicy, StaticPolicy
from dpllm.policies.oracle import OracleRateDistortion
from dpllm.policies.rate_distortion import RateDistortionPolicy

POLICIES = (
    "uniform", "static", "random", "dp-llm", "rate-distortion", "oracle-dp-llm", "oracle-rate-distortion",
)  # fmt: skip


def make_policy(
    name: str, target_bits: float, decoder: Decoder, profile: CalibrationProfile | None, seed: int = 0
) -> PrecisionPolicy:
    """A policy by name at a target. Raises InputError for a target or a need that cannot be met."""
    if name not in POLICIES:
        raise InputError(f"unknown policy '{name}'. Choose one of: {', '.join(POLICIES)}.")
    first = decoder.groups[0]
    if first.dense:
        raise InputError(
            "this model is not quantised, so there are no bits to choose. Run: dpllm quantize MODEL OUT"
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
