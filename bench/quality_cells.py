"""One measured cell of bench/quality_vs_bits.py: a policy at a target on held-out windows, kept on disk.

A cell costs a minute on two cores and there are a hundred, so each is written as soon as it is known and
never measured twice; per-window sums are kept for paired comparisons.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from reference_corpus import read_source, stdlib_root

from dpllm import reference
from dpllm.calib.allocation import equal_loss_bits, static_bits
from dpllm.calib.controls import WeightGradients, hawq_losses, llm_mq_losses
from dpllm.calib.profile import CalibrationProfile
from dpllm.decoder import Decoder
from dpllm.evaluate import score
from dpllm.loading import LoadOptions, load_decoder
from dpllm.policy import PrecisionPolicy, RateDistortionPolicy, StaticPolicy, make_policy
from dpllm.quant.text import encode, load_tokenizer

CONTEXT = 1024


@dataclass(frozen=True)
class Cell:
    """What to measure. variant: which calibration; budget: mean resident bits; windows: how many, from the
    first one."""

    policy: str
    variant: str
    target: float
    budget: float
    windows: int

    @property
    def key(self) -> str:
        """Its name on disk."""
        return f"{self.policy}|{self.variant}|{self.target:g}|{self.budget:g}|{self.windows}"


@dataclass(frozen=True)
class Windows:
    """Held-out text. ids: token ids of each window; files: the file each comes from (they are resampled
    together)."""

    ids: list[list[int]]
    files: list[int]


def heldout_windows(tokens: int) -> Windows:
    """Windows of 1024 tokens of the held-out standard-library files: every file's first, then every second..."""
    names = json.loads((reference.model_path() / "heldout_files.json").read_text())
    tokenizer, root = load_tokenizer(reference.overlay_path()), stdlib_root()
    texts = [read_source(root / n) for n in names if (root / n).is_file()]
    encoded = [encode(tokenizer, t) for t in texts if t]
    found: list[list[int]] = []
    files: list[int] = []
    total = 0
    for round_ in range(max(len(e) for e in encoded) // CONTEXT + 1):
        for f, ids in enumerate(encoded):
            piece = ids[round_ * CONTEXT : (round_ + 1) * CONTEXT]
            if len(piece) > 16 and total < tokens:
                found.append(piece)
                files.append(f)
                total += len(piece) - 1
    return Windows(found, files)


class Bench:
    """Profiles by variant, decoders as needed, cells on disk."""

    def __init__(self, work: Path, windows: Windows, calibrate: Callable[[str], None]):
        self.work, self.windows, self.calibrate = work, windows, calibrate
        self.path = work / "cells.json"
        self.cells: dict[str, dict] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.profiles: dict[str, CalibrationProfile] = {}
        self.gradients: dict[str, WeightGradients] = {}

    def profile(self, variant: str) -> CalibrationProfile:
        """The calibration of a variant."""
        if variant not in self.profiles:
            self.calibrate(variant)
            self.profiles[variant] = CalibrationProfile.load(self.work / f"{variant}.safetensors")
        return self.profiles[variant]

    def decoder(self, variant: str, budget: float) -> Decoder:
        """The reference model with the planes this budget allows."""
        profile = self.profile(variant)
        planes = None
        if budget < profile.bits[1]:
            planes = dict(zip(profile.group_names, profile.budget(budget).tolist(), strict=True))
        options = LoadOptions(granularity=profile.granularity, resident_bits=planes)
        return load_decoder(reference.overlay_path(), options)

    def measure(self, cell: Cell) -> dict:
        """The cell's figures: effective_bits, nll [W], tokens [W], bits [W], bytes."""
        if cell.key not in self.cells:
            decoder = self.decoder(cell.variant, cell.budget)
            policy = self.policy(cell, decoder)
            scores = score(decoder, policy, self.windows.ids[: cell.windows])
            read = sum(s.weight_bytes for s in scores) / sum(s.tokens for s in scores)
            self.cells[cell.key] = {
                "nll": [round(s.nll, 4) for s in scores],
                "tokens": [s.tokens for s in scores],
                "bits": [round(s.bits, 3) for s in scores],
                "bytes": round(read) + decoder.head_bytes(),
            }  # fmt: skip
            self.path.write_text(json.dumps(self.cells))
            bits, nll = means(self.cells[cell.key])
            print(f"{cell.key}: {bits:.3f} bits, {nll:.5f} nats", flush=True)
        return self.cells[cell.key]

    @torch.no_grad()
    def full_precision(self) -> dict:
        """nll [W] and tokens [W] of the unquantised checkpoint."""
        key = f"full precision|{len(self.windows.ids)}"
        if key not in self.cells:
            decoder, nll = load_decoder(reference.model_path()), []
            for window in self.windows.ids:
                ids = torch.tensor(window)
                logits = decoder.forward(ids[:-1])
                nll.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item())
            self.cells[key] = {"nll": nll, "tokens": [len(w) - 1 for w in self.windows.ids]}
            self.path.write_text(json.dumps(self.cells))
        return self.cells[key]

    def policy(self, cell: Cell, decoder: Decoder) -> PrecisionPolicy:
        """By name: those of the package, the other systems' allocations, and ablations of ours."""
        profile = self.profile(cell.variant)
        if cell.policy == "rate-distortion, uncorrected":
            return RateDistortionPolicy(profile, decoder, cell.target, corrected=False)
        if cell.policy == "rate-distortion, two widths":
            return two_widths(profile, decoder, cell.target)
        if cell.policy == "rate-distortion, no context":
            return _WithoutContext(profile, decoder, cell.target)
        losses = {"hawq-v2-like": hawq_losses, "llm-mq-like": llm_mq_losses}
        if cell.policy in losses:
            table = losses[cell.policy](decoder, self.gradients[profile.granularity])
            bits = static_bits(table, profile.weights, profile.bits[0], cell.target)
        elif cell.policy == "equal loss (BAQ)":
            bits = equal_loss_bits(profile.mean_loss, profile.weights, profile.bits[0], cell.target)
        else:
            return make_policy(cell.policy, cell.target, decoder, profile)
        return StaticPolicy([int(b) for b in bits], name=cell.policy)


