"""Whether plans come true: times at the 1.1B shape on random weights and on the reference model, quality on the latter.

Limits measured: (1) predicted against measured time per token, at bits and contexts that the cost model was not fitted
to, whole caches and pruned ones, for the bits that these tokens have read, median over repeats of fitting and checking:
bar 5%; (2) regret: the perplexity of the chosen plan, by quality measured on other documents than the planner's, over
that of the best plan of the grid within the same time: bar 2%; (3) weights and cache planned together against planning
only the weights, and against a fixed share of the cache, at equal time.

    python -m bench.quality.plan_quality [--documents 12]
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable

import torch
from rich.progress import track

from bench.common.random_engine import random_engine
from bench.common.report import arguments, begin
from dpllm import reference
from dpllm.base.errors import InputError
from dpllm.decode.generation import Step
from dpllm.engine import Engine
from dpllm.kvzip_bridge.ragged_cache import RaggedKVCache
from dpllm.model.loading import LoadOptions
from dpllm.opening import open_engine
from dpllm.planning.cost_measurement import TOKENS, Cell, cells_of, fit_cost_model, measure_cost, steps_at
from dpllm.planning.planner import Plan, Planner, Targets, plan_inputs
from dpllm.planning.quality_measurement import QualityOptions, measure_quality
from dpllm.planning.quality_model import QualityModel, quality_of

BITS, CONTEXTS, KEEP = (2.4, 3.1, 3.9, 5.2), (0, 300, 2500), 0.3
SHAPE, PLANES = "1.1B", 6
ROUNDS, REPEATS = 4, 6


def pruned(engine: Engine, context: int) -> RaggedKVCache:
    """A cache that keeps uneven shares of its heads' pairs, KEEP of all; what they hold changes no time."""
    c = engine.decoder.config
    cache = engine.decoder.new_ragged_cache(context)
    for t in (*cache.k, *cache.v):
        t.zero_()
    cache.advance(context)
    rng = torch.Generator().manual_seed(0)
    share = KEEP * 2 * torch.rand(c.num_layers, c.num_kv_heads, 1, generator=rng)
    cache.prune(
        torch.rand(c.num_layers, c.num_kv_heads, context, generator=rng) < share, c.windows, TOKENS + 8
    )
    return cache


def times_come_true(name: str, engine: Engine, repeats: int) -> list[dict]:
    """Limit 1. What is fitted and what is checked take turns: a machine that changes its speed from second to second is
    for the controller to follow, here it shall slow both."""
    pair = 2 * engine.decoder.config.head_dim * engine.decoder.kv_dtype.itemsize
    cells = [(b, n, 1.0) for b in BITS for n in CONTEXTS] + [(b, CONTEXTS[-1], KEEP) for b in BITS]
    cache = pruned(engine, CONTEXTS[-1])
    found: dict[tuple, list[tuple[float, float]]] = {cell: [] for cell in cells}  # (predicted, measured) ms
    turn = random.Random(0)
    for _ in track(range(repeats), f"times, {name}"):
        fitted: dict[Cell, list[Step]] = {cell: [] for cell in cells_of(engine)}
        checked: dict[tuple, list[Step]] = {cell: [] for cell in cells}
        runs: list[tuple[list[Step], Cell, RaggedKVCache | None]]
        runs = [(steps, cell, None) for cell, steps in fitted.items()]
        runs += [(steps, Cell(b, n), None if keep == 1 else cache) for (b, n, keep), steps in checked.items()]
        for _ in range(ROUNDS):
            turn.shuffle(runs)
            for steps, cell, after in runs:
                steps += steps_at(engine, cell, after)
        cost = fit_cost_model(engine, fitted)
        for at, steps in checked.items():
            read = statistics.mean(s.effective_bits for s in steps)  # few tokens are not on their target yet
            told = cost.token_ms(read, steps[-1].kv_bytes / pair)
            found[at].append((told, statistics.median(s.ms for s in steps)))
    return [compared(name, *cell, pairs) for cell, pairs in found.items()]


