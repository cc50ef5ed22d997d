"""Whether a time per token is held, in real generation: at the 1.1B shape on random weights, where a token reads from
memory as those of real models do (on the reference model other programs on the host move the time of a step by more
than all its widths do).

Limits measured, 16 tokens after each change: the median over the target (bar: within 3%), and the 95th percentile over
the target beside what a fixed width shows over its own median under the same circumstances (bar: 1.1 times that), while
(a) the context grows, (b) another program comes and goes, (c) the target changes between two tokens. The controlled
texts and those of a fixed width take turns. And, on the reference model, the spread of queries: bits and time of whole
texts, held on average and bounded by a token bucket.

    python bench/control_quality.py [--threads 1] [--rounds 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from random_engine import random_engine
from report import report

from dpllm import reference
from dpllm.cost import CostModel, measure
from dpllm.engine import Engine, GenerateOptions, load
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.loading import LoadOptions
from dpllm.quant.text import read_documents

SETTLED, FIXED, PIECES = 16, 3, 3
SHAPE, PLANES = "1.1B", 6
GROWING, LOADED, CHANGING = 450, 40, 120  # tokens: of a text, of a piece of a phase, until the target changes


def busy(until: float) -> None:
    """Uses a core, and memory's bandwidth."""
    x = np.ones(1 << 23)
    while time.perf_counter() < until:
        x.sum()


@contextmanager
def load_of(processes: int) -> Iterator[None]:
    """Other programs that use a core each."""
    context = multiprocessing.get_context("spawn")
    running = [
        context.Process(target=busy, args=(time.perf_counter() + 120,), daemon=True) for _ in range(processes)
    ]
    for p in running:
        p.start()
    time.sleep(1.5)
    try:
        yield
    finally:
        for p in running:
            p.terminate()
            p.join()


def pairs(engine: Engine, tokens: int) -> float:
    """Key-value pairs of so many tokens, over all layers and heads."""
    return float(engine.decoder.config.num_layers * engine.decoder.config.num_kv_heads * tokens)


def decoded(engine: Engine, prompt: str, tokens: int) -> Iterator[float]:
    """Milliseconds of each token behind the first."""
    steps = engine.generate(prompt, GenerateOptions(tokens + 1, ignore_eos=True))
    next(steps)
    for step in steps:
        yield step.tpot_ms


def row(name: str, phase: str, target: float, ms: list[float], fixed: list[float]) -> dict:
    """One phase against its bars."""
    of_fixed = float(np.percentile(fixed, 95)) / statistics.median(fixed)
    p95 = float(np.percentile(ms, 95)) / target
    median = statistics.median(ms) / target
    return {
        "what": name, "phase": phase, "target_ms": round(target, 4), "tokens": len(ms),
        "median_over_target": round(median, 4),
        "p95_over_target": round(p95, 4), "fixed_p95_over_median": round(of_fixed, 4),
        "p95_over_fixed": round(p95 / of_fixed, 4), "held": abs(median - 1) < 0.03, "p95_held": p95 <= 1.1 * of_fixed,
    }  # fmt: skip


def fixed_width(engine: Engine, prompt: str, tokens: int) -> list[float]:
    """The same text length at three bits everywhere."""
    engine.set_policy("uniform", FIXED)
    return list(decoded(engine, prompt, tokens))[SETTLED:]


