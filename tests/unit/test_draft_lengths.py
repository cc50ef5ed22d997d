"""How much to draft, on machines made up of numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpllm.decode.speculation.draft_length import REFRESH, DraftLengths, Source, expected_tokens


@dataclass
class Machine:
    """Times in ms: a plain step 10, a check `row` more for each further row. found: share of rounds in which the source
    has something to offer."""

    acceptance: float
    draft: float = 3.0
    row: float = 1.0
    found: float = 1.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self):
        self.rng = random.Random(self.seed)

    def check(self, rows: int) -> float:
        return (10 + self.row * (rows - 1)) * self.rng.lognormvariate(0, self.noise)

    def accepted(self, drafted: int) -> int:
        n = 0
        while n < drafted and self.rng.random() < self.acceptance:
            n += 1
        return n

    def best(self, longest: int) -> int:
        def ms(k):
            return (k * self.draft + 10 + self.row * k) / sum(self.acceptance**i for i in range(k + 1))

        return min(range(longest + 1), key=ms)


def run(lengths: DraftLengths, machines: list[Machine], tokens: int) -> tuple[float, list[int]]:
    """(ms a token, drafted of each round)."""
    made, ms, drafted = 0, 0.0, []
    while made < tokens:
        offers = (
            plan for plan in lengths.plans(tokens) if machines[plan[0]].rng.random() < machines[plan[0]].found
        )
        source, count = next(offers, (0, 0))
        machine = machines[source]
        accepted, check, draft = machine.accepted(count), machine.check(count + 1), machine.draft * count
        lengths.record(source, count, accepted, draft, check)
        made, ms = made + accepted + 1, ms + check + draft
        drafted.append(count)
    return ms / made, drafted


@pytest.mark.parametrize(
    "machine",
    [Machine(0.95, draft=2), Machine(0.8, draft=1), Machine(0.9, draft=4, row=0.5), Machine(0.6, draft=0.5)],
)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_what_pays_is_found(machine, noise):
    machine.noise = noise
    lengths, longest = DraftLengths([8]), 8
    run(lengths, [machine], 500)
    ms, drafted = run(lengths, [machine], 3000)
    best = machine.best(longest)
    ideal = (best * machine.draft + 10 + machine.row * best) / sum(
        machine.acceptance**i for i in range(best + 1)
    )
    assert best > 0
    assert ms < 1.05 * ideal
    assert abs(sorted(drafted)[len(drafted) // 2] - best) <= 2


@pytest.mark.parametrize(
    "machine", [Machine(0.2), Machine(0.7, draft=9.5), Machine(0.6, row=9), Machine(0.0)]
)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_what_does_not_pay_is_left(machine, noise):
    """But tried now and then."""
    machine.noise = noise
    lengths = DraftLengths([8])
    run(lengths, [machine], 600)
    ms, drafted = run(lengths, [machine], 4000)
    tried = sum(d > 0 for d in drafted)
    assert 4 <= tried < 0.02 * len(drafted)
    assert ms < 1.02 * 10


def test_the_first_round_is_plain_and_the_second_a_trial():
    lengths = DraftLengths([8])
    assert lengths.plans(room=20) == []
    lengths.record(0, 0, 0, 0.0, 10.0)
    assert lengths.plans(room=20) == [(0, 4)]
    assert lengths.plans(room=2) == [(0, 2)]
    assert lengths.plans(room=0) == []


def test_a_machine_that_changes():
    """Drafts begin to pay, and cease to."""
    lengths = DraftLengths([8])
    assert sum(run(lengths, [Machine(0.1)], 1000)[1]) < 100
    good = run(lengths, [Machine(0.95, draft=1)], 2000)
    assert good[0] < 0.6 * 10
    slow = run(lengths, [Machine(0.95, draft=12, row=11)], 1000)
    assert slow[0] < 1.1 * 10
    assert sum(slow[1][-200:]) < 40


def test_plain_steps_are_timed_again():
    lengths = DraftLengths([8])
    drafted = run(lengths, [Machine(0.97, draft=1)], 4000)[1]
    plain = [i for i, d in enumerate(drafted) if d == 0]
    assert len(plain) > 3
    assert all(b - a <= REFRESH + 1 for a, b in pairwise(plain))


def test_the_better_of_two_sources():
    """A free one that seldom has anything, and a dear one that always does."""
    lengths = DraftLengths([15, 8])
    lookup, own = Machine(0.9, draft=0.01, found=0.3), Machine(0.9, draft=2)
    run(lengths, [lookup, own], 500)
    ms, _ = run(lengths, [lookup, own], 3000)
    assert ms < run(DraftLengths([8]), [own], 3000)[0]
    assert [number for number, _ in lengths.plans(room=20)] == [0, 1]


def test_a_source_without_anything_to_offer_costs_nothing():
    ms, drafted = run(DraftLengths([15]), [Machine(0.9, found=0.0)], 500)
    assert (ms, sum(drafted)) == (10, 0)


@settings(deadline=None, max_examples=40)
@given(
    acceptance=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.97, 1.0]), k=st.integers(0, 15), seed=st.integers(0, 99)
)
def test_expected_tokens(acceptance, k, seed):
    """The closed form is the mean of what happens."""
    machine, rounds = Machine(acceptance, seed=seed), 3000
    mean = sum(1 + machine.accepted(k) for _ in range(rounds)) / rounds
    assert expected_tokens(acceptance, k) == pytest.approx(mean, rel=0.12)
    assert expected_tokens(acceptance, k) == pytest.approx(sum(acceptance**i for i in range(k + 1)))


def test_acceptance_is_learnt_from_the_first_rejection_only():
    source = Source(8)
    for _ in range(400):
        source.learn(drafted=8, accepted=1)  # one accepted, one rejected, six that nobody looked at
    assert source.acceptance == pytest.approx(0.5, abs=0.02)
    for _ in range(200):
        source.learn(drafted=4, accepted=4)
    assert 0.98 < source.acceptance < 1


@settings(deadline=None, max_examples=60)
@given(data=st.data(), room=st.integers(0, 20))
def test_never_more_than_there_is_room_for(data, room):
    lengths = DraftLengths([8, 15])
    for _ in range(data.draw(st.integers(0, 30))):
        drafted = data.draw(st.integers(0, 8))
        times = data.draw(st.tuples(st.floats(0, 50), st.floats(0, 50)))
        lengths.record(
            data.draw(st.integers(0, 1)), drafted, data.draw(st.integers(0, drafted)), times[0], times[1]
        )
    for source, count in lengths.plans(room):
        assert 1 <= count <= min(room, (8, 15)[source])