def compared(name: str, bits: float, context: int, keep: float, pairs: list[tuple[float, float]]) -> dict:
    """A row of the table: medians over repeats; of_one_fit is the size of the error that one repeat shows."""
    errors = [told / took - 1 for told, took in pairs]
    return {
        "what": f"time per token, {name}", "bits": bits, "context": context, "kept": keep,
        "predicted": round(statistics.median(told for told, _ in pairs), 4),
        "measured": round(statistics.median(took for _, took in pairs), 4),
        "error": round(statistics.median(errors), 4), "of_one_fit": round(statistics.median(map(abs, errors)), 4),
    }  # fmt: skip


def regret(planner: Planner, truth: QualityModel, times: list[float], context: int) -> list[dict]:
    """Limits 2 and 3; perplexities over that of the resident maximum."""
    rows = []
    every = planner.candidates(context)

    def nats(p: Plan) -> float:
        return truth.loss(p.target_bits, p.keep_ratio)

    def best(legal: Callable[[Plan], bool], ms: float) -> float:
        found = [p for p in every if p.tpot_ms <= ms and legal(p)]
        chosen = min(found, key=lambda p: (p.quality_loss, p.tpot_ms), default=None)
        return math.nan if chosen is None else nats(chosen)

    for ms in times:
        try:
            plan = planner.plan(Targets(tpot_ms=ms, context=context)).plan
        except InputError:
            continue
        ideal = min(nats(p) for p in every if p.tpot_ms <= ms)
        rows.append(
            {
                "what": "plan", "tpot_ms": round(ms, 4), "context": context, "bits": round(plan.target_bits, 2),
                "kept": plan.keep_ratio, "loss": round(math.expm1(nats(plan)), 4),
                "regret": round(math.expm1(nats(plan) - ideal), 4),
                "weights_only": round(math.expm1(best(lambda p: p.keep_ratio == 1, ms)), 4),
                "fixed_30%": round(math.expm1(best(lambda p: abs(p.keep_ratio - 0.3) < 0.01, ms)), 4),
                "fixed_3_bits": round(math.expm1(best(lambda p: abs(p.target_bits - 3) < 0.03, ms)), 4),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--documents", type=int, default=12)
    args = parser.parse_args()
    run = begin(args)
    engine = open_engine()
    rows = times_come_true("reference model", engine, 4 * REPEATS)
    large = random_engine(SHAPE, PLANES, LoadOptions())
    of_shape = times_come_true(f"{SHAPE} shape", large, REPEATS)
    del large
    errors = {name: [abs(r["error"]) for r in of] for name, of in (("reference", rows), (SHAPE, of_shape))}
    rows += of_shape
    skip = QualityOptions().documents
    truth = measure_quality(
        engine, reference.heldout_text(), QualityOptions(documents=args.documents, skip=skip)
    )
    planner = Planner(plan_inputs(engine), measure_cost(engine), quality_of(engine))
    for context in (1024, 3500):
        fastest, slowest = (f(p.tpot_ms for p in planner.candidates(context)) for f in (min, max))
        times = [fastest + share * (slowest - fastest) for share in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)]
        rows += regret(planner, truth, times, context)
    columns = list(dict.fromkeys(k for row in rows for k in row))
    regrets = [r["regret"] for r in rows if "regret" in r]
    run.report(
        "plan_quality", [{c: row.get(c, "") for c in columns} for row in rows],
        measured_on=f"reference model; times also on random weights at the {SHAPE} shape",
        time_error={n: {"median": statistics.median(e), "largest": max(e)} for n, e in errors.items()},
        regret={"median": statistics.median(regrets), "largest": max(regrets)}, truth_tokens=truth.tokens,
    )  # fmt: skip


if __name__ == "__main__":
    main()
