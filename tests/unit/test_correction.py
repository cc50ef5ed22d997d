"""The correction keeps mean bits on target: by arithmetic, whatever the text does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpllm.calib.runtime.bits_correction import Correction


@settings(max_examples=50, deadline=None)
@given(st.floats(-0.4, 0.4), st.floats(0.3, 1.5), st.integers(0, 2**32 - 1))
def test_a_biased_stream_comes_to_its_target(bias, gain, seed):
    rng, c, used = np.random.default_rng(seed), Correction(3.0), []
    for _ in range(1500):
        bits = float(np.clip(3.0 + bias + gain * c.value + 0.4 * rng.standard_normal(), 2, 6))
        used.append(bits)
        c.update(bits)
    assert abs(np.mean(used[-1000:]) - 3.0) < 0.03


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(2, 6), min_size=1, max_size=300), st.floats(2, 6))
def test_the_sum_of_misses_is_what_the_correction_moved(bits, target):
    c = Correction(target, limit=1e9)
    for b in bits:
        c.update(b)
    assert c.value == pytest.approx(c.rate * sum(target - b for b in bits), abs=1e-9)


def test_the_correction_is_bounded():
    c = Correction(6.0)
    for _ in range(10_000):
        c.update(2.0)
    assert c.value == c.limit
    for _ in range(10_000):
        c.update(20.0)
    assert c.value == -c.limit


def test_texts_side_by_side_have_corrections_of_their_own():
    alone, together = [Correction(3.0) for _ in range(3)], Correction(3.0)
    rng = np.random.default_rng(0)
    for step in range(40):
        rows = 3 if step < 20 else 2  # the last text has ended
        bits = rng.uniform(2, 6, rows)
        together.update(torch.from_numpy(bits))
        for one, b in zip(alone, bits, strict=False):
            one.update(float(b))
    assert together.value.tolist() == pytest.approx([c.value for c in alone[:2]])
