"""The policies that only quality_vs_bits.py measures: other systems' allocations and ablations of ours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bench.quality.other_allocations import WeightGradients, equal_loss_bits, hawq_losses, llm_mq_losses
from dpllm.calib.allocation import static_bits
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.model.decoder import Decoder
from dpllm.policies.base import PrecisionPolicy
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.make import make_policy
from dpllm.policies.rate_distortion import RateDistortionPolicy, RateDistortionText


class _TextWithoutContext(RateDistortionText):
    """The text of `_WithoutContext`."""

    def learn(
        self, logits: torch.Tensor, tokens: torch.Tensor, read_bits: float | torch.Tensor | None = None
    ) -> None:
        super().learn(logits, tokens, read_bits)
        self.previous = None


class _WithoutContext(RateDistortionPolicy):
    """The multiplier from the embedding alone: nothing is learned from the previous step but the correction."""

    def begin_text(self) -> RateDistortionText:
        return _TextWithoutContext(self)


def bench_policy(
    name: str, target: float, decoder: Decoder, profile: CalibrationProfile, gradients: Callable[[], WeightGradients]
) -> PrecisionPolicy:  # fmt: skip
    """By name. gradients: asked for by the allocations that need gradients of the weights."""
    if name == "rate-distortion, uncorrected":
        return RateDistortionPolicy(profile, decoder, target, corrected=False)
    if name == "rate-distortion, two widths":
        return two_widths(profile, decoder, target)
    if name == "rate-distortion, no context":
        return _WithoutContext(profile, decoder, target)
    losses = {"hawq-v2-like": hawq_losses, "llm-mq-like": llm_mq_losses}
    if name in losses:
        table = losses[name](decoder, gradients())
        bits = static_bits(table, profile.weights, profile.bits[0], target)
    elif name == "equal loss (BAQ)":
        bits = equal_loss_bits(profile.mean_loss, profile.weights, profile.bits[0], target)
    else:
        return make_policy(name, target, decoder, profile)
    return StaticPolicy([int(b) for b in bits], name=name)


def two_widths(profile: CalibrationProfile, decoder: Decoder, target: float) -> RateDistortionPolicy:
    """Rate-distortion that chooses between two widths per group only: those around its mean at this target."""
    policy = RateDistortionPolicy(profile, decoder, target)
    bins = profile.gain.shape[2]
    edges = np.concatenate([np.full((len(profile.gain), 1), -np.inf), profile.knots], axis=1)
    limits = policy.thresholds.numpy()  # each is one of the edges, in float32
    beyond = edges.astype(np.float32)[:, :, None] >= limits[:, None, :]
    taken = beyond.sum(axis=1) / bins  # [G, steps], share of bins beyond each step
    low = np.floor(taken.sum(axis=1) + 1e-9).astype(int)
    for g, step in enumerate(low):
        policy.thresholds[g, :step] = -np.inf
        policy.thresholds[g, step + 1 :] = np.inf
        # The one threshold left gives the group the same mean width as before.
        share = min(max(taken[g].sum() - step, 0.0), 1.0)
        if step < policy.thresholds.shape[1]:
            at = round((1 - share) * bins)
            policy.thresholds[g, step] = edges[g, at] if at < bins else np.inf
    return policy
