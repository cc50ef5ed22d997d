"""Plans against brute force, and what is said where there is none."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dpllm.base.errors import InputError
from dpllm.control.cost_model import CostModel
from dpllm.planning.planner import Plan, PlanInputs, Planner, Targets
from dpllm.planning.quality_model import QualityModel

COST = CostModel(
    "a machine", "an overlay", 6.0, bits=(2.0, 3.0, 4.0, 6.0), weights_ms=(10.0, 14.0, 18.0, 26.0),
    pairs=(0.0, 1e6), attention_ms=(0.0, 20.0), plane_ms=(4.0,) * 4,
)  # fmt: skip
QUALITY = QualityModel(
    "an overlay", "a text", 1000, bits=(2.0, 3.0, 4.0, 6.0), keep=(0.1, 0.3, 1.0),
    nats=((0.5, 0.32, 0.3), (0.25, 0.06, 0.05), (0.2, 0.02, 0.01), (0.19, 0.01, 0.0)),
)  # fmt: skip
INPUTS = PlanInputs(
    held={3: 300, 4: 400, 6: 600}, read_bytes=lambda bits: round(bits * 100), pairs=64, pair_bytes=1,
    max_positions=32768, penalty=lambda planes, bits: 0.002 * (6 - planes) * (bits > planes - 1),
)  # fmt: skip
PLANNER = Planner(INPUTS, COST, QUALITY)


candidates = cache(PLANNER.candidates)


def meets(p: Plan, t: Targets) -> bool:
    return (
        (t.tpot_ms is None or p.tpot_ms <= t.tpot_ms * (1 + 1e-9))
        and (t.max_memory is None or p.weight_bytes + p.kv_bytes <= t.max_memory)
        and (t.max_quality_loss is None or p.quality_loss <= t.max_quality_loss * (1 + 1e-9))
    )


@settings(deadline=None, max_examples=150)
@given(
    tpot_ms=st.none() | st.floats(11, 70),
    max_memory=st.none() | st.integers(310, 2_000_000),
    max_quality_loss=st.none() | st.floats(0.001, 0.6),
    context=st.sampled_from([1, 500, 4096, 32768]),
)
def test_the_plan_is_the_best_that_meets_the_targets(tpot_ms, max_memory, max_quality_loss, context):
    targets = Targets(tpot_ms, max_memory, max_quality_loss, context)
    every = candidates(context)
    legal = [p for p in every if meets(p, targets)]
    if not legal:
        with pytest.raises(InputError, match="no plan meets"):
            PLANNER.plan(targets)
        return
    planned = PLANNER.plan(targets)
    assert meets(planned.plan, targets)
    if tpot_ms is None and max_quality_loss is not None:
        assert planned.plan.tpot_ms == min(p.tpot_ms for p in legal)
    else:
        assert planned.plan.quality_loss == min(p.quality_loss for p in legal)
    assert planned.plan in planned.alternatives
    assert all(p.memory <= (max_memory or math.inf) for p in planned.alternatives)
    for name in planned.binding:
        assert getattr(targets, name) is not None
    times = [p.tpot_ms for p in planned.alternatives]
    assert times == sorted(times)


def test_a_plan_is_priced_by_all_models():
    plan = PLANNER.plan(Targets(context=10000)).plan
    assert (plan.resident_bits, plan.target_bits, plan.keep_ratio) == (6, 6.0, 1.0)
    assert plan.tpot_ms == pytest.approx(26 + 20 * 0.64)
    assert plan.quality_loss == 0
    assert plan.memory == 600 + 640000
    stored = plan.as_json(0.5)
    assert stored["lambda"] == 0.5 and stored["predicted_tpot_ms"] == pytest.approx(38.8)
    assert stored["bytes"] == {"weights": 600, "kv": 640000, "read_per_token": 640600}


def test_weights_and_cache_are_planned_together():
    """With a long context the cache gives first: that costs less."""
    short, long = (PLANNER.plan(Targets(tpot_ms=30.0, context=n)).plan for n in (500, 32768))
    assert short.keep_ratio == 1.0
    assert long.keep_ratio < 0.5
    assert long.quality_loss < math.expm1(QUALITY.loss(2.0, 1.0)), "reading fewer bits alone would be worse"


@settings(deadline=None, max_examples=60)
@given(tpot_ms=st.floats(11, 60), more=st.floats(0, 20))
def test_more_time_is_never_worse(tpot_ms, more):
    assume(tpot_ms > 12)
    one, other = (PLANNER.plan(Targets(tpot_ms=t, context=500)).plan for t in (tpot_ms, tpot_ms + more))
    assert other.quality_loss <= one.quality_loss


def test_what_would_have_to_give_is_named():
    with pytest.raises(InputError, match=r"no plan meets --tpot-ms 5 with 500 tokens.*Nearest: --tpot-ms 10"):
        PLANNER.plan(Targets(tpot_ms=5.0, context=500))
    with pytest.raises(InputError, match=r"--tpot-ms \d+.*; or --max-quality-loss \d+\.\d+%"):
        PLANNER.plan(Targets(tpot_ms=15.0, max_quality_loss=0.005, context=500))
    with pytest.raises(
        InputError, match=r"--tpot-ms 10\.1 at best, alone; or --max-memory 0\.0 MB at best, alone"
    ):
        PLANNER.plan(Targets(tpot_ms=5.0, max_memory=10, context=500))
    with pytest.raises(InputError, match="longer than the model's 32768 positions"):
        PLANNER.plan(Targets(context=40000))


def test_what_binds_is_named():
    assert PLANNER.plan(Targets(tpot_ms=15.0, context=500)).binding == ("tpot_ms",)
    assert PLANNER.plan(Targets(tpot_ms=500.0, context=500)).binding == ()
    assert "max_memory" in PLANNER.plan(Targets(max_memory=400, context=1)).binding
    assert PLANNER.plan(Targets(max_quality_loss=0.03, context=500)).binding == ("max_quality_loss",)


@pytest.mark.parametrize(
    "wrong",
    [{"tpot_ms": 0.0}, {"tpot_ms": math.nan}, {"max_memory": -1}, {"max_quality_loss": -0.1}, {"context": 0}],
)
def test_targets_that_are_none(wrong):
    with pytest.raises(InputError):
        Targets(**wrong)


def test_plans_fit_into_the_memory_of_this_machine():
    """As with --max-memory, but a plan that this process cannot hold is never shown, whatever was asked."""
    free = PLANNER.plan(Targets(context=10)).plan
    tight = Planner(replace(INPUTS, usable=free.memory - 1), COST, QUALITY)
    found = tight.plan(Targets(context=10))
    assert all(p.memory < free.memory for p in (found.plan, *found.alternatives))
    assert found.binding == ()
    with pytest.raises(InputError, match=r"even the smallest plan needs .* this process may use"):
        Planner(replace(INPUTS, usable=10), COST, QUALITY).plan(Targets(context=10))


def test_without_a_measurement_of_pruning_the_cache_is_kept():
    weights_only = QualityModel("an overlay", "estimate", 0, (2.0, 6.0), (1.0,), ((0.3,), (0.0,)))
    planner = Planner(INPUTS, COST, weights_only)
    assert {p.keep_ratio for p in planner.candidates(4096)} == {1.0}
