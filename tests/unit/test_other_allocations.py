"""BAQ's rule spends what it may, and levels the losses."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.quality.other_allocations import equal_loss_bits


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.floats(2, 6), st.integers(0, 2**32 - 1))
def test_equal_loss_levels_the_losses(groups, target, seed):
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 50, groups) * 10
    loss = (
        rng.random((groups, 1))
        * weights[:, None]
        * 10.0 ** rng.integers(-3, 3, (groups, 1))
        * 4.0 ** -np.arange(5)
    )
    bits = equal_loss_bits(loss, weights, 2, target)
    assert ((bits >= 2) & (bits <= 6)).all()
    assert (bits * weights).sum() <= target * weights.sum() * (1 + 1e-9)
    density = loss[np.arange(groups), bits - 2] / weights
    room = target * weights.sum() - (bits * weights).sum()
    open_ = (bits < 6) & (weights <= room)
    assert not open_.any(), "what fits is spent"
    if groups > 1 and 2 < target < 6:
        # A group that got a bit was, before it, not better off than any that could have had one instead.
        before = np.where(bits > 2, loss[np.arange(groups), np.maximum(bits - 3, 0)] / weights, np.inf)
        starved = (bits < 6) & (weights <= weights[bits > 2].min(initial=10**9))
        if starved.any() and (bits > 2).any():
            assert before[bits > 2].min() >= density[starved].max() * (1 - 1e-9)
