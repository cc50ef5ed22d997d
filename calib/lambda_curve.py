"""Effective bits as a function of lambda, computed from measured signals."""

from __future__ import annotations

import numpy as np

from dpllm.calib.runtime.profile import CalibrationProfile, Resident

GRID = 192  # points of the stored lambda curve


def stored_bits(
    profile: CalibrationProfile, ranked: np.ndarray, lam: float, resident: Resident = None
) -> float:
    """Effective bits that the policy would choose for measured signals at this lambda.

    ranked: [G, T], each group's signals in ascending order.
    """
    thresholds = profile.thresholds(lam, resident)
    tokens = ranked.shape[1]
    above = [tokens - np.searchsorted(r, t, side="right") for r, t in zip(ranked, thresholds, strict=True)]
    steps = np.asarray(above).sum(axis=1) / tokens
    return float(profile.bits[0] + (steps * profile.weights).sum() / profile.weights.sum())


def solve(profile: CalibrationProfile, ranked: np.ndarray, target: float, resident: Resident = None) -> float:
    """log2 of the lambda at which `stored_bits` is the target, by bisection: bits fall as lambda rises."""
    low, high = -200.0, 100.0
    for _ in range(48):
        middle = (low + high) / 2
        above = stored_bits(profile, ranked, 2.0**middle, resident) > target
        low, high = (middle, high) if above else (low, middle)
    return (low + high) / 2


def dense_curve(
    profile: CalibrationProfile, ranked: np.ndarray, planes: np.ndarray, at: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The curve (log2 lambda [C], bits [C]) with `planes` int64 [G] resident.

    shift: what decoding used more than the measured signals predict, at bits `at`; it is interpolated between them.
    """
    low = float(profile.bits[0])
    high = float((planes * profile.weights).sum() / profile.weights.sum())
    ends = [solve(profile, ranked, t, planes) for t in (low + 0.01, high - 0.01)]
    grid = np.linspace(ends[0], ends[1], GRID)
    stored = np.asarray([stored_bits(profile, ranked, 2.0**g, planes) for g in grid])
    fade = np.minimum(1.0, (high - stored) * 4)  # near the maximum, bits cannot shift
    bits = np.clip(stored + np.interp(stored, at, shift) * fade, low, high)
    # Beyond the ends of the curve every bin takes the seed, or the maximum.
    grid = np.concatenate([[ends[0] + 60], grid, [ends[1] - 90]])
    return grid, np.maximum.accumulate(np.concatenate([[low], bits, [high]]))


def oracle_curve(
    loss: np.ndarray, cost: np.ndarray, weights: np.ndarray, seed_bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """The curve (log2 lambda [C], bits [C]) of choosing, for every token, the width of least loss + lambda * cost.

    loss: float32 [G, T, B]. cost: [G, B]. weights: [G].
    """
    positive = loss[:, :, 0][loss[:, :, 0] > 0]
    if positive.size == 0:
        return np.asarray([0.0, -1.0]), np.asarray([seed_bits, seed_bits + loss.shape[2] - 1], float)
    middle = float(np.log2(np.median(positive) / np.median(np.diff(cost, axis=1))))
    grid = np.arange(middle + 16, middle - 24, -0.5)
    bits = []
    for g in grid:
        choice = (loss + np.float32(2.0**g) * cost[:, None, :].astype(np.float32)).argmin(axis=2)
        bits.append(seed_bits + (choice.mean(axis=1) * weights).sum() / weights.sum())
    return grid, np.maximum.accumulate(np.asarray(bits))
