"""Measures what a limit on the time of a single token costs in quality, for several limits.

Under `--tpot-ms` the controller allows a single token at most `ControlOptions.headroom` times the target. A low
headroom keeps the 95th percentile of the time near the target, but takes bits away from the tokens that need them most.
For each headroom this script reports:

1. Quality, on the reference model at given targets in bits: perplexity under the limit, next to static widths and to no
   limit. `nats_over_static` is the difference to static widths in nats per token; `gain_kept` is the share of the gain
   (static minus no limit) that remains under the limit. Both have 95% intervals by a paired bootstrap over documents.
   The limit is on the bytes that a token reads, because time is nearly proportional to them on models of real size.
2. Time, at the 1.1B shape on random weights: median and 95th percentile of the time per token over the target. Texts of
   all headrooms and one text of a fixed width take turns, token by token. `p95_over_fixed` compares the 95th percentile
   over the target with that of the fixed width over its own median (bar: 1.1), with a 95% interval.

    python -m bench.quality.headroom [--headrooms 1.02,1.05,1.1,1.2] [--bits 3,4] [--documents 48] [--tokens 400]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.progress import track

from bench.common.random_engine import random_engine
from bench.common.report import arguments, begin
from bench.quality.control_quality import (
    PLANES,
    SETTLED,
    SHAPE,
    LimitedPolicy,
    decoded,
    interval,
    pairs,
    tails,
)
from dpllm import load, reference
from dpllm.base.text import read_documents
from dpllm.control.cost_model import CostModel
from dpllm.engine import Engine
from dpllm.evaluation.evaluate import DocumentScore, score, summarize
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.model.loading import LoadOptions
from dpllm.planning.cost_measurement import measure_cost
from dpllm.policies.make import make_policy
from dpllm.policies.token_limit import TokenLimit, WidthCosts

SAMPLES = 2000  # bootstrap samples
CHARACTERS = 1600  # of each document
BAR = 1.1  # p95 over the target, relative to that of a fixed width over its median


# -- quality ----------------------------------------------------------------------------------------------------


def limited(engine: Engine, bits: float, headroom: float) -> LimitedPolicy:
    """A policy that reads at most `headroom` times the mean bytes at `bits` for any token."""
    width_costs = WidthCosts.in_bytes(engine.decoder.groups)
    return LimitedPolicy(
        engine, bits, TokenLimit(round(engine.decoder.bytes_for(bits) * headroom), width_costs)
    )


@dataclass(frozen=True)
class Losses:
    """Losses of one setting: nats [documents], and tokens [documents]."""

    nats: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, scores: Sequence[DocumentScore]) -> Losses:
        return cls(np.asarray([s.nll for s in scores]), np.asarray([s.tokens for s in scores]))

    def per_token(self, drawn: np.ndarray) -> np.ndarray:
        """Returns nats per token of each bootstrap sample. drawn: numbers of documents [samples, documents]."""
        return self.nats[drawn].sum(1) / self.tokens[drawn].sum(1)


def with_interval(name: str, value: float, samples: np.ndarray) -> dict[str, float]:
    """Returns a value and its 95% interval as columns."""
    low, high = np.percentile(samples, (2.5, 97.5))
    return {name: round(value, 5), f"{name}_low": round(float(low), 5), f"{name}_high": round(float(high), 5)}


def compared(losses: Losses, static: Losses, unlimited: Losses, samples: int = SAMPLES) -> dict[str, float]:
    """Returns the difference to static widths and the share of the gain that is kept, with intervals.

    The same documents are drawn for all settings. The share is only meaningful if the interval of the gain excludes 0.
    """
    count = len(losses.nats)
    drawn = np.random.default_rng(0).integers(0, count, (samples, count))
    all_documents = np.arange(count)[None]

    def columns(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own, fixed, free = (x.per_token(documents) for x in (losses, static, unlimited))
        with np.errstate(divide="ignore", invalid="ignore"):
            return own - fixed, (fixed - own) / (fixed - free)

    (difference,), (share,) = columns(all_documents)
    differences, shares = columns(drawn)
    return with_interval("nats_over_static", float(difference), differences) | with_interval(
        "gain_kept", float(share), shares
    )


def quality(
    engine: Engine, documents: list[list[int]], bits: float, headrooms: Sequence[float]
) -> list[dict]:
    """Scores static widths, no limit, and every headroom at one target in bits."""
    policies = {
        "static": make_policy("static", bits, engine.decoder, engine.profile),
        "no limit": make_policy("rate-distortion", bits, engine.decoder, engine.profile),
        **{f"headroom {h:g}": limited(engine, bits, h) for h in headrooms},
    }
    scores = {
        phase: score(engine.decoder, policy, documents)
        for phase, policy in track(policies.items(), f"quality at {bits:g} bits")
    }
    static, unlimited = (Losses.of(scores[phase]) for phase in ("static", "no limit"))
    rows = []
    for phase, found in scores.items():
        whole = summarize(phase, bits, found, engine.decoder.head_bytes())
        row = {
            "what": f"perplexity at {bits:g} bits", "phase": phase, "tokens": whole.tokens,
            "bits": whole.effective_bits, "perplexity": whole.perplexity,
        }  # fmt: skip
        if phase != "static":
            row |= compared(Losses.of(found), static, unlimited)
        rows.append(row)
    return rows


# -- time -------------------------------------------------------------------------------------------------------


def held(engine: Engine, cost: CostModel, target: float, headroom: float) -> Engine:
    """Returns the same model, held to a time per token with this headroom."""
    other = Engine(engine.path, engine.decoder, engine.tokenizer, engine.profile)
    other.hold_latency(target, cost, headroom=headroom)
    return other


def fixed(engine: Engine, bits: float) -> Engine:
    """Returns the same model at the nearest fixed width."""
    other = Engine(engine.path, engine.decoder, engine.tokenizer, engine.profile)
    other.set_policy("uniform", round(bits))
    return other


def timing(
    engine: Engine, cost: CostModel, prompt: str, bits: float, headrooms: Sequence[float], tokens: int, rounds: int
) -> list[dict]:  # fmt: skip
    """Decodes a text for each headroom and one at a fixed width, in turns; the target is what these bits take."""
    target = cost.token_ms(bits, pairs(engine, tokens))
    engines = [fixed(engine, bits), *(held(engine, cost, target, h) for h in headrooms)]
    found = []
    for _ in track(range(rounds), f"time at {bits:g} bits"):
        texts = (decoded(e, prompt, tokens + SETTLED) for e in engines)
        found += list(zip(*texts, strict=True))[SETTLED:]
    times = np.array(found)  # [tokens, 1 + headrooms]
    rows = []
    for i, headroom in enumerate(headrooms, 1):
        both = times[:, [i, 0]]
        p95, of_fixed = tails(both, target)
        low, high = interval(both, target)
        rows.append({
            "what": f"time at {bits:g} bits", "phase": f"headroom {headroom:g}", "tokens": len(both),
            "target_ms": round(target, 4), "p50_over_target": round(float(np.median(both[:, 0])) / target, 4),
            "p95_over_target": round(p95, 4), "fixed_p95_over_median": round(of_fixed, 4),
            "p95_over_fixed": round(p95 / of_fixed, 4), "p95_over_fixed_low": low, "p95_over_fixed_high": high,
            "p95_held": p95 <= BAR * of_fixed,
        })  # fmt: skip
    return rows


def numbers(text: str) -> list[float]:
    """'1.02,1.05' -> [1.02, 1.05]."""
    return [float(x) for x in text.split(",")]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--headrooms", type=numbers, default=[1.02, 1.05, 1.1, 1.2])
    parser.add_argument("--bits", type=numbers, default=[3.0, 4.0])
    parser.add_argument("--documents", type=int, default=48, help="documents to score; 0: no quality")
    parser.add_argument("--tokens", type=int, default=400, help="timed tokens of each text; 0: no timing")
    parser.add_argument("--rounds", type=int, default=3, help="texts to time at each target")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    run = begin(args)
    options = LoadOptions(cpu=CpuOptions(threads=args.threads))
    texts = read_documents(reference.heldout_text())
    rows: list[dict] = []
    if args.documents:
        engine = load(threads=args.threads)
        documents = [engine.prompts.prompt_ids(t[:CHARACTERS]) for t in texts[: args.documents]]
        for bits in args.bits:
            rows += quality(engine, documents, bits, args.headrooms)
    if args.tokens:
        engine = random_engine(SHAPE, PLANES, options)
        cost = measure_cost(engine)
        for bits in args.bits:
            rows += timing(engine, cost, texts[0][:400], bits, args.headrooms, args.tokens, args.rounds)
    columns = list(dict.fromkeys(k for r in rows for k in r))
    run.report(
        "headroom", [{c: r.get(c, "") for c in columns} for r in rows], threads=args.threads,
        measured_on=f"quality: reference model; time: random weights at the {SHAPE} shape",
    )  # fmt: skip


if __name__ == "__main__":
    main()
