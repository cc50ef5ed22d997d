"""`dpllm calibrate`: what each group's next bit is worth, as a function of its own input.

Three passes over calibration text through the very decoder that will run:

1. saliency: the mean squared gradient at every output of every group, with targets drawn from the model
   itself (the true Fisher information, no peeking at the text);
2. gains: widths drawn at random, so that inputs look as they do under quantised decoding. For each token
   and group, loss(b) = sum_n saliency_n * ((W_max - W_b) x)_n^2 for every width b, beside the signal the
   runtime will compute, sum_k d_k x_k^2 with d_k = sum_n saliency_n (W_max - W_b)_nk^2. Averages per
   signal bin, made monotone, are E[gain | signal]: bias and cross terms of the estimate are absorbed.
3. curve: decoding with the policy itself at a range of lambdas; the effective bits it really used are
   stored, so a target is looked up, not hoped for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from dpllm.calib.profile import CalibrationProfile

GRID = 192  # points of the stored lambda curve
TILT = 0.1  # relative slope over the bins of a flat gain

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CalibrateOptions:
    """Sample sizes. bins: how finely E[gain | signal] is resolved; points: lambdas checked by decoding."""

    samples: int = 32
    sequence_length: int = 512
    bins: int = 48
    points: int = 12
    seed: int = 0


class Calibrator:
    """One calibration of one decoder. The decoder is passed in: this package does not import it."""

    def __init__(self, decoder: Any, sequences: Tensor, options: CalibrateOptions):
        self.decoder, self.sequences, self.options = decoder, sequences, options
        self.groups = decoder.groups
        self.backend = decoder.backend
        self.widths = list(range(self.groups[0].seed_bits, self.groups[0].resident_bits + 1))

    def run(
        self, overlay_hash: str, granularity: str, origin: dict[str, Any], progress: Progress
    ) -> CalibrationProfile:
        """All three passes."""
        began = time.perf_counter()
        saliency = self.saliency(progress)
        diagonals = [self.diagonal(g, s) for g, s in zip(self.groups, saliency, strict=True)]
        signal, loss = self.signals_and_losses(saliency, diagonals, progress)
        knots, gain = fit_gains(signal, loss, self.options.bins)
        profile = CalibrationProfile(
            overlay_hash=overlay_hash,
            granularity=granularity,
            bits=(self.widths[0], self.widths[-1]),
            group_names=tuple(g.name for g in self.groups),
            diagonals=tuple(d.to(torch.float16).numpy() for d in diagonals),
            knots=knots,
            gain=gain,
            mean_loss=loss.mean(axis=1),
            weights=np.asarray([g.weights for g in self.groups]),
            cost=np.asarray([g.bytes_at for g in self.groups]),
            curve_log2_lambda=np.zeros((0, 0)),
            curve_bits=np.zeros((0, 0)),
            origin=origin,
        )
        lambdas, bits = self.curves(profile, signal, progress)
        took = {"seconds": round(time.perf_counter() - began, 1), "tokens": int(self.sequences.numel())}
        fields = profile.__dict__ | {
            "curve_log2_lambda": lambdas,
            "curve_bits": bits,
            "origin": origin | took,
        }
        return CalibrationProfile(**fields)

    # -- pass 1 ------------------------------------------------------------------------------------------

    def saliency(self, progress: Progress) -> list[Tensor]:
        """float32 [N] per group: mean over tokens of (dLoss/dy_n)^2, labels sampled from the model."""
        generator = torch.Generator().manual_seed(self.options.seed)
        total = [torch.zeros(0)] * len(self.groups)

        def observe(group: Any, x: Tensor, y: Tensor) -> None:
            def add(grad: Tensor) -> None:
                squares = (grad.float() ** 2).sum(0)
                total[group.index] = (
                    squares if total[group.index].numel() == 0 else total[group.index] + squares
                )

            y.register_hook(add)

        anchor = torch.zeros((), requires_grad=True)  # the weights are constants; gradients need a leaf
        embed = self.decoder._embed
        self.decoder._embed = lambda ids: embed(ids) + anchor
        try:
            for i, ids in enumerate(self.sequences):
                logits = self.decoder.forward(ids, observe=observe)
                labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
                torch.nn.functional.cross_entropy(
                    logits, labels.to(logits.device), reduction="sum"
                ).backward()
                progress("saliency", i + 1, len(self.sequences))
        finally:
            self.decoder._embed = embed
        return [t / self.sequences.numel() for t in total]

    # -- pass 2 ------------------------------------------------------------------------------------------

    def diagonal(self, group: Any, saliency: Tensor) -> Tensor:
        """[K]: expected loss of reading too few planes, per squared input, at the middle step."""
        middle = self.widths[len(self.widths) // 2 - 1]
        delta = self.backend.dequantize(group.weight, self.widths[-1]) - self.backend.dequantize(
            group.weight, middle
        )
        d = saliency @ (delta**2)
        # The estimator is stored in float16; only ratios matter, the bins carry the scale.
        return (d / d.mean().clamp(min=1e-30)).to(torch.float16).float()

    def signals_and_losses(
        self, saliency: list[Tensor], diagonals: list[Tensor], progress: Progress
    ) -> tuple[np.ndarray, np.ndarray]:
        """(signal float64 [G, T], loss float64 [G, T, B]) under decoding at random widths."""
        rng = np.random.default_rng(self.options.seed)
        signals: list[list[np.ndarray]] = [[] for _ in self.groups]
        losses: list[list[np.ndarray]] = [[] for _ in self.groups]

        def observe(group: Any, x: Tensor, y: Tensor) -> None:
            g = group.index
            signals[g].append(((x.float() ** 2) @ diagonals[g]).double().cpu().numpy())
            losses[g].append(self._losses(group, x, saliency[g]).double().cpu().numpy())

        def select(group: Any, x: Tensor) -> Tensor:
            drawn = rng.choice(self.widths, size=len(x))
            return torch.as_tensor(drawn, dtype=torch.int32, device=x.device)

        with torch.no_grad():
            for i, ids in enumerate(self.sequences):
                self.decoder.forward(ids, select=select, observe=observe)
                progress("gains", i + 1, len(self.sequences))
        return np.stack([np.concatenate(s) for s in signals]), np.stack([np.concatenate(e) for e in losses])

    def _losses(self, group: Any, x: Tensor, saliency: Tensor) -> Tensor:
        """[T, B]: saliency-weighted squared output error of each width against the widest."""
        full = x @ self.backend.dequantize(group.weight, self.widths[-1], x.dtype).T
        out = x.new_zeros(len(x), len(self.widths))
        for i, width in enumerate(self.widths[:-1]):
            error = full - x @ self.backend.dequantize(group.weight, width, x.dtype).T
            out[:, i] = (error**2) @ saliency
        return out

    # -- pass 3 ------------------------------------------------------------------------------------------

    def curves(
        self, profile: CalibrationProfile, signal: np.ndarray, progress: Progress
    ) -> tuple[np.ndarray, np.ndarray]:
        """(log2 lambda, effective bits), float64 [B-1, C] each, a row per number of resident planes.

        Dense curves from the stored signals, shifted by what real decoding at a few points used instead.
        """
        ranked, low, high = np.sort(signal, axis=1), float(self.widths[0]), float(self.widths[-1])
        half = self.sequences[: max(1, len(self.sequences) // 2)]
        probes = np.linspace(low, high, self.options.points + 2)[1:-1]
        shift = [0.0]
        for i, target in enumerate(probes):
            lam = 2.0 ** _solve(profile, ranked, target)
            shift.append(self.bits_used(profile, lam, half) - _bits_at(profile, ranked, lam))
            progress("curve", i + 1, len(probes))
        at, by = np.asarray([low, *probes, high]), np.asarray([*shift, 0.0])
        rows = [_dense_curve(profile, ranked, cap, at, by) for cap in self.widths[1:]]
        return np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows])

    def bits_used(
        self, profile: CalibrationProfile, lam: float, sequences: Tensor, max_bits: int | None = None
    ) -> float:
        """Effective bits of decoding these sequences with the policy at this lambda."""
        device = self.decoder.device
        thresholds = torch.from_numpy(profile.thresholds(lam, max_bits)).to(device)
        diagonals = [torch.from_numpy(d).to(device) for d in profile.diagonals]
        used = 0.0

        def select(group: Any, x: Tensor) -> Tensor:
            nonlocal used
            bits = self.backend.select(x, diagonals[group.index], thresholds[group.index], self.widths[0])
            used += bits.sum().item() * group.weights
            return bits

        with torch.no_grad():
            for ids in sequences:
                self.decoder.forward(ids, select=select, last_only=True)
        return float(used / (profile.weights.sum() * sequences.numel()))


def _bits_at(
    profile: CalibrationProfile, ranked: np.ndarray, lam: float, max_bits: int | None = None
) -> float:
    """Effective bits that the stored signals (sorted, [G, T]) would get at this lambda."""
    thresholds = profile.thresholds(lam, max_bits)
    tokens = ranked.shape[1]
    above = [tokens - np.searchsorted(r, t, side="right") for r, t in zip(ranked, thresholds, strict=True)]
    steps = np.asarray(above).sum(axis=1) / tokens
    return float(profile.bits[0] + (steps * profile.weights).sum() / profile.weights.sum())


def _solve(
    profile: CalibrationProfile, ranked: np.ndarray, target: float, max_bits: int | None = None
) -> float:
    """log2 lambda at which the stored signals would get these bits (bisection; bits fall with lambda)."""
    low, high = -200.0, 100.0
    for _ in range(48):
        middle = (low + high) / 2
        above = _bits_at(profile, ranked, 2.0**middle, max_bits) > target
        low, high = (middle, high) if above else (low, middle)
    return (low + high) / 2


def _dense_curve(
    profile: CalibrationProfile, ranked: np.ndarray, max_bits: int, at: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(log2 lambda [C], bits [C]) for a number of resident planes; `shift` is added at bits `at`."""
    low, high = float(profile.bits[0]), float(max_bits)
    ends = [_solve(profile, ranked, t, max_bits) for t in (low + 0.01, high - 0.01)]
    grid = np.linspace(ends[0], ends[1], GRID)
    stored = np.asarray([_bits_at(profile, ranked, 2.0**g, max_bits) for g in grid])
    fade = np.minimum(1.0, (high - stored) * 4)  # a cap leaves nothing to shift near itself
    bits = np.clip(stored + np.interp(stored, at, shift) * fade, low, high)
    # Beyond the ends every bin takes the seed, or the maximum.
    grid = np.concatenate([[ends[0] + 60], grid, [ends[1] - 90]])
    return grid, np.maximum.accumulate(np.concatenate([[low], bits, [high]]))


