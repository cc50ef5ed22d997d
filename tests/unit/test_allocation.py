"""Static allocation is the best there is within its budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpllm.base.errors import InputError
from dpllm.calib.allocation import knapsack, memory_allocation, static_bits


@st.composite
def instances(draw):
    groups, options = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    loss = rng.random((groups, options)) * 10.0 ** rng.integers(-6, 4, (groups, 1))
    if draw(st.booleans()):
        loss = -np.sort(-loss, axis=1)
    size = np.cumsum(rng.integers(1, 1000, (groups, options)), axis=1).astype(float)
    low, high = size.min(1).sum(), size.max(1).sum()
    return loss, size, float(np.floor(low + draw(st.floats(0, 1)) * (high - low)))


def total(table: np.ndarray, choice) -> float:
    return float(table[np.arange(len(table)), list(choice)].sum())


@settings(max_examples=60, deadline=None)
@given(instances())
def test_knapsack_is_exact(instance):
    loss, size, budget = instance
    chosen = knapsack(loss, size, budget)
    assert chosen.shape == (len(loss),)
    assert total(size, chosen) <= budget
    every = itertools.product(range(loss.shape[1]), repeat=len(loss))
    best = min(total(loss, c) for c in every if total(size, c) <= budget)
    assert total(loss, chosen) <= best + 1e-6 * np.abs(loss).max()  # the solver's own resolution


@settings(max_examples=20, deadline=None)
@given(instances())
def test_infeasible_budget(instance):
    loss, size, _ = instance
    with pytest.raises(InputError, match="below the smallest choice"):
        knapsack(loss, size, float(size.min(1).sum()) - 1)


def test_losses_of_zero_are_no_obstacle():
    chosen = knapsack(np.zeros((3, 2)), np.asarray([[1.0, 2.0]] * 3), 4.0)
    assert total(np.asarray([[1.0, 2.0]] * 3), chosen) <= 4


def test_static_bits_spends_where_it_matters():
    loss = np.asarray([[9.0, 1.0, 0.0], [8.0, 7.9, 7.8], [0.5, 0.1, 0.0]])
    weights = np.asarray([100, 100, 100])
    assert static_bits(loss, weights, 2, 2 + 1 / 3).tolist() == [3, 2, 2]
    assert static_bits(loss, weights, 2, 2 + 2 / 3).tolist() == [4, 2, 2]
    assert static_bits(loss, weights, 2, 3.0).tolist() == [4, 2, 3]


def test_static_bits_at_the_ends():
    loss = -np.sort(-np.random.default_rng(0).random((6, 5)), axis=1)
    weights = np.asarray([7, 11, 13, 17, 19, 23])
    assert set(static_bits(loss, weights, 2, 2.0)) == {2}
    assert set(static_bits(loss, weights, 2, 6.0)) == {6}
    with pytest.raises(InputError):
        static_bits(loss, weights, 2, 1.99)


# -- memory ----------------------------------------------------------------------------------------------


def test_memory_allocation_counts_what_is_held():
    loss = np.asarray([[9.0, 1.0, 0.0], [8.0, 7.9, 7.8], [0.5, 0.1, 0.0]])
    held = np.asarray([[100, 150, 230], [100, 150, 230], [100, 150, 230]])  # tables grow with the width
    assert memory_allocation(loss, held, 350.0).tolist() == [1, 0, 0]
    assert memory_allocation(loss, held, 430.0).tolist() == [2, 0, 0]
    assert memory_allocation(loss, held, 480.0).tolist() == [2, 0, 1]
