"""Policies whose rule is a comparison of one weighted square per group with thresholds."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class ThresholdRule(Protocol):
    """A policy that reads the seed width plus one plane for each threshold [G, steps] that the weighted square of the
    group's input, sum_k diagonals[g][k] x_k^2, exceeds. Rewriting the thresholds in place retargets it."""

    diagonals: list[Tensor]
    thresholds: Tensor


def own_inputs(policy: ThresholdRule) -> bool:
    """Whether every group decides by its own input: estimates from older ones are left to the policy itself."""
    return all(source == g for g, source in enumerate(getattr(policy, "source", ())))