def fit_gains(signal: np.ndarray, loss: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """E[loss(b) - loss(b+1) | signal] per group: averages in bins of equal counts, made non-decreasing.

    signal: [G, T]. loss: [G, T, B]. Returns (edges float64 [G, M-1], gain float64 [G, B-1, M]).
    """
    groups, tokens = signal.shape
    bins = max(2, min(bins, tokens // 8))
    quantiles = np.arange(1, bins) / bins
    edges = np.quantile(signal, quantiles, axis=1).T  # [G, M-1]
    steps = loss.shape[2] - 1
    gain = np.zeros((groups, steps, bins))
    for g in range(groups):
        place = np.searchsorted(edges[g], signal[g])
        count = np.bincount(place, minlength=bins).astype(float)
        for step in range(steps):
            total = np.bincount(place, loss[g, :, step] - loss[g, :, step + 1], minlength=bins)
            mean = np.divide(total, count, out=np.zeros(bins), where=count > 0)
            gain[g, step] = isotonic_regression(mean, weights=np.maximum(count, 1e-9)).x
    # Where the signal says nothing the fit is flat, and a whole group would jump at one lambda. A slight
    # slope spreads the jump over the bins, at no expected cost, so that any target can be hit.
    tilt = 1 + TILT * (np.arange(bins) / (bins - 1) - 0.5)
    return edges, np.maximum(gain, 0) * tilt
