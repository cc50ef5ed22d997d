"""DP-LLM as published (arXiv:2508.06041), calibrated for what will run: the yardstick.

Stages, each on the calibration text:

1. maximum widths B_i under the memory budget (calib/allocation.py);
2. average precision p_i per target by gradient descent: p = seed + sigmoid(z) (B - seed), outputs interpolated
   between the two widths around p, loss = cross entropy + alpha (mean p - target)^2, only z trained;
3. for each group and pair (l, l+1) an estimator of e = ||(W_{l+1} - W_l) x||: a line in ||x|| where that
   explains 90% of e, else ||G x|| with G = A (W_{l+1} - W_l), A ~ N(0, 1/k), k = 64, tuned on the text;
4. the threshold is the quantile of the estimate at which the wider width is taken with probability frac(p).

What the released code gets wrong is not copied: estimators and quantiles are fitted on the signal that the
runtime compares (the estimate itself, of the stale input, in the quantised model), a group whose budget is the
seed is left alone, whole-numbered averages keep a gradient, and nothing decays p.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpllm.calib.dense import dense
from dpllm.calib.measure import LABEL_STREAM, Progress
from dpllm.calib.rule import stale_sources

QUANTILES = 257  # stored points of an estimate's distribution
LINE, PROJECTION = 0, 1


@dataclass(frozen=True)
class DPLLMOptions:
    """k: rows of a projection; explained: R^2 from which a line serves; steps, learning_rate: fine-tuning of
    averages, one sequence of `length` tokens each; continued: steps of a target that goes on from its
    neighbour's averages; alpha: weight of the bit penalty; tokens: inputs kept for
    the estimators; tune_steps: descent on G; asynchronous: estimates read inputs one sub-block old."""

    k: int = 64
    explained: float = 0.9
    steps: int = 160
    continued: int = 32
    length: int = 256
    learning_rate: float = 0.1
    alpha: float = 1.0
    tokens: int = 4096
    tune_steps: int = 150
    asynchronous: bool = True
    seed: int = 0


# -- stage 2: average precision ---------------------------------------------------------------------------


@contextmanager
def interpolated(decoder: Any, caps: np.ndarray) -> Iterator[None]:
    """Lets `select` answer with a fractional width (a float tensor, one value for all rows): the output is
    then interpolated between the two widths around it, and gradients flow into the width."""
    backend = decoder.backend
    cap = {id(g.weight): int(c) for g, c in zip(decoder.groups, caps, strict=True)}

    def gemv(x: Tensor, w: Any, bits: Tensor, out: Tensor | None = None) -> Tensor:
        if not bits.is_floating_point():
            return backend.gemv(x, w, bits, out)
        p = bits[0]
        low = lower_width(float(p.detach()), w.seed_bits, cap[id(w)])
        y = x @ backend.dequantize(w, low, x.dtype).T
        if low == cap[id(w)]:  # the seed is all there is
            return y
        return y + (p - low) * (x @ backend.dequantize(w, low + 1, x.dtype).T - y)

    decoder.backend = replace(backend, gemv=gemv)
    try:
        yield
    finally:
        decoder.backend = backend


def lower_width(p: float, seed: int, cap: int) -> int:
    """The lower of the two candidate widths of an average p: they are distinct even where p is whole."""
    return max(seed, min(int(np.floor(p)), cap - 1))


def averages(z: Tensor, seed: int, caps: Tensor) -> Tensor:
    """p = seed + sigmoid(z) (B - seed), float [G]."""
    return seed + torch.sigmoid(z) * (caps - seed)


def shifted_to(z: Tensor, seed: int, caps: Tensor, weights: Tensor, target: float) -> Tensor:
    """z moved by one common number so that the weighted mean of p is the target (bisection)."""
    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = (averages(z + middle, seed, caps) * weights).sum() / weights.sum()
        low, high = (middle, high) if mean < target else (low, middle)
    return z + (low + high) / 2


def tune_averages(
    decoder: Any, sequences: Tensor, caps: np.ndarray, target: float, options: DPLLMOptions,
    start: np.ndarray | None = None, progress: Progress = lambda stage, done, total: None,
) -> np.ndarray:  # fmt: skip
    """Average precision float64 [G] of every group for a target.

    sequences: int64 [S, T]. caps: maximum widths [G]. start: z [G] to begin from (default: p near the target).
    """
    seed = decoder.groups[0].seed_bits
    cap = torch.from_numpy(np.asarray(caps, np.float64))
    weights = torch.tensor([float(g.weights) for g in decoder.groups], dtype=torch.float64)
    begin = torch.zeros(len(caps), dtype=torch.float64) if start is None else torch.from_numpy(start)
    z = shifted_to(begin, seed, cap, weights, target).clamp(-8, 8).requires_grad_()
    optimizer = torch.optim.AdamW([z], lr=options.learning_rate, weight_decay=0.0)
    pieces = sequences[:, : options.length]
    with interpolated(decoder, caps):
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * (1 - step / options.steps)
            ids = pieces[step % len(pieces)]
            p = averages(z, seed, cap)
            widths = p.float().to(ids.device)

            def select(group: Any, x: Tensor, widths: Tensor = widths) -> Tensor:
                return widths[group.index].expand(len(x))

            logits = decoder.forward(ids[:-1], select=select)
            loss = torch.nn.functional.cross_entropy(logits, ids[1:])
            penalty = ((p * weights).sum() / weights.sum() - target) ** 2
            optimizer.zero_grad()
            (loss + options.alpha * penalty).backward()
            optimizer.step()
            progress("averages", step + 1, options.steps)
    return averages(shifted_to(z.detach(), seed, cap, weights, target), seed, cap).numpy()


# -- stages 3 and 4: estimators and their distributions ---------------------------------------------------


@dataclass(frozen=True)
class Estimator:
    """Of e = ||(W_{l+1} - W_l) x|| from the deployed input. kind: LINE (line: slope, intercept) or PROJECTION
    (projection: float16 [k, K]). explained: R^2 of the line. quantiles, exact: float32 [257], distributions
    of the estimate and of e."""

    kind: int
    line: np.ndarray
    projection: np.ndarray | None
    explained: float
    quantiles: np.ndarray
    exact: np.ndarray


def gather_inputs(
    decoder: Any, sequences: Tensor, options: DPLLMOptions, progress: Progress
) -> dict[int, Tensor]:
    """Inputs [T, K] of every group, at random widths. Groups that read the same input share one tensor."""
    kept: dict[int, list[Tensor]] = {g.index: [] for g in decoder.groups}
    widths = list(range(decoder.groups[0].seed_bits, decoder.groups[0].resident_bits + 1))
    odds = 0.75 ** np.arange(len(widths))
    count = max(1, min(len(sequences), options.tokens // sequences.shape[1]))
    with torch.no_grad():
        for i, ids in enumerate(sequences[:count]):
            rng = np.random.default_rng([options.seed, i, LABEL_STREAM])
            last: list[Any] = [None]

            def select(group: Any, x: Tensor, rng: Any = rng) -> Tensor:
                drawn = rng.choice(widths, size=len(x), p=odds / odds.sum())
                return torch.as_tensor(drawn, dtype=torch.int32, device=x.device)

            def observe(group: Any, x: Tensor, y: Tensor, last: list[Any] = last) -> None:
                kept[group.index].append(x)

            decoder.forward(ids, select=select, observe=observe)
            progress("inputs", i + 1, count)
    return {g: torch.cat(parts).float() for g, parts in kept.items()}


def fit_estimator(
    delta: Tensor, fresh: Tensor, read: Tensor, ratio: Tensor | None, options: DPLLMOptions
) -> Estimator:
    """delta: [N, K], W_{l+1} - W_l. fresh, read: [T, K], the group's input and the one the estimate reads.
    ratio: [K], read * ratio stands for fresh (None: they are the same)."""
    exact = (fresh @ delta.T).norm(dim=1)
    size = read.norm(dim=1)
    design = torch.stack([size, torch.ones_like(size)], dim=1).double()
    line = torch.linalg.lstsq(design, exact.double()[:, None]).solution[:, 0]
    spread = (exact - exact.mean()).double().square().sum()
    explained = float(1 - (exact.double() - design @ line).square().sum() / spread) if spread > 0 else 1.0
    if explained >= options.explained:
        estimate, projection = (design @ line).float(), None
    else:
        projection = tuned_projection(delta if ratio is None else delta * ratio, read, exact, options)
        estimate = (read @ projection.float().T).norm(dim=1)
    share = torch.linspace(0, 1, QUANTILES, device=exact.device)
    return Estimator(
        LINE if projection is None else PROJECTION,
        line.float().cpu().numpy(),
        None if projection is None else projection.numpy(),
        explained,
        torch.quantile(estimate, share).cpu().numpy(),
        torch.quantile(exact, share).cpu().numpy(),
    )


def tuned_projection(delta: Tensor, read: Tensor, exact: Tensor, options: DPLLMOptions) -> Tensor:
    """G float16 [k, K], from a random projection of delta to the least squared error of ||G x||."""
    generator = torch.Generator().manual_seed(options.seed)
    draw = torch.randn(options.k, len(delta), generator=generator) / options.k**0.5
    g = (draw.to(delta.device) @ delta).requires_grad_()
    scale = float(g.detach().abs().mean())
    optimizer = torch.optim.Adam([g], lr=0.02 * scale)
    best, found = float("inf"), g.detach().clone()
    for _ in range(options.tune_steps):
        loss = ((read @ g.T).norm(dim=1) - exact).square().mean()
        if float(loss.detach()) < best:
            best, found = float(loss.detach()), g.detach().clone()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found.to(torch.float16).cpu()


def calibrate_dp_llm(
    decoder: Any, sequences: Tensor, caps: dict[str, np.ndarray], targets: dict[str, list[float]],
    options: DPLLMOptions, progress: Progress = lambda stage, done, total: None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Arrays "dp-llm.*" for a profile: averages of every target under its budget, and the estimators they need.

    caps: maximum widths [G] per budget ("6", "5"). targets: of each budget; those above it are left out.
    """
    seed = decoder.groups[0].seed_bits
    rows: list[tuple[float, float, np.ndarray]] = []
    with dense(decoder):
        jobs = [(b, t) for b in caps for t in sorted(targets[b]) if t <= float(b)]
        start: np.ndarray | None = None
        for i, (budget, target) in enumerate(jobs):
            if i and jobs[i - 1][0] != budget:
                start = None
            steps = options.steps if start is None else min(options.continued, options.steps)
            p = tune_averages(decoder, sequences, caps[budget], target, replace(options, steps=steps), start)
            span = np.maximum(caps[budget] - seed, 1e-9)
            share = np.clip((p - seed) / span, 1e-3, 1 - 1e-3)
            start = np.log(share / (1 - share))  # the next target continues from here
            rows.append((float(budget), target, p))
            progress("averages", i + 1, len(jobs))
        pairs = sorted(
            {(g, lower_width(p[g], seed, int(caps[f"{b:g}"][g])) - seed)
             for b, _, p in rows for g in range(len(p)) if caps[f"{b:g}"][g] > seed}
        )  # fmt: skip
        estimators = _estimators(decoder, sequences, pairs, options, progress)
    source = stale_sources(decoder.layers)[0] if options.asynchronous else list(range(len(decoder.groups)))
    return _packed(decoder, rows, caps, source, estimators)


