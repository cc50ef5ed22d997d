"""The controllers against simulated machines and clocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpllm.base.errors import InputError
from dpllm.control.controller import PATIENCE, SPARED, ControlOptions, LatencyController, QueryBudget
from dpllm.control.cost_model import CostModel
from dpllm.planning.cost_measurement import Timed, plane_times
from dpllm.policies.token_limit import WidthCosts
from dpllm.policies.token_time import NO_REST, Rest

COST = CostModel(
    "a machine", "an overlay", 6.0, bits=(2.0, 3.0, 4.0, 6.0), weights_ms=(10.0, 14.0, 18.5, 27.0),
    pairs=(0.0, 1e6), attention_ms=(0.0, 5.0), plane_ms=(4.0, 4.5, 4.25, 4.25),
)  # fmt: skip
NANOSECONDS = WidthCosts(2, 10_000_000, torch.tensor([[4_000_000, 8_500_000, 12_750_000, 17_000_000]]))
BYTES = WidthCosts(2, 10, torch.tensor([[5, 10, 15, 20]]))
SETTLED = 16
# Headroom, and how much longer than a fixed width's the tail may be right after an abrupt change. Tokens that may take
# 1.2 times the target, the default, make it 4% longer than a steady one's.
CHANGING = pytest.mark.parametrize(("headroom", "bar"), [(1.02, 1.1), (ControlOptions().headroom, 1.14)])


def spent(bits: float) -> int:
    """The price of so many bits."""
    return round(COST.step_ms(bits) * 1e6)


class Machine:
    """Takes what the cost model says, times a factor that changes with time, times noise; now and then something else
    runs. A policy reads what it is told on average, tokens differ by `spread` bits."""

    def __init__(self, seed: int = 0, spread: float = 0.25, noise: float = 0.02, bias: float = 0.0):
        self.rng = np.random.default_rng(seed)
        self.spread, self.noise, self.bias = spread, noise, bias
        self.factor: Callable[[int], float] = lambda t: 1.0

    def run(
        self,
        controller: LatencyController | None,
        tokens: int,
        pairs=lambda t: 0.0,
        at=lambda t, c: None,
        rest=lambda t: NO_REST,
    ):
        """ms of each token; at(t, controller) may change the target. rest(t): time beside the step."""
        taken, self.bits = [], []
        for t in range(tokens):
            bits = 3.5
            if controller is not None:
                at(t, controller)
                order = controller.order(pairs(t))
                wanted = order.bits + self.bias + self.rng.normal() * self.spread
                bits = min(max(wanted, 2.0), COST.bits_for(order.limit.most / 1e6))
            slow = 1.6 if self.rng.random() < 0.01 else 1.0
            noise = math.exp(self.rng.normal() * self.noise)
            ms = COST.step_ms(bits, pairs(t)) * self.factor(t) * noise * slow + rest(t).ms
            if controller is not None:
                controller.record(ms, spent(bits), pairs(t), rest(t))
            taken.append(ms)
            self.bits.append(bits)
        return np.asarray(taken)


def holds(ms: np.ndarray, target: float, fixed: np.ndarray, bar: float = 1.1) -> None:
    """Median within 3%, p95 within 10% above what a fixed width shows."""
    assert abs(np.median(ms) / target - 1) < 0.03
    allowed = bar * np.percentile(fixed, 95) / np.median(fixed)
    assert np.percentile(ms, 95) / target < allowed


def controller_for(target: float, headroom: float = ControlOptions().headroom) -> LatencyController:
    return LatencyController(COST, target, NANOSECONDS, ControlOptions(headroom=headroom))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("speed", [0.6, 1.0, 1.5])
def test_a_machine_of_another_speed(seed, speed):
    machine = Machine(seed)
    machine.factor = lambda t: speed
    target = 17.0 * speed
    ms = machine.run(controller_for(target), 200)
    holds(ms[SETTLED:], target, Machine(seed + 100).run(None, 2000))


@pytest.mark.parametrize("seed", range(4))
def test_a_context_that_grows(seed):
    ms = Machine(seed).run(controller_for(20.0), 400, pairs=lambda t: 4000.0 * t)
    fixed = Machine(seed + 100).run(None, 2000)
    for part in (ms[16:150], ms[150:270], ms[270:]):
        holds(part, 20.0, fixed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("load", [1.3, 1.7])
@CHANGING
def test_a_load_that_comes_and_goes(seed, load, headroom, bar):
    machine = Machine(seed)
    machine.factor = lambda t: load if 150 <= t < 300 else 1.0
    ms = machine.run(controller_for(22.0, headroom), 450)
    fixed = Machine(seed + 100).run(None, 2000)
    for first in (0, 150, 300):
        holds(ms[first + SETTLED : first + 150], 22.0, fixed, bar=bar)


@pytest.mark.parametrize("seed", range(4))
@CHANGING
def test_targets_that_change_between_two_tokens(seed, headroom, bar):
    goals = {0: 15.0, 100: 24.0, 200: 18.0}
    ms = Machine(seed).run(
        controller_for(15.0, headroom), 300, at=lambda t, c: c.retarget(goals[t]) if t in goals else None
    )
    fixed = Machine(seed + 100).run(None, 2000)
    for first, goal in goals.items():
        holds(ms[first + SETTLED : first + 100], goal, fixed, bar=bar)


def test_a_policy_that_reads_more_than_it_is_told():
    """Integral control takes out what the cost model cannot know."""
    machine = Machine(0, bias=0.3)
    ms = machine.run(controller_for(17.0), 400)
    assert abs(np.median(ms[60:]) / 17 - 1) < 0.02


@pytest.mark.parametrize("target", [5.0, 60.0])
def test_an_impossible_time_does_not_wind_up(target):
    controller = controller_for(target)
    Machine(1).run(controller, 300)
    assert controller.order(0).bits == (2.0 if target < 10 else 6.0)
    assert abs(controller.trim) < 0.02
    controller.retarget(17.0)
    ms = Machine(2).run(controller, 100)
    assert abs(np.median(ms[SETTLED:]) / 17 - 1) < 0.03


def test_least_bits_are_read_whatever_they_take():
    controller = LatencyController(COST, 11.0, NANOSECONDS, least_bits=3.2)
    Machine(0).run(controller, 50)
    order = controller.order(0)
    assert order.bits == 3.2
    assert order.limit.most >= COST.step_ms(3.2) * 1e6
    controller.retarget(11.0, least_bits=2.6)
    assert controller.order(0).bits == 2.6
    controller.retarget(11.0)
    assert controller.order(0).bits < 2.6


def test_the_order_stays_where_little_changes():
    controller = controller_for(17.0)
    orders = set()
    for _ in range(50):
        orders.add(controller.order(0).bits)
        controller.record(17.0, 17_000_000, 0)
    assert len(orders) == 1


@pytest.mark.parametrize("ms", [0.0, -1.0, math.nan, math.inf])
def test_a_clock_that_says_nothing_changes_nothing(ms):
    controller = controller_for(17.0)
    before = controller.order(0)
    controller.record(ms, spent(3.0), 0)
    assert controller.order(0) == before
    with pytest.raises(InputError, match="is impossible"):
        controller.retarget(ms)


def test_headroom_bounds_a_single_token():
    """A token may take `headroom` times the target, whatever its bits."""
    for headroom in (1.0, 1.02, 1.2):
        controller = LatencyController(COST, 17.0, NANOSECONDS, ControlOptions(headroom=headroom))
        assert controller.order(0).limit.most == pytest.approx(17e6 * headroom)


@pytest.mark.parametrize("headroom", [0.99, 0.0, -1.0, math.nan, math.inf])
def test_a_headroom_below_one_is_refused(headroom):
    with pytest.raises(InputError, match=r"headroom is .*; it must be 1 or more"):
        ControlOptions(headroom=headroom)


# -- time that is not the step's ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("speed", [0.6, 1.5])
def test_the_whole_time_of_a_token_is_held(seed, speed):
    """A rest of 6 ms: the step gets what is left, and the tail is that of a fixed width."""
    machine, rest = Machine(seed), Rest(sampling=5.0, text=0.4, other=0.6)
    machine.factor = lambda t: speed
    target = 17.0 * speed + rest.ms
    ms = machine.run(controller_for(target), 200, rest=lambda t: rest)
    holds(ms[SETTLED:], target, Machine(seed + 100).run(None, 2000))
    assert np.mean(machine.bits[SETTLED:]) == pytest.approx(COST.bits_for(17.0), abs=0.2)


@pytest.mark.parametrize("seed", range(4))
def test_a_rest_that_comes_and_goes(seed):
    def rest(t):
        return Rest(sampling=7.0 if 100 <= t < 200 else 0.1)

    ms = Machine(seed).run(controller_for(22.0), 300, rest=rest)
    fixed = Machine(seed + 100).run(None, 2000)
    for first in (0, 100, 200):
        holds(ms[first + SETTLED : first + 100], 22.0, fixed, bar=1.14)


def test_a_rest_is_not_a_slow_machine():
    """What is known of the machine's speed concerns the step alone."""
    controller = controller_for(30.0)
    Machine(0).run(controller, 100, rest=lambda t: Rest(sampling=10.0))
    assert abs(controller.slowdown) < 0.03


