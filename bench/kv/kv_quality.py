"""What a pruned KV cache still knows: recall and continuation against the share of pairs kept, for every policy.

Limit measured: exact answers (greedy) and nats per token of the bundled reference model (trained by us to recall and to
repeat; not a real-world model), its weights at the resident maximum unless a row says otherwise, on code it was never
trained on. A context is read and pruned once, then asked questions that the policy has not seen, each from the same
cache. Differences to the whole cache and to KVzip come with paired bootstrap intervals over documents.

    python -m bench.kv.kv_quality [--work DIR] [--jobs N] [--plot docs/kv_quality.png]

Continues where it was stopped; one line a document in the work directory.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common.report import arguments, begin
from bench.kv import kv_documents
from bench.kv.kv_cells import BLOCKWISE, POLICIES, RATIOS, WIDTHS, measure
from bench.kv.kv_plot import plot
from dpllm import reference
from dpllm.context.head_profile import head_profile
from dpllm.engine import Engine
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.model.loading import LoadOptions
from dpllm.opening import open_engine

# name: (documents, how one is made, its arguments, whether the weights' width is varied too)
TASKS: dict[str, tuple[int, str, tuple[int, ...], bool]] = {
    "10 facts, 1024 tokens": (100, "recall", (1024, 10), True),
    "20 facts, 3072 tokens": (50, "recall", (3072, 20), False),
    "continuation of 1024 tokens": (60, "continuation", (1024,), False),
    "needle, 512 tokens": (1000, "recall", (512, 1), False),
}
CALIBRATION = 8  # documents of facts from which the profile of heads is made, none of them asked

_engine: Engine
_heads: torch.Tensor


def _start(cores: Any, heads: torch.Tensor) -> None:
    global _engine, _heads
    os.sched_setaffinity(0, cores.get())
    torch.set_num_threads(1)
    _engine, _heads = open_engine(options=LoadOptions(cpu=CpuOptions(threads=1))), heads


def _measure(task: str, number: int) -> tuple[str, int, dict]:
    _, kind, arguments, widths = TASKS[task]
    document = getattr(kv_documents, kind)(number, *arguments)
    return task, number, measure(_engine, document, _heads, widths)


def profile_of_heads() -> torch.Tensor:
    """The largest KVzip score of every head over texts of facts, float32 [P, KVH]."""
    engine = open_engine()
    texts = [kv_documents.recall(-1 - i, 1024, 10).context for i in range(CALIBRATION)]
    return head_profile(texts, decoder=engine.decoder, prompts=engine.prompts)


def results(work: Path, jobs: int) -> dict[str, dict[int, dict]]:
    """Outcomes by task and document; measures what is not in the work directory yet (jobs 0: nothing)."""
    found: dict[str, dict[int, dict]] = {task: {} for task in TASKS}
    path = work / "outcomes.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        task, number, outcomes = json.loads(line)
        found[task][number] = outcomes
    missing = [(t, n) for t, (count, *_) in TASKS.items() for n in range(count) if n not in found[t]]
    missing.sort(
        key=lambda item: (item[1] + 1) / TASKS[item[0]][0]
    )  # all tasks grow alike: stopped early, each has some
    if missing and jobs:
        with path.open("a") as out:
            for i, (task, number, outcomes) in enumerate(_run(missing, jobs)):
                found[task][number] = outcomes
                out.write(json.dumps([task, number, outcomes]) + "\n")
                out.flush()
                if i % 20 == 0:
                    print(f"[{i + 1}/{len(missing)}] {task}", flush=True)
    return found


def _run(missing: list[tuple[str, int]], jobs: int) -> Iterator[tuple[str, int, dict]]:
    context, own = multiprocessing.get_context("spawn"), sorted(os.sched_getaffinity(0))
    cores = context.Queue()
    for i in range(jobs):
        cores.put(set(own[i::jobs]) or {own[i % len(own)]})
    with ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(cores, profile_of_heads())) as pool:
        yield from pool.map(_measure, *zip(*missing, strict=True), chunksize=4)


# -- figures -----------------------------------------------------------------------------------------------------


def interval(differences: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of sums over documents [D] by weights, 95% bootstrap."""
    draws = np.random.default_rng(0).integers(0, len(differences), (4000, len(differences)))
    means = differences[draws].sum(1) / weights[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(differences.sum() / weights.sum()), float(low), float(high)


def rows_of(task: str, documents: dict[int, dict]) -> Iterator[dict]:
    """A row for every policy, ratio and width."""
    scored = task.startswith("continuation")

    def sums(key: str) -> tuple[np.ndarray, np.ndarray]:
        cells = [documents[n][key] for n in sorted(documents)]
        values = [
            [sum(o[1] for o in c), sum(o[2] for o in c)] if scored else [sum(o[0] for o in c), len(c)]
            for c in cells
        ]
        return np.asarray(values, float).T

    for key in next(iter(documents.values())):
        name, ratio, bits = key.split("|")
        value, count = sums(key)
        whole, kvzip = sums(f"keep-all|1|{bits}")[0], key if name == "keep-all" else f"kvzip|{ratio}|{bits}"
        against = [interval(value - other, count) for other in (whole, sums(kvzip)[0])]
        yield {
            "task": task, "policy": name, "kept": float(ratio), "weights": "maximum" if bits == "0" else f"{bits} bits",
            "measure": "nats per token" if scored else "share of exact answers",
            "value": round(float(value.sum() / count.sum()), 4),
            "count": int(count.sum()), "documents": len(documents),
            **{f"{of}_{k}": round(v, 4) for of, three in zip(("less_whole", "less_kvzip"), against, strict=True)
               for k, v in zip(("mean", "low", "high"), three, strict=True)},
        }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/kv_quality"))
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with a share of the cores")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--available", action="store_true", help="report what is measured, measure no more")
    args = parser.parse_args()
    run = begin(args)
    args.work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    found = results(args.work, 0 if args.available else args.jobs)
    rows = [row for task, documents in found.items() if documents for row in rows_of(task, documents)]
    run.report(
        "kv_quality", rows, measured_on="reference model", seconds=round(time.perf_counter() - began),
        overlay=str(reference.overlay_path().name), policies=[*POLICIES, BLOCKWISE], ratios=RATIOS, widths=WIDTHS,
    )  # fmt: skip
    if args.plot:  # after the result, which is not written from an edited work tree
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