def _estimators(
    decoder: Any, sequences: Tensor, pairs: list[tuple[int, int]], options: DPLLMOptions, progress: Progress
) -> dict[tuple[int, int], Estimator]:
    inputs = gather_inputs(decoder, sequences, options, progress)
    source, ratio = stale_sources(decoder.layers)
    if not options.asynchronous:
        source, ratio = list(range(len(decoder.groups))), [None] * len(decoder.groups)
    found = {}
    for i, (g, step) in enumerate(pairs):
        group = decoder.groups[g]
        low = group.seed_bits + step
        dequantize = decoder.backend.dequantize
        delta = dequantize(group.weight, low + 1) - dequantize(group.weight, low)
        found[g, step] = fit_estimator(delta, inputs[g], inputs[source[g]], ratio[g], options)
        progress("estimators", i + 1, len(pairs))
    return found


def _packed(
    decoder: Any, rows: list[tuple[float, float, np.ndarray]], caps: dict[str, np.ndarray], source: list[int],
    estimators: dict[tuple[int, int], Estimator],
) -> dict[str, np.ndarray]:  # fmt: skip
    first = decoder.groups[0]
    shape = (len(decoder.groups), first.resident_bits - first.seed_bits)
    kind = np.full(shape, -1, np.int64)
    explained = np.zeros(shape)
    line = np.zeros((*shape, 2), np.float32)
    quantiles, exact = np.zeros((*shape, QUANTILES), np.float32), np.zeros((*shape, QUANTILES), np.float32)
    arrays: dict[str, np.ndarray] = {}
    for (g, step), e in estimators.items():
        kind[g, step], line[g, step], explained[g, step] = e.kind, e.line, e.explained
        quantiles[g, step], exact[g, step] = e.quantiles, e.exact
        if e.projection is not None:
            arrays[f"dp-llm.projection.{g}.{step}"] = e.projection
    return arrays | {
        "dp-llm.budgets": np.asarray([r[0] for r in rows]),
        "dp-llm.targets": np.asarray([r[1] for r in rows]),
        "dp-llm.averages": np.stack([r[2] for r in rows]),
        "dp-llm.caps": np.stack([caps[f"{r[0]:g}"] for r in rows]).astype(np.int64),
        "dp-llm.source": np.asarray(source, np.int64),
        "dp-llm.kind": kind,
        "dp-llm.line": line,
        "dp-llm.explained": explained,
        "dp-llm.quantiles": quantiles,
        "dp-llm.exact": exact,
    }