def test_a_single_token_may_take_the_headroom_with_its_rest():
    controller = LatencyController(COST, 30.0, NANOSECONDS, ControlOptions(headroom=1.2))
    for _ in range(10):
        controller.record(24.0, spent(3.0), 0, Rest(sampling=10.0))
    assert controller.order(0).limit.most == pytest.approx((30 * 1.2 - 10) * 1e6, rel=0.15)
    assert controller.order(0).limit.most < 29e6, "not 1.2 times the target besides the rest"


@pytest.mark.parametrize("speed", [1.0, 1.5])
@pytest.mark.parametrize(("target", "rest"), [
    (12.0, Rest(sampling=5.0, text=0.5, other=0.25)),  # no bits are few enough for what the rest leaves
    (5.0, Rest(sampling=17.0)),  # the rest alone takes longer
    (5.0, NO_REST),  # the fewest bits alone take longer
])  # fmt: skip
def test_a_target_out_of_reach_is_said_with_what_takes_the_time(target, rest, speed):
    controller, machine = controller_for(target), Machine(1, noise=0.0)
    machine.factor = lambda t: speed
    machine.run(controller, PATIENCE - 1, rest=lambda t: rest)
    assert controller.shortfall is None, "a few tokens are no evidence"
    ms = machine.run(controller, 60, rest=lambda t: rest)
    found = controller.shortfall
    assert (found.target_ms, found.bits) == (target, 2.0)
    assert (found.sampling_ms, found.text_ms, found.other_ms) == rest
    assert found.step_ms == pytest.approx(10.0 * speed, rel=0.1)
    assert found.shortest_ms == pytest.approx(10.0 * speed + rest.ms, rel=0.1)
    assert f"sampling {rest.sampling:.2g}," in str(found) and "Ask for" in str(found)
    assert np.median(ms) < 1.06 * (10.0 * speed + rest.ms), "it is nearly as short as it can be"
    controller.retarget(40.0 * speed + rest.ms)
    assert controller.shortfall is None
    machine.run(controller, 60, rest=lambda t: rest)
    assert controller.shortfall is None, "the new one is within reach"


