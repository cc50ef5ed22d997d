"""Measures quality and latency of policies over targets: quality with evaluation/evaluate.py, latency of real steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import stdtrit

from dpllm.base.errors import InputError
from dpllm.base.progress import Progress
from dpllm.engine import Engine
from dpllm.evaluation.evaluate import DocumentScore, score, summarize
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.policies.base import PrecisionPolicy
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.make import make_policy, resident_mean
from dpllm.report.data import CurvePoint, Difference, Frontier, Spread
from dpllm.report.timed_steps import interleaved_ms

OURS = "rate-distortion"
WIDEST = "uniform"
STEPS_ABOVE_SEED = (0.5, 1.0, 1.5, 2.0, 3.0)  # default targets, in bits above the seed width
ROUNDS = 8  # turns of each policy when steps are timed

Cell = tuple[str, float]  # policy, target bits


def default_targets(engine: Engine) -> list[float]:
    """Returns a few targets between the seed width and the resident bits."""
    first, high = engine.decoder.groups[0], resident_mean(engine.decoder)
    found = [first.seed_bits + s for s in STEPS_ABOVE_SEED if first.seed_bits + s <= high]
    return found or [high]


def cells_of(
    engine: Engine, policies: Sequence[str], targets: Sequence[float], explicit: bool
) -> tuple[dict[Cell, PrecisionPolicy], list[str]]:
    """Makes every policy, and rate-distortion, at every target it can take.

    Returns the policies, and notes on those that are left out. explicit: the user named the policies,
    so a policy without any possible target raises InputError.
    """
    cells: dict[Cell, PrecisionPolicy] = {}
    notes = []
    for name in dict.fromkeys((*policies, OURS)):
        own = _targets_of(name, engine, targets)
        if not own and not explicit:
            notes.append(_how_to_calibrate(name, targets))
        for target in own or targets[: int(explicit)]:  # without an own target, make_policy raises an error
            cells[name, target] = make_policy(name, target, engine.decoder, engine.profile)
    return cells, notes


def _targets_of(name: str, engine: Engine, targets: Sequence[float]) -> list[float]:
    """Returns the targets that a policy can take.

    DP-LLM is calibrated for single targets; the result holds the calibrated targets nearest to `targets`.
    """
    if name == WIDEST:
        return [t for t in targets if t == int(t)]
    if not name.endswith("dp-llm"):
        return list(targets)
    extra = {} if engine.profile is None else engine.profile.extra
    stored = np.unique(extra.get("dp-llm.targets", np.empty(0)))
    return sorted({float(stored[np.abs(stored - t).argmin()]) for t in targets}) if len(stored) else []


def _how_to_calibrate(name: str, targets: Sequence[float]) -> str:
    """Returns the note about a policy that this profile was not calibrated for."""
    wanted = ",".join(f"{t:g}" for t in targets)
    return (
        f"{name} is left out, because this profile was not calibrated for it. Run: dpllm calibrate OVERLAY --dp-llm "
        f"--targets {wanted}"
    )


def measure_frontier(
    engine: Engine, cells: dict[Cell, PrecisionPolicy], cache: KVCache, documents: Sequence[Sequence[int]],
    text: str, notes: Sequence[str], progress: Progress,
) -> Frontier:  # fmt: skip
    """Times and scores every cell, and the policy that reads every resident plane.

    Steps are timed after `cache`, which is restored. documents: token ids to score. text: their name.
    """
    groups = engine.decoder.groups
    widest: Cell = (WIDEST, resident_mean(engine.decoder))
    everything: dict[Cell, PrecisionPolicy] = dict(cells)
    everything[widest] = StaticPolicy([g.resident_bits for g in groups], name=WIDEST)
    tokens = [t for d in documents for t in d[1:]]
    times = interleaved_ms(engine, everything, cache, tokens, ROUNDS, lambda *at: progress("latency", *at))
    scored = sum(len(d) - 1 for d in documents)
    tick = _Ticker(progress, "quality", scored * len(everything))
    found = {
        cell: _point(engine, cell, policy, documents, times[cell], tick)
        for cell, policy in everything.items()
    }
    best = found[widest] if widest in cells else found.pop(widest)
    return Frontier(
        points=tuple(found.values()), widest=best, text=text, documents=len(documents), scored=scored,
        kv_bytes=cache.nbytes, notes=tuple(notes),
    )  # fmt: skip


def _point(
    engine: Engine, cell: Cell, policy: PrecisionPolicy, documents: Sequence[Sequence[int]], ms: list[float],
    tick: Callable[[int], None],
) -> CurvePoint:  # fmt: skip
    name, target = cell
    scores = score(engine.decoder, policy, documents, tick)
    whole = summarize(name, target, scores, engine.decoder.head_bytes())
    if math.isinf(whole.perplexity):
        raise InputError(
            f"no chart can show the perplexity of policy '{name}' at {target:g} bits: it is beyond floats "
            f"({whole.nll_mean:g} nats per token). Report on a text of the model's own kind, or repair the model."
        )
    less_static = None
    if name not in ("static", WIDEST) and len(scores) > 1:
        seed, high = engine.decoder.groups[0].seed_bits, resident_mean(engine.decoder)
        equal = min(max(whole.effective_bits, seed), high)  # the mean was rounded and may lie outside by that
        fixed = make_policy("static", equal, engine.decoder, engine.profile)
        less_static = difference(scores, score(engine.decoder, fixed, documents))
    return CurvePoint(
        policy=name, target_bits=target, effective_bits=whole.effective_bits, perplexity=whole.perplexity,
        weight_bytes=whole.weight_bytes_per_token, tpot_ms=Spread.of(ms), less_static=less_static,
    )  # fmt: skip


def difference(one: Sequence[DocumentScore], other: Sequence[DocumentScore]) -> Difference:
    """Returns nats per token of `one` minus those of `other`, paired over documents, with Student's 95% interval."""
    tokens = np.asarray([s.tokens for s in one], dtype=float)
    gap = np.asarray([a.nll - b.nll for a, b in zip(one, other, strict=True)])
    n, mean = len(gap), gap.sum() / tokens.sum()
    error = np.sqrt(n / (n - 1) * ((gap - mean * tokens) ** 2).sum()) / tokens.sum()
    reach = stdtrit(n - 1, 0.975) * error
    return Difference(*(round(float(v), 5) for v in (mean, mean - reach, mean + reach)))


class _Ticker:
    """Adds up finished tokens for a progress bar."""

    def __init__(self, progress: Progress, stage: str, total: int):
        self.progress, self.stage, self.total, self.done = progress, stage, total, 0

    def __call__(self, more: int) -> None:
        self.done += more
        self.progress(self.stage, self.done, self.total)
