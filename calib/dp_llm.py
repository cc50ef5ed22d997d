"""Calibrates DP-LLM as published (arXiv:2508.06041), for comparison, on the decoder that will generate text.

Stages, each on the calibration text:

1. maximum widths B_i under the memory budget (calib/allocation.py);
2. average precision p_i per target by gradient descent (calib/dp_llm_averages.py);
3. for each group and pair (l, l+1) an estimator of e = ||(W_{l+1} - W_l) x||: a line in ||x|| where that
   explains 90% of e, else ||G x|| with G = A (W_{l+1} - W_l), A ~ N(0, 1/k), k = 64, tuned on the text;
4. the threshold is the quantile of the estimate at which the wider width is taken with probability frac(p).

Errors of the released code are not copied. Estimators and quantiles are fitted on the signal that the runtime
compares: the estimate itself, of the stale input, in the quantised model. A group whose budget is the seed is not
tuned. Averages that are whole numbers keep a gradient. No weight decay acts on p.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpllm.base.progress import Progress, no_progress
from dpllm.calib.decoder_protocol import CalibrationDecoder, CalibrationGroup
from dpllm.calib.dequantised import dequantised_view
from dpllm.calib.dp_llm_averages import AveragesOptions, lower_width, tune_averages
from dpllm.calib.gradient_passes import LABEL_STREAM
from dpllm.calib.partial_results import Arrays, PartialResults
from dpllm.calib.runtime.threshold_rule import stale_sources

QUANTILES = 257  # stored points of an estimate's distribution
LINE, PROJECTION = 0, 1


@dataclass(frozen=True)
class DPLLMOptions:
    """Options of one DP-LLM calibration.

    k: rows of a projection. explained: least R^2 at which a line is used. averages: options of stage 2. continued:
    steps of stage 2 for a target that starts from its neighbour's averages. tokens: inputs kept for the estimators.
    tune_steps: steps of the descent on G. asynchronous: estimates read inputs one sub-block older.
    """

    k: int = 64
    explained: float = 0.9
    averages: AveragesOptions = field(default_factory=AveragesOptions)
    continued: int = 100
    tokens: int = 4096
    tune_steps: int = 150
    asynchronous: bool = True
    seed: int = 0


# -- stages 3 and 4: estimators and their distributions ---------------------------------------------------


@dataclass(frozen=True)
class Estimator:
    """Estimates e = ||(W_{l+1} - W_l) x|| from the input that the runtime reads.

    kind: LINE or PROJECTION. line: float32 [2], slope and intercept. projection: float16 [k, K], None for a line.
    explained: R^2 of the line. quantiles, exact: float32 [257], the distributions of the estimate and of e.
    """

    kind: int
    line: np.ndarray
    projection: np.ndarray | None
    explained: float
    quantiles: np.ndarray
    exact: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields as arrays, to be stored."""
        found = {
            "kind": np.asarray([self.kind]),
            "explained": np.asarray([self.explained]),
            "line": self.line,
        }
        found |= {"quantiles": self.quantiles, "exact": self.exact}
        return found if self.projection is None else found | {"projection": self.projection}

    @classmethod
    def of_arrays(cls, arrays: Arrays) -> Estimator:
        """The estimator whose `arrays` these are."""
        return cls(
            int(arrays["kind"][0]), arrays["line"], arrays.get("projection"), float(arrays["explained"][0]),
            arrays["quantiles"], arrays["exact"],
        )  # fmt: skip