class _WithoutContext(RateDistortionPolicy):
    """The multiplier from the embedding alone: nothing is learned from the previous step but the correction."""

    def observe(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        super().observe(logits, tokens)
        self.context = None


def two_widths(profile: CalibrationProfile, decoder: Decoder, target: float) -> RateDistortionPolicy:
    """Rate-distortion that chooses between two widths per group only: those around its mean at this target."""
    policy = RateDistortionPolicy(profile, decoder, target)
    bins = profile.gain.shape[2]
    edges = np.concatenate([np.full((len(profile.gain), 1), -np.inf), profile.knots], axis=1)
    limits = policy.thresholds.numpy()  # each is one of the edges, in float32
    taken = (edges.astype(np.float32)[:, :, None] >= limits[:, None, :]).sum(
        axis=1
    ) / bins  # share of bins beyond each step
    low = np.floor(taken.sum(axis=1) + 1e-9).astype(int)
    for g, step in enumerate(low):
        policy.thresholds[g, :step] = -np.inf
        policy.thresholds[g, step + 1 :] = np.inf
        # The one threshold left gives the group the same mean width as before.
        share = min(max(taken[g].sum() - step, 0.0), 1.0)
        if step < policy.thresholds.shape[1]:
            at = round((1 - share) * bins)
            policy.thresholds[g, step] = edges[g, at] if at < bins else np.inf
    return policy


def means(cell: dict, windows: int | None = None) -> tuple[float, float]:
    """(effective bits, nats per token) over the first windows."""
    tokens = sum(cell["tokens"][:windows])
    return sum(cell["bits"][:windows]) / tokens, sum(cell["nll"][:windows]) / tokens


def paired_interval(
    a: dict, b: dict, files: list[int], windows: int, slope: float = 0.0, rounds: int = 4000
) -> tuple[float, float, float]:
    """(mean, low, high) of a's nats per token less b's, 95% bootstrap interval over files.

    slope: nats per bit, by which both are moved to equal bits (b's) where they read unlike amounts.
    """
    owner = np.asarray(files[:windows])
    tokens = np.asarray(a["tokens"][:windows], float)
    excess = np.asarray(a["bits"][:windows]) - np.asarray(b["bits"][:windows])
    mean_excess = excess.sum() / tokens.sum()
    difference = (
        np.asarray(a["nll"][:windows]) - np.asarray(b["nll"][:windows]) - slope * mean_excess * tokens
    )
    sums = np.zeros((owner.max() + 1, 2))
    np.add.at(sums, owner, np.stack([difference, tokens], axis=1))
    draws = np.random.default_rng(0).integers(0, len(sums), (rounds, len(sums)))
    totals = sums[draws].sum(axis=1)
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return float(difference.sum() / tokens.sum()), float(low), float(high)
