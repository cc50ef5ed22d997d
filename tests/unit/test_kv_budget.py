"""Budgets and allocations: exact counts, the best pairs, ties as documented."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpllm.base.errors import InputError
from dpllm.kvzip_bridge.budget import (
    ALLOCATIONS,
    Budget,
    head_level,
    over_all,
    per_head,
    per_layer,
    pyramid,
    with_safeguard,
)


@st.composite
def cases(draw):
    """Scores with many ties, some of them protected everywhere, and a number of pairs."""
    layers, heads, length = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 12))
    values = draw(
        st.lists(st.integers(0, 3), min_size=layers * heads * length, max_size=layers * heads * length)
    )
    scores = torch.tensor(values, dtype=torch.float32).view(layers, heads, length) / 4 - 0.25
    protected = draw(st.integers(0, length))
    scores[..., :protected] = math.inf
    return scores, draw(st.integers(layers * heads * protected, scores.numel())), protected


def best(scores, count) -> set:
    """The `count` best (layer, head, position) of a dict, by sorting."""
    return set(sorted(scores, key=lambda at: (-scores[at], at[2], at[0], at[1]))[:count])


def as_dict(scores) -> dict:
    layers, heads, length = scores.shape
    return {
        (p, h, j): float(scores[p, h, j]) for p in range(layers) for h in range(heads) for j in range(length)
    }


def chosen(mask) -> set:
    return {tuple(at) for at in mask.nonzero().tolist()}


def even(total, parts) -> list[int]:
    return [len(range(i, total, parts)) for i in range(parts)]


def only(scores, layer, head=None) -> dict:
    return {at: s for at, s in as_dict(scores).items() if at[0] == layer and head in (None, at[1])}


@settings(max_examples=150, deadline=None)
@given(cases())
def test_allocations_are_a_sort(case):
    scores, pairs, _ = case
    layers, heads, _ = scores.shape
    assert chosen(over_all(scores, pairs)) == best(as_dict(scores), pairs)

    expected = set()
    for p, count in enumerate(even(pairs, layers)):
        expected |= best(only(scores, p), count)
    assert chosen(per_layer(scores, pairs)) == expected

    expected = set()
    for i, count in enumerate(even(pairs, layers * heads)):
        expected |= best(only(scores, i // heads, i % heads), count)
    assert chosen(per_head(scores, pairs)) == expected


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_the_safeguard_is_adakv(case, share):
    scores, pairs, _ = case
    layers, heads, _ = scores.shape
    expected = set()
    for p, count in enumerate(even(pairs, layers)):
        own: set = set()
        for h in range(heads):
            own |= best(only(scores, p, h), int(share * pairs / (layers * heads)))
        rest = {at: s for at, s in only(scores, p).items() if at not in own}
        expected |= own | best(rest, count - len(own))
    assert chosen(with_safeguard(scores, pairs, share)) == expected


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(sorted(ALLOCATIONS)))
def test_every_allocation_is_exact_and_keeps_what_is_protected(case, name):
    scores, pairs, protected = case
    mask = ALLOCATIONS[name](scores, pairs)
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    assert int(mask.sum()) == pairs
    assert mask[..., :protected].all()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(1, 60), st.integers(0, 5), st.integers(0, 5), st.data()
)
def test_a_pyramid_falls_linearly(layers, heads, length, protected, forced, data):
    scores = torch.rand(layers, heads, length, generator=torch.Generator().manual_seed(length))
    scores[..., :protected] = math.inf
    protected = min(protected, length)
    pairs = data.draw(st.integers(layers * heads * protected, scores.numel()))
    mask = pyramid(scores, pairs, forced=forced, steep=20)
    assert int(mask.sum()) == pairs
    counts = mask.sum(-1)  # by layer and head
    mean = pairs / (layers * heads) - protected - forced
    if layers == 1 or mean < 0 or protected + forced + mean * 39 / 20 > length:
        assert torch.equal(mask, per_head(scores, pairs)), "infeasible: all layers alike"
        return
    for p in range(layers):
        expected = protected + forced + mean * (39 / 20 + (1 / 20 - 39 / 20) * p / (layers - 1))
        assert abs(int(counts[p].sum()) - heads * expected) <= 1
        assert counts[p].max() - counts[p].min() <= 1
        assert counts[p].min() >= protected + forced
    for p in range(layers):
        for h in range(heads):
            assert chosen(mask[p, h][None, None]) == best(
                as_dict(scores[p, h][None, None]), int(counts[p, h])
            )


def test_a_pyramid_in_numbers():
    mask = pyramid(torch.rand(4, 2, 1000), 800)
    assert mask.sum((1, 2)).tolist() == [390, 263, 137, 10]


def test_ties_go_to_the_smaller_position_then_layer_then_head():
    mask = over_all(torch.zeros(2, 2, 5), 10)
    assert mask.sum((0, 1)).tolist() == [4, 4, 2, 0, 0]
    assert chosen(mask[..., 2:3]) == {(0, 0, 0), (0, 1, 0)}


def test_large_and_coarse_scores_keep_their_count():
    scores = torch.rand(4, 2, 30_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    for pairs in (1, 77_777, scores.numel() - 1):
        mask = over_all(scores, pairs)
        assert int(mask.sum()) == pairs
        assert scores[mask].min() >= (scores[~mask].max())


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_what_is_no_allocation(name):
    scores = torch.rand(2, 2, 4)
    for pairs in (-1, 17):
        with pytest.raises(ValueError, match=f"{pairs} pairs"):
            ALLOCATIONS[name](scores, pairs)
    scores[1, 0, 2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        ALLOCATIONS[name](scores, 3)


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_nothing_and_everything(name):
    scores = torch.rand(3, 2, 4)
    assert not ALLOCATIONS[name](scores, 0).any()
    assert ALLOCATIONS[name](scores, 24).all()


def test_heads_survive_or_vanish_whole():
    profile = torch.tensor([[0.5, 0.1], [0.9, 0.3]])
    mask = over_all(head_level(profile, 10), 25)
    assert mask.sum(-1).tolist() == [[10, 0], [10, 5]]
    assert mask[1, 1, :5].all()


# -- budgets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "pairs"),
    [
        (Budget(keep_ratio=1), 600),
        (Budget(keep_ratio=0.3), 180),
        (Budget(keep_ratio=0.0999), 60),
        (Budget(tokens=10), 60),
        (Budget(tokens=10.5), 63),
        (Budget(tokens=1000), 600),
        (Budget(nbytes=6400), 100),
        (Budget(nbytes=6463), 100),
        (Budget(nbytes=10**9), 600),
    ],
)
def test_pairs_of_a_budget(budget, pairs):
    assert budget.pair_count(3, 2, 100, 4, 64) == pairs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"keep_ratio": 0.5, "tokens": 3}, "exactly one"),
        ({"keep_ratio": 0.0}, "above 0, up to 1"),
        ({"keep_ratio": 1.01}, "above 0, up to 1"),
        ({"keep_ratio": math.nan}, "above 0, up to 1"),
        ({"tokens": 0}, "holds nothing"),
        ({"tokens": -4}, "holds nothing"),
        ({"nbytes": 0}, "holds nothing"),
    ],
)
def test_what_is_no_budget(arguments, message):
    with pytest.raises(InputError, match=message) as e:
        Budget(**arguments)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("budget", "least"),
    [
        (Budget(keep_ratio=0.11), "keep_ratio 0.1204 or more"),
        (Budget(tokens=15), "16 tokens or more"),
        (Budget(nbytes=6 * 16 * 64 - 1), "6144 bytes or more"),
    ],
)
def test_a_budget_below_the_protected_part(budget, least):
    with pytest.raises(InputError, match=f"16 leading tokens.*{re.escape(least)}"):
        budget.pair_count(3, 2, 133, 16, 64)
    number = float(re.findall(r"[\d.]+", least)[0])
    kind = next(k for k in ("keep_ratio", "tokens", "nbytes") if getattr(budget, k) is not None)
    enough = Budget(**{kind: int(number) if kind == "nbytes" else number})
    assert 96 <= enough.pair_count(3, 2, 133, 16, 64) <= 97


def test_a_context_shorter_than_what_is_protected():
    assert Budget(keep_ratio=1).pair_count(3, 2, 5, 16, 64) == 30
    with pytest.raises(InputError, match="keep_ratio 1 or more"):
        Budget(keep_ratio=0.9).pair_count(3, 2, 5, 16, 64)


def test_a_budget_of_no_pair():
    with pytest.raises(InputError, match="64 bytes or more"):
        Budget(nbytes=63).pair_count(3, 2, 5, 0, 64)
