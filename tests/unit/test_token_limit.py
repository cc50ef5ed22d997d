"""Costs of widths, and the pace at which a token spends its limit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_profiles import example_profile, random_profiles

from dpllm.policies.token_limit import GAINS, NEVER, SpendingPace, TokenLimit, WidthCosts

GROUPS = [
    SimpleNamespace(seed_bits=2, weights=3000, bytes_at=(750, 1125, 1500, 1875)),
    SimpleNamespace(seed_bits=2, weights=1000, bytes_at=(250, 375)),  # holds a single plane beyond the seed
]


def test_bytes_are_those_beyond_the_seed_width():
    width_costs = WidthCosts.in_bytes(GROUPS)
    assert width_costs.seed == 1000
    assert width_costs.extra.tolist() == [[375, 750, 1125], [125, NEVER, NEVER]]
    assert [width_costs.of(bits) for bits in ([2, 2], [4, 2], [5, 3])] == [1000, 1750, 2250]
    assert [TokenLimit(most, width_costs).beyond_seed for most in (1500, 1000, 10)] == [500, 0, 0]


def test_time_is_shared_by_weights():
    width_costs = WidthCosts.in_nanoseconds(GROUPS, seed_ms=2.0, plane_ms=(0.004, 0.0, 0.008))
    assert width_costs.seed == 2_000_000
    assert width_costs.extra.tolist() == [[3000, 3000, 9000], [1000, NEVER, NEVER]]


@settings(deadline=None, max_examples=100)
@given(random_profiles(), st.floats(0.01, 100))
def test_the_expected_rest_is_what_the_calibrated_signals_cost(profile, lam):
    """Against the width that the rule gives each bin, taken from its lower edge up."""
    thresholds = profile.thresholds(lam)
    extra = torch.from_numpy((profile.cost[:, 1:] - profile.cost[:, :1]).astype(np.int64))
    pace = SpendingPace.of(WidthCosts(2, 0, extra), profile, thresholds)
    cost = np.zeros(len(profile.gain))
    for g, knots in enumerate(profile.knots):
        for signal in [-1.0, *(knots + 0.5)]:  # one within each bin
            bits = int((signal > thresholds[g]).sum())
            cost[g] += (extra[g, bits - 1].item() if bits else 0) / profile.gain.shape[2]
    assert pace.expected_rest.numpy() == pytest.approx(cost[::-1].cumsum()[::-1])
    assert GAINS[0] <= pace.gain <= GAINS[1]


def test_the_limit_falls_with_what_is_left():
    pace = SpendingPace(torch.tensor([100.0, 50.0, 0.0]), gain=2.0)
    left = torch.tensor([200, 100, 50, 0])
    assert pace.largest_multiplier(left, 0).tolist() == [4.0, 1.0, 0.25, 0.0]
    assert pace.largest_multiplier(left, 1).tolist() == [16.0, 4.0, 1.0, 0.0]
    assert (pace.largest_multiplier(left[:3], 2) > 1e6).all(), (
        "nothing is expected to be spent: nothing holds the multiplier"
    )


def test_a_rule_that_never_varies_has_a_pace():
    profile = example_profile()
    for value in (-np.inf, np.inf):  # every plane is read, and none
        thresholds = np.full((3, 3), value, np.float32)
        pace = SpendingPace.of(WidthCosts(2, 0, torch.full((3, 3), 7)), profile, thresholds)
        assert pace.gain == GAINS[1] and torch.isfinite(pace.expected_rest).all()