def gather_inputs(
    decoder: CalibrationDecoder, sequences: Tensor, options: DPLLMOptions, progress: Progress
) -> dict[int, Tensor]:
    """The float32 inputs [T, K] of every group in decoding at random widths, by group index.

    sequences: int64 [S, T].
    """
    kept: dict[int, list[Tensor]] = {g.index: [] for g in decoder.groups}
    widths = list(range(decoder.groups[0].seed_bits, decoder.groups[0].resident_bits + 1))
    odds = 0.75 ** np.arange(len(widths))
    count = max(1, min(len(sequences), options.tokens // sequences.shape[1]))
    with torch.no_grad():
        for i, ids in enumerate(sequences[:count]):
            rng = np.random.default_rng([options.seed, i, LABEL_STREAM])

            def select(group: CalibrationGroup, x: Tensor, rng: np.random.Generator = rng) -> Tensor:
                drawn = rng.choice(widths, size=len(x), p=odds / odds.sum())
                return torch.as_tensor(drawn, dtype=torch.int32, device=x.device)

            def observe(group: CalibrationGroup, x: Tensor, y: Tensor) -> None:
                kept[group.index].append(x)

            decoder.forward(ids, select=select, observe=observe)
            progress("inputs", i + 1, count)
    return {g: torch.cat(parts).float() for g, parts in kept.items()}


def fit_estimator(
    delta: Tensor, fresh: Tensor, read: Tensor, ratio: Tensor | None, options: DPLLMOptions
) -> Estimator:
    """Fits the estimator of one group and one pair of widths.

    delta: [N, K], W_{l+1} - W_l. fresh, read: float32 [T, K], the group's input, and the input that the estimate
    reads. ratio: [K], by which `read` is multiplied to approximate `fresh` (None: the two are equal).
    """
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
    """G float16 [k, K]: starts as a random projection of delta; gradient descent reduces the error of ||G x||.

    read: [T, K], the inputs x. exact: [T], the norms to estimate.
    """
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


Average = tuple[float, float, np.ndarray]  # budget, target, average widths [G]


def calibrate_dp_llm(
    decoder: CalibrationDecoder, sequences: Tensor, caps: dict[str, np.ndarray], targets: dict[str, list[float]],
    options: DPLLMOptions, progress: Progress = no_progress, rows: list[Average] | None = None,
    partial: PartialResults | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Arrays "dp-llm.*" for a profile: averages of every target under its budget, and their estimators.

    sequences: int64 [S, T]. caps: maximum widths [G] per budget ("6", "5"). targets: of each budget; targets above
    their budget are left out. rows: averages that were tuned before; `targets` is then ignored. partial: keeps finished
    averages and estimators.
    """
    partial = partial or PartialResults()
    seed = decoder.groups[0].seed_bits
    view = dequantised_view(decoder)
    if rows is None:
        rows = _tuned(view, sequences, caps, targets, options, progress, partial)
    pairs = sorted(
        {(g, lower_width(p[g], seed, int(caps[f"{b:g}"][g])) - seed)
         for b, _, p in rows for g in range(len(p)) if caps[f"{b:g}"][g] > seed}
    )  # fmt: skip
    estimators = _estimators(view, sequences, pairs, options, progress, partial)
    source = stale_sources(decoder.layers)[0] if options.asynchronous else list(range(len(decoder.groups)))
    return _packed(decoder, rows, caps, source, estimators)


def _tuned(
    decoder: CalibrationDecoder, sequences: Tensor, caps: dict[str, np.ndarray], targets: dict[str, list[float]],
    options: DPLLMOptions, progress: Progress, partial: PartialResults,
) -> list[Average]:  # fmt: skip
    """Tunes the averages of every budget and target. Each target starts from its neighbour's averages."""
    seed = decoder.groups[0].seed_bits
    jobs = [(b, t) for b in caps for t in sorted(targets[b]) if t <= float(b)]
    rows: list[Average] = []
    start: np.ndarray | None = None
    read = 0
    chain: list[Any] = [asdict(options)]  # what the averages depend on: the options and all targets before
    for i, (budget, target) in enumerate(jobs):
        if i and jobs[i - 1][0] != budget:
            start = None
        tuning = options.averages
        if start is not None:
            tuning = replace(tuning, steps=min(options.continued, tuning.steps))
        chain.append([budget, target, caps[budget].tolist()])

        def tune(
            budget: str = budget, target: float = target, tuning: AveragesOptions = tuning, read: int = read,
            start: np.ndarray | None = start,
        ) -> dict[str, np.ndarray]:  # fmt: skip
            return {
                "p": tune_averages(decoder, sequences.roll(-read, 0), caps[budget], target, tuning, start)
            }

        p = partial.keep("averages", chain, tune)["p"]
        read += tuning.steps  # the next target reads on where this one stopped
        span = np.maximum(caps[budget] - seed, 1e-9)
        share = np.clip((p - seed) / span, 1e-3, 1 - 1e-3)
        start = np.log(share / (1 - share))  # the next target starts from these averages
        rows.append((float(budget), target, p))
        progress("averages", i + 1, len(jobs))
    return rows


def _estimators(
    decoder: CalibrationDecoder,
    sequences: Tensor,
    pairs: list[tuple[int, int]],
    options: DPLLMOptions,
    progress: Progress,
    partial: PartialResults,
) -> dict[tuple[int, int], Estimator]:
    @cache
    def inputs() -> dict[int, Tensor]:  # not needed where every estimator is kept
        return gather_inputs(decoder, sequences, options, progress)

    source, ratio = stale_sources(decoder.layers)
    if not options.asynchronous:
        source, ratio = list(range(len(decoder.groups))), [None] * len(decoder.groups)
    found = {}
    for i, (g, step) in enumerate(pairs):

        def fit(g: int = g, step: int = step) -> dict[str, np.ndarray]:
            group = decoder.groups[g]
            low = group.seed_bits + step
            dequantize = decoder.backend.dequantize
            delta = dequantize(group.weight, low + 1) - dequantize(group.weight, low)
            return fit_estimator(delta, inputs()[g], inputs()[source[g]], ratio[g], options).arrays()

        of = [asdict(options), g, step]
        found[g, step] = Estimator.of_arrays(partial.keep("estimator", of, fit))
        progress("estimators", i + 1, len(pairs))
    return found


def _packed(
    decoder: CalibrationDecoder, rows: list[Average], caps: dict[str, np.ndarray], source: list[int],
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