def growing(engine: Engine, cost: CostModel, prompt: str, rounds: int) -> list[dict]:
    """(a): a text from a short prompt."""
    target, tokens = cost.step_ms(4.0, pairs(engine, GROWING)), GROWING
    ms: list[list[float]] = []
    fixed: list[list[float]] = []
    for _ in range(rounds):
        engine.hold_latency(target, cost)
        ms.append(list(decoded(engine, prompt, tokens)))
        engine.set_policy("uniform", FIXED)
        fixed.append(list(decoded(engine, prompt, tokens)))
    rows = []
    for first, last in ((SETTLED, GROWING // 2), (GROWING // 2, GROWING)):
        own, of_fixed = ([t for text in texts for t in text[first:last]] for texts in (ms, fixed))
        rows.append(row("growing context", f"tokens {first}-{last}", target, own, of_fixed))
    return rows


def loaded(engine: Engine, cost: CostModel, prompt: str, rounds: int, processes: int) -> list[dict]:
    """(b): alone, beside other programs, alone, one controller all the while. Texts are short and take turns with those
    of a fixed width, so that the host treats both alike."""
    found: dict[str, tuple[list, list, float]] = {}
    target = cost.step_ms(5.0, pairs(engine, 200))
    engine.hold_latency(target, cost)
    held = engine.controller
    for _ in range(rounds):
        for phase in ("before", "during", "after"):
            own = found.setdefault(phase, ([], [], target))
            with load_of(processes if phase == "during" else 0):
                for _ in range(PIECES):
                    engine.set_policy("rate-distortion", 4.0)
                    engine.controller = held
                    own[0].extend(list(decoded(engine, prompt, LOADED + SETTLED))[SETTLED:])
                    own[1].extend(fixed_width(engine, prompt, LOADED + SETTLED))
    return [row(f"load of {processes} program(s)", phase, t, m, f) for phase, (m, f, t) in found.items()]


def changing(engine: Engine, cost: CostModel, prompt: str, rounds: int) -> list[dict]:
    """(c): three targets within one text."""
    targets = [cost.step_ms(b, pairs(engine, 2 * CHANGING)) for b in (5.0, 3.5, 4.25)]
    found: list[list[float]] = [[], [], []]
    fixed: list[float] = []
    for _ in range(rounds):
        fixed += fixed_width(engine, prompt, CHANGING)
        engine.hold_latency(targets[0], cost)
        for i, ms in enumerate(decoded(engine, prompt, 3 * CHANGING)):
            phase, at = divmod(i, CHANGING)
            if at == 0 and i:
                engine.hold_latency(targets[phase], cost)
            if at >= SETTLED:
                found[phase].append(ms)
        fixed += fixed_width(engine, prompt, CHANGING)
    return [row("changing target", f"{i + 1}", target, found[i], fixed) for i, target in enumerate(targets)]


def queries(engine: Engine, texts: list[str], bits: float = 3.25, tokens: int = 96) -> list[dict]:
    """Effective bits and time of whole queries under each mode."""
    rows = []
    for mode in ("average", "bounded"):
        if mode == "average":
            engine.set_policy("rate-distortion", bits)
        else:
            engine.hold_budget(bits)
        found, ms = [], []
        for text in texts:
            steps = list(engine.generate(text, GenerateOptions(tokens, ignore_eos=True)))[1:]
            found.append(statistics.mean(s.effective_bits for s in steps))
            ms.append(statistics.median(s.tpot_ms for s in steps))
        row = {"what": "queries", "phase": f"{mode}, target {bits:g} bits", "queries": len(found)}
        for name, values in (("bits", found), ("ms", ms)):
            for q in (5, 50, 95):
                row[f"{name}_p{q}"] = round(float(np.percentile(values, q)), 4)
        rows.append({**row, "bits_most": round(max(found), 4)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    options = LoadOptions(cpu=CpuOptions(threads=args.threads))
    texts = [t[:400] for t in read_documents(reference.heldout_text()) if len(t) > 400][:48]
    engine = random_engine(SHAPE, PLANES, options)
    cost = measure(engine)
    rows = growing(engine, cost, texts[0], args.rounds)
    rows += loaded(engine, cost, texts[0], args.rounds, 1)
    rows += changing(engine, cost, texts[0], args.rounds)
    rows += queries(load(options=options), texts)
    columns = list(dict.fromkeys(k for r in rows for k in r))
    report(
        "control_quality", [{c: r.get(c, "") for c in columns} for r in rows], threads=args.threads,
        measured_on=f"random weights at the {SHAPE} shape; queries: reference model",
    )  # fmt: skip


if __name__ == "__main__":
    main()
