"""`dpllm calibrate`: measures what each group's next bit is worth, by the group's input and by the token.

Three passes over calibration text, through the decoder that will generate text:

1. saliency: the mean squared gradient at every output of every group (calib/gradient_passes.py).
2. gains: at random widths, each token's expected loss at every width, together with the signal that the runtime
   computes, sum_k d_k x_k^2 with d_k = sum_n saliency_n (W_max - W_b)_nk^2, of the input that the runtime reads.
   A probe learns to predict how sensitive each token is to errors (calib/runtime/token_sensitivity.py), and its
   prediction multiplies the signal. Averages per bin of the product, made monotone, are E[gain | signal]. They
   absorb bias, staleness and cross terms of the estimate.
3. curve: text is decoded with the policy itself at several lambdas. The effective bits that each one really used
   are stored, so the lambda of a target is looked up.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from dpllm.base.progress import Progress
from dpllm.calib.allocation import memory_allocation
from dpllm.calib.decoder_protocol import CalibrationDecoder, CalibrationGroup
from dpllm.calib.dequantised import dequantised_view
from dpllm.calib.gradient_passes import LABEL_STREAM, Measurements, Meter, output_saliency
from dpllm.calib.lambda_curve import dense_curve, oracle_curve, solve, stored_bits
from dpllm.calib.partial_results import PartialResults
from dpllm.calib.runtime.profile import CalibrationProfile, Resident
from dpllm.calib.runtime.threshold_rule import RateDistortionRule, ThresholdText, stale_sources
from dpllm.calib.runtime.token_sensitivity import TokenProbe, fit_probe, sequence_context

TILT = 0.1  # relative slope that a flat gain gets over the bins
NEAR = 1e-4  # relative distance up to which two signal values count as equal


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of one calibration.

    bins: of the signal, for E[gain | signal]. points: lambdas that are checked by decoding. seed: of widths and
    labels. budgets: mean resident bits to allot planes for. asynchronous: compute the signal from an input one
    sub-block older, where one exists. token_sensitivity: predict each token's multiplier. weighted: use the saliency
    in the signal.
    """

    bins: int = 48
    points: int = 8
    seed: int = 0
    budgets: tuple[float, ...] = (5.0,)
    asynchronous: bool = False
    token_sensitivity: bool = True
    weighted: bool = True


