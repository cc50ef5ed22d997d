"""Calibration profiles made up from arrays, without a model."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from dpllm.calib.runtime.profile import CalibrationProfile


def make_profile(gain: np.ndarray, cost: np.ndarray, seed_bits: int = 2, **fields) -> CalibrationProfile:
    """gain [G, B-1, M], cost [G, B]; bin m of the signal is (m, m + 1], the lowest and highest open-ended."""
    groups, steps, bins = gain.shape
    widths = seed_bits + np.arange(steps + 1)
    return CalibrationProfile(
        **{
            "overlay_hash": "a" * 64,
            "granularity": "fused",
            "bits": (seed_bits, seed_bits + steps),
            "group_names": tuple(f"group.{g}" for g in range(groups)),
            "diagonals": tuple(np.full(32 + g, g + 1, np.float16) for g in range(groups)),
            "source": np.arange(groups),
            "probe": np.linspace(-1, 1, 32).astype(np.float16),
            "context": np.linspace(-0.2, 0.2, 7),
            "knots": np.tile(np.arange(1.0, bins), (groups, 1)),
            "gain": gain,
            "mean_loss": np.concatenate([gain.mean(2)[:, ::-1].cumsum(1)[:, ::-1], np.zeros((groups, 1))], 1),
            "weights": np.arange(1, groups + 1, dtype=np.int64) * 1000,
            "cost": cost,
            "resident": np.stack([np.full(groups, w) for w in widths[1:]]),
            "curve_log2_lambda": np.stack([np.linspace(10, -30, 5) - row for row in range(steps)]),
            "curve_bits": np.stack([np.linspace(seed_bits, w, 5) for w in widths[1:]]),
            "origin": {"seed": 0, "device": "cpu"},
        }
        | fields
    )


def example_profile(**fields) -> CalibrationProfile:
    """Three groups, widths 2..5, four bins."""
    gain = np.sort(np.random.default_rng(0).random((3, 3, 4)), axis=2)
    cost = np.cumsum(np.full((3, 4), 100), axis=1)
    return make_profile(gain, cost, **fields)


@st.composite
def random_profiles(draw) -> CalibrationProfile:
    """Gains rising with the signal, costs rising with the width; whole numbers, so sums are exact."""
    groups, steps, bins = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gain = np.sort(rng.integers(0, 50, (groups, steps, bins)), axis=2).astype(float)
    cost = np.cumsum(rng.integers(1, 9, (groups, steps + 1)), axis=1)
    return make_profile(gain, cost)