def test_bits_are_not_given_up_for_what_they_cannot_change():
    """A rest of 200 ms and a target of 20: with most bits the token is longer by a twentieth, and they are read."""
    controller = controller_for(20.0)
    Machine(0).run(controller, 60, rest=lambda t: Rest(sampling=200.0))
    assert controller.order(0).bits == pytest.approx(COST.bits_for(10.0 + SPARED * 200.0), abs=0.1)
    close = controller_for(12.0)
    Machine(0).run(close, 60, rest=lambda t: Rest(sampling=4.0))
    assert close.order(0).bits < 2.1, "but where they matter, the time comes first"


def test_the_cost_model_knows_of_the_rest_before_the_first_token():
    controller = LatencyController(replace(COST, other_ms=3.0), 20.0, NANOSECONDS)
    assert controller.order(0).bits == pytest.approx(COST.bits_for(17.0))
    with pytest.raises(InputError, match="the fastest here is 13 ms"):
        replace(COST, other_ms=3.0).check(12.5)


# -- budgets -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    rate=st.integers(10, 1000),
    burst=st.integers(0, 5000),
    wishes=st.lists(st.integers(0, 3000), min_size=1, max_size=80),
    seed=st.integers(1, 10),
)
def test_no_query_overdraws_its_budget(rate, burst, wishes, seed):
    """Whatever a token wants, as long as it keeps to the order or reads the seed width, which is within the rate."""
    budget, total = QueryBudget(3.0, rate, burst, BYTES), 0
    for n, wish in enumerate(wishes, 1):
        order = budget.order()
        assert order.bits == 3.0
        assert order.limit.most >= rate >= seed, "the seed width can always be read"
        read = max(seed, min(wish, order.limit.most))
        total += read
        budget.record(0.0, read)
        assert total <= n * rate + burst
    assert budget.begin_text().order().limit.most == rate + burst