class Calibrator:
    """One calibration of one decoder, which stays as it is.

    sequences: int64 [S, T] on the decoder's device. partial: keeps the finished parts of the work on disk, where it was
    given a place; the caller removes them when the profile is on disk.
    """

    def __init__(
        self,
        decoder: CalibrationDecoder,
        sequences: Tensor,
        options: CalibrateOptions,
        partial: PartialResults | None = None,
    ):
        self.decoder, self.sequences, self.options = decoder, sequences, options
        self.groups = decoder.groups
        self.widths = list(range(self.groups[0].seed_bits, self.groups[0].resident_bits + 1))
        self.source: list[int] = list(range(len(self.groups)))
        self.ratio: list[Tensor | None] = [None] * len(self.groups)
        if options.asynchronous:
            self.source, self.ratio = stale_sources(decoder.layers)
        self.partial = partial or PartialResults()

    def dequantised(self) -> Calibrator:
        """The same calibration with a decoder whose matrices are dequantised once, where they fit into memory.

        They are freed with the calibrator that is returned (calib/dequantised.py).
        """
        fast = copy.copy(self)
        fast.decoder = dequantised_view(self.decoder)
        return fast

    def run(
        self,
        overlay_hash: str,
        granularity: str,
        origin: dict[str, Any],
        progress: Progress,
        *,
        restart: bool = False,
    ) -> CalibrationProfile:
        """Runs all passes and returns the profile.

        origin: facts to store in the profile. Together with the options it identifies unfinished work. Raises
        InputError where the unfinished work of other options is there, unless `restart` lets it be deleted.
        """
        began = time.perf_counter()
        job = {"overlay": overlay_hash, "granularity": granularity}
        job |= {k: v for k, v in origin.items() if k != "versions"}
        job |= {
            k: v for k, v in asdict(self.options).items() if k != "budgets"
        }  # no stored part depends on them
        self.partial.begin(job, self._stored_bytes(), restart=restart)
        fast = self.dequantised()
        saliency = fast.saliency(progress)
        diagonals = [fast.diagonal(g, s) for g, s in zip(self.groups, saliency, strict=True)]
        measured = fast.measure(saliency, diagonals, progress)
        profile = fast.profile(overlay_hash, granularity, origin, diagonals, measured)
        profile = fast.with_curves(profile, measured, progress)
        profile = replace(profile, extra=fast.oracle(profile, saliency, measured))
        took = {"seconds": round(time.perf_counter() - began, 1), "tokens": int(self.sequences.numel())}
        return replace(profile, origin=dict(profile.origin) | took)

    def _stored_bytes(self) -> int:
        """Bytes that unfinished work takes on disk. Nearly all of them are what pass 2 measures (see Measurements)."""
        hidden = self.groups[0].weight.in_features
        return 4 * self.sequences.numel() * (len(self.groups) * (2 * len(self.widths) + 1) + hidden + 4)

    def saliency(self, progress: Progress) -> list[Tensor]:
        """Pass 1: the mean over tokens of (dLoss/dy_n)^2, float32 [N] per group."""

        def compute() -> dict[str, np.ndarray]:
            found = output_saliency(self.decoder, self.sequences, self.options.seed, progress)
            return {str(g.index): s.cpu().numpy() for g, s in zip(self.groups, found, strict=True)}

        found = self.partial.keep("saliency", None, compute)
        return [torch.from_numpy(found[str(g.index)]).to(self.decoder.device) for g in self.groups]

    def diagonal(self, group: CalibrationGroup, saliency: Tensor) -> Tensor:
        """Expected loss of reading too few planes, per squared input, at the middle step: float32 [K].

        saliency: float32 [N] of the group.
        """
        middle = self.widths[len(self.widths) // 2 - 1]
        dequantize = self.decoder.backend.dequantize
        delta = dequantize(group.weight, self.widths[-1]) - dequantize(group.weight, middle)
        d = (saliency if self.options.weighted else torch.ones_like(saliency)) @ (delta**2)
        if (ratio := self.ratio[group.index]) is not None:
            d = d * ratio.to(d.device) ** 2
        # The diagonal is stored in float16. Only ratios matter: the bins carry the scale.
        return (d / d.mean().clamp(min=1e-30)).to(torch.float16).float()

    def measure(self, saliency: list[Tensor], diagonals: list[Tensor], progress: Progress) -> Measurements:
        """Pass 2: measures every sequence, or takes it from the partial result."""
        meter = Meter(self.decoder, self.widths, saliency, diagonals, self.source)
        parts: list[Measurements] = []
        for i, ids in enumerate(self.sequences):

            def compute(i: int = i, ids: Tensor = ids) -> dict[str, np.ndarray]:
                return vars(meter.sequence(ids, self.options.seed * LABEL_STREAM + i))

            parts.append(Measurements(**self.partial.keep("gains", i, compute)))
            progress("gains", i + 1, len(self.sequences))
        return Measurements.join(parts)

    def profile(
        self,
        overlay_hash: str,
        granularity: str,
        origin: Mapping[str, Any],
        diagonals: list[Tensor],
        m: Measurements,
    ) -> CalibrationProfile:
        """The profile without its curves, from what pass 2 measured."""
        probe, context, explained = fit_probe(m.inputs, m.context, m.sensitivity)
        if not self.options.token_sensitivity:
            probe, context, explained = np.zeros_like(probe), np.zeros_like(context), 0.0
        signal = m.signal * _multipliers(probe, context, m)
        knots, gain = fit_gains(signal, m.loss, self.options.bins)
        mean_loss = m.loss.mean(axis=1, dtype=np.float64)
        weights = np.asarray([g.weights for g in self.groups])
        resident, budgets = self.residencies(mean_loss, weights)
        return CalibrationProfile(
            overlay_hash=overlay_hash,
            granularity=granularity,
            bits=(self.widths[0], self.widths[-1]),
            group_names=tuple(g.name for g in self.groups),
            diagonals=tuple(d.to(torch.float16).cpu().numpy() for d in diagonals),
            source=np.asarray(self.source, np.int64),
            probe=probe,
            context=context,
            knots=knots,
            gain=gain,
            mean_loss=mean_loss,
            weights=weights,
            cost=np.asarray([g.bytes_at for g in self.groups]),
            resident=resident,
            curve_log2_lambda=np.zeros((0, 0)),
            curve_bits=np.zeros((0, 0)),
            origin=dict(origin) | {"budgets": budgets, "probe_explains": round(explained, 4)},
        )

    def residencies(self, mean_loss: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
        """The numbers of resident planes to calibrate for: (planes int64 [R, G], row of each budget).

        The first rows hold an equal number of planes for all groups, the next ones belong to the budgets.
        """
        rows = [np.full(len(self.groups), w) for w in self.widths[1:]]
        stored = np.asarray([g.bytes_at for g in self.groups])
        tables = stored - weights[:, None] * np.asarray(self.widths)[None] / 8
        held = weights[:, None] * np.asarray(self.widths)[None] / 8 + np.cumsum(tables, axis=1)
        budgets = {}
        for bits in self.options.budgets:
            # The bytes of an equal number of planes with this mean, and of the tables of every usable width.
            allowed = float(sum(np.interp(bits, self.widths, h) for h in held))
            budgets[f"{bits:g}"] = len(rows)
            rows.append(self.widths[0] + memory_allocation(mean_loss, held, allowed))
        return np.stack(rows).astype(np.int64), budgets

    # -- pass 3 ------------------------------------------------------------------------------------------

    def with_curves(
        self, profile: CalibrationProfile, m: Measurements, progress: Progress
    ) -> CalibrationProfile:
        """Pass 3: adds the lambda -> bits curves.

        They are computed from the measured signals and shifted by the difference to what decoding really used.
        """
        ranked = np.sort(m.signal * _multipliers(profile.probe, profile.context, m), axis=1)
        low, high = float(self.widths[0]), float(self.widths[-1])
        half = self.sequences[: max(1, len(self.sequences) // 2)]
        contexts = list(torch.from_numpy(m.context).split(self.sequences.shape[1])[: len(half)])
        probes = np.linspace(low, high, self.options.points + 2)[1:-1]
        shift = [0.0]
        for i, target in enumerate(probes):
            lam = 2.0 ** solve(profile, ranked, target)

            def compute(lam: float = lam, before: list[Tensor] = contexts) -> dict[str, np.ndarray]:
                after = list(before)  # each point begins with the contexts of the one before it
                used = self.bits_used(profile, lam, half, contexts=after)
                return {"bits": np.asarray([used]), "contexts": torch.stack(after).cpu().numpy()}

            found = self.partial.keep("curve", i, compute)
            contexts = list(torch.from_numpy(found["contexts"]))
            shift.append(float(found["bits"][0]) - stored_bits(profile, ranked, lam))
            progress("curve", i + 1, len(probes))
        at, by = np.asarray([low, *probes, high]), np.asarray([*shift, 0.0])
        rows = [dense_curve(profile, ranked, planes, at, by) for planes in profile.resident]
        return replace(
            profile,
            curve_log2_lambda=np.stack([r[0] for r in rows]),
            curve_bits=np.stack([r[1] for r in rows]),
        )

    def oracle(
        self, profile: CalibrationProfile, saliency: list[Tensor], m: Measurements
    ) -> dict[str, np.ndarray]:
        """Arrays for the exact-error oracle: float16 saliency of every output, and its lambda -> bits curve."""
        # The scale brings the saliency into float16's range; lambda absorbs it.
        scale = max(float(s.max()) for s in saliency) / 1024
        arrays = {
            f"oracle.saliency.{i}": (s / scale).to(torch.float16).cpu().numpy()
            for i, s in enumerate(saliency)
        }
        factor = _multipliers(profile.probe, profile.context, m)
        loss = m.exact[:, ::7] * factor[None, ::7, None] / np.float32(scale)
        log2_lambda, bits = oracle_curve(loss, profile.cost, profile.weights, self.widths[0])
        return arrays | {"oracle.log2_lambda": log2_lambda, "oracle.bits": bits}

    def bits_used(
        self,
        profile: CalibrationProfile,
        lam: float,
        sequences: Tensor,
        resident: Resident = None,
        contexts: list[Tensor] | None = None,
    ) -> float:
        """Effective bits of decoding these sequences with the policy at this lambda.

        sequences: int64 [S, T]. resident: planes held. contexts: float32 [T, 3] per sequence, the features of the
        previous steps. This pass replaces them in place with its own, so that a pass at a neighbouring lambda sees
        nearly the contexts that it would produce itself. None: a first pass produces them.
        """
        rule = RateDistortionRule(profile, self.decoder.backend.select, self.decoder.device, resident)
        text = ThresholdText(rule, rule.thresholds_at(lam))
        passes = 1 if contexts is not None or not profile.context.any() else 2
        contexts = (
            [torch.full((sequences.shape[1], 3), float("nan"))] * len(sequences)
            if contexts is None
            else contexts
        )
        used = 0.0

        def select(group: CalibrationGroup, x: Tensor) -> Tensor:
            nonlocal used
            bits = text(group, x)
            used += bits.sum().item() * group.weights
            return bits

        with torch.no_grad():
            for _ in range(passes):
                used = 0.0
                for i, ids in enumerate(sequences):
                    text.previous = contexts[i]
                    logits = self.decoder.forward(ids, select=select)
                    contexts[i] = sequence_context(logits, ids)
        return float(used / (profile.weights.sum() * sequences.numel()))


def _multipliers(probe: np.ndarray, context: np.ndarray, m: Measurements) -> np.ndarray:
    """Each token's multiplier, float32 [T], as the policy will compute it."""
    token_probe = TokenProbe.of(probe, context)
    return token_probe.multiplier(torch.from_numpy(m.inputs), torch.from_numpy(m.context)).numpy()


def fit_gains(signal: np.ndarray, loss: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Fits E[loss(b) - loss(b+1) | signal] per group: averages in bins of equal counts, made non-decreasing.

    signal: float32 [G, T]. loss: float32 [G, T, B]. bins: M at most; fewer where there are few tokens.
    Returns (edges float64 [G, M-1], gain float64 [G, B-1, M]).
    """
    groups, tokens = signal.shape
    bins = max(2, min(bins, tokens // 8))
    quantiles = np.arange(1, bins) / bins
    edges = np.stack([_between(s, np.quantile(s, quantiles)) for s in signal.astype(np.float64)])  # [G, M-1]
    steps = loss.shape[2] - 1
    gain = np.zeros((groups, steps, bins))
    for g in range(groups):
        place = np.searchsorted(edges[g], signal[g])
        count = np.bincount(place, minlength=bins).astype(float)
        for step in range(steps):
            total = np.bincount(place, loss[g, :, step] - loss[g, :, step + 1], minlength=bins)
            mean = np.divide(total, count, out=np.zeros(bins), where=count > 0)
            gain[g, step] = isotonic_regression(mean, weights=np.maximum(count, 1e-9)).x
    # Where the signal predicts nothing the fit is flat, and the width of a whole group would change at one lambda.
    # A slight slope spreads this change over the bins, at no expected cost, so that every target can be met.
    tilt = 1 + TILT * (np.arange(bins) / (bins - 1) - 0.5)
    return edges, np.maximum(gain, 0) * tilt


def _between(signal: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Moves each edge half way to the next value that occurs.

    A signal may take few values: the first group's input depends on the token only. Whole quantiles then lie on one
    value, and rounding in the last bit of a sum would decide the width there.
    """
    values = np.sort(signal)
    upper = np.searchsorted(values, edges * (1 + NEAR), side="right")
    return (values[upper - 1] + values[np.minimum(upper, len(values) - 1)]) / 2