def test_savings_end_at_the_burst():
    budget = QueryBudget(3.0, 100, 250, BYTES)
    for _ in range(50):
        budget.record(0.0, 0)
    assert budget.order().limit.most == 350
    with pytest.raises(InputError, match="budget"):
        QueryBudget(3.0, 0, 10, BYTES)


# -- the cost model --------------------------------------------------------------------------------------------


@given(st.floats(9.9, 32), st.floats(0, 3e6))
def test_bits_for_is_the_inverse_of_step_ms(ms, pairs):
    bits = COST.bits_for(ms, pairs)
    assert 2 <= bits <= 6
    if 2 < bits < 6:
        assert COST.step_ms(bits, pairs) == pytest.approx(ms)


def test_cost_survives_its_file_and_damage_is_named(tmp_path):
    path = tmp_path / "cost.json"
    COST.save(path)
    assert CostModel.load(path) == COST
    text = path.read_text()
    for wrong in (
        text[:50],
        "[]",
        text.replace('"cost_version": ', '"cost_version": 9'),
        text.replace("14.0", "4.0"),
    ):
        path.write_text(wrong)
        with pytest.raises(InputError, match="is not a cost profile"):
            CostModel.load(path)


def steps_of(bits: list[list[int]]):
    return [SimpleNamespace(bits=row) for row in bits]


def engine_of(weights: list[int], resident: int = 5):
    groups = [SimpleNamespace(weights=w, seed_bits=2, resident_bits=resident) for w in weights]
    return SimpleNamespace(decoder=SimpleNamespace(groups=groups))


def test_times_of_planes_are_found_from_mixtures():
    """Planes that take unlike times, read by groups of unlike size."""
    rng, weights, plane_ms = np.random.default_rng(0), np.asarray([4, 1, 2, 3]), np.asarray([1.0, 0.5, 6.0])
    timed = []
    for top in np.linspace(2.2, 5, 9):
        bits = np.clip(np.rint(rng.normal(top, 0.8, (6, 4))), 2, 5).astype(int)
        shares = [((bits > 2 + p) * weights).sum(1).mean() / weights.sum() for p in range(3)]
        timed.append(Timed(steps_of(bits.tolist()), 20 + float(plane_ms @ shares), True))
    assert plane_times(engine_of(weights.tolist()), timed) == pytest.approx(plane_ms, abs=0.2)


def test_planes_that_were_always_read_together_share_their_time():
    timed = [Timed(steps_of([[b, b]] * 3), ms, True) for b, ms in ((2, 10.0), (5, 16.0))]
    assert plane_times(engine_of([1, 1]), timed) == pytest.approx((2.0, 2.0, 2.0), abs=0.01)


def test_more_planes_do_not_take_less_time():
    timed = [Timed(steps_of([[b, b]]), ms, True) for b, ms in ((2, 10.0), (3, 9.0), (4, 12.0), (5, 12.0))]
    assert min(plane_times(engine_of([1, 1]), timed)) >= 0


def test_choosing_widths_is_no_plane():
    """Steps of one width that need not choose take less time by that."""
    chosen = [Timed(steps_of([[b, b]]), 10.0 + 2 * (b - 2), True) for b in (2, 5)]
    timed = chosen + [Timed(steps_of([[b, b]]), 7.0 + 2 * (b - 2), False) for b in (3, 4)]
    assert plane_times(engine_of([1, 1]), timed) == pytest.approx((2.0, 2.0, 2.0), abs=0.05)
