"""One measured cell of quality_vs_bits.py: a policy at a target on a text, kept in a file of its own.

There are well over a hundred, so each is written as soon as it is known and never measured twice, by however
many processes at once. A file remembers which overlay and profile it was measured with and is taken for absent
with others. Sums per window are kept for paired comparisons.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from bench.quality.other_allocations import WeightGradients
from bench.quality.policies import bench_policy
from bench.quality.texts import CONTEXT, windows_of
from dpllm import reference
from dpllm.base.text import load_tokenizer
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.decode.options import GenerateOptions
from dpllm.engine import Engine
from dpllm.evaluation.evaluate import score
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.model.decoder import Decoder
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.quant.overlay import Overlay

GENERATED = 256  # tokens after each prompt of text 'generated'
PROMPT = 64  # tokens
PLAIN = "full precision"


@dataclass(frozen=True)
class Cell:
    """What to measure. variant: which calibration; budget: mean resident bits; windows: how many, from the first
    one; text: 'stdlib', 'prose' (texts.py) or 'generated' (sampled, each continuing the start of a
    'stdlib' window)."""

    policy: str
    variant: str
    target: float
    budget: float
    windows: int
    text: str = "stdlib"

    @property
    def key(self) -> str:
        """Its name."""
        return f"{self.policy}|{self.variant}|{self.target:g}|{self.budget:g}|{self.text}|{self.windows}"

    @property
    def file(self) -> str:
        """Its name on disk."""
        return "".join(c if c.isalnum() or c in ".-" else "_" for c in self.key) + ".json"


class Bench:
    """Profiles by variant, decoders as needed, cells on disk. threads: of the kernels and of torch."""

    def __init__(self, work: Path, calibrate: Callable[[str], None], threads: int = 1):
        self.work, self.calibrate, self.threads = work, calibrate, threads
        self.cells: dict[Cell, dict] = {}
        self.profiles: dict[str, CalibrationProfile] = {}
        self._decoders: dict[tuple[str, float], Decoder] = {}
        self._gradients: WeightGradients | None = None

    @cached_property
    def overlay_hash(self) -> str:
        """Of the overlay that everything is measured with."""
        return Overlay.open(reference.overlay_path()).hash

    def profile(self, variant: str) -> CalibrationProfile:
        """The calibration of a variant."""
        if variant not in self.profiles:
            self.calibrate(variant)
            path = self.work / f"{variant}.safetensors"
            self.profiles[variant] = CalibrationProfile.load(path, self.overlay_hash)
        return self.profiles[variant]

    def load(self, granularity: str, resident: dict[str, int] | None = None) -> Decoder:
        """The reference model, quantised."""
        options = LoadOptions(resident, granularity, cpu=CpuOptions(threads=self.threads))
        return load_decoder(reference.overlay_path(), options)

    def decoder(self, variant: str, budget: float) -> Decoder:
        """The reference model with the planes this budget allows."""
        if (variant, budget) not in self._decoders:
            profile = self.profile(variant)
            planes = None
            if budget < profile.bits[1]:
                planes = dict(zip(profile.group_names, profile.budget(budget).tolist(), strict=True))
            self._decoders[variant, budget] = self.load(
                profile.granularity, planes
            )  # it is small: all are kept
        return self._decoders[variant, budget]

    # -- cells -------------------------------------------------------------------------------------------

    def stamp(self, cell: Cell) -> str:
        """Of everything a cell's figures depend on beside its name: overlay, and profile if it has one."""
        if cell.policy == PLAIN:
            return hashlib.sha256((reference.model_path() / "config.json").read_bytes()).hexdigest()
        path = self.work / f"{cell.variant}.safetensors"
        profile = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
        return f"{self.overlay_hash}/{profile}"

    def known(self, cell: Cell) -> bool:
        """Whether it was measured, with this overlay and profile."""
        if cell not in self.cells:
            path = self.work / "cells" / cell.file
            if path.exists():
                found = json.loads(path.read_text())
                if found["key"] == cell.key and found["stamp"] == self.stamp(cell):
                    self.cells[cell] = found
        return cell in self.cells

    def measure(self, cell: Cell) -> dict:
        """The cell's figures: nll [W], tokens [W], bits [W] (sums per window), bytes, seconds."""
        if not self.known(cell):
            began = time.perf_counter()
            found = self._plain(cell) if cell.policy == PLAIN else self._measured(cell)
            found |= {"key": cell.key, "stamp": self.stamp(cell)}
            found["seconds"] = round(time.perf_counter() - began, 1)
            path = self.work / "cells" / cell.file
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(found))
            part.replace(path)
            self.cells[cell] = found
        return self.cells[cell]

    @torch.no_grad()
    def _plain(self, cell: Cell) -> dict:
        """Of the unquantised checkpoint."""
        decoder, nll, windows = load_decoder(reference.model_path()), [], windows_of(cell.text)
        for window in windows.ids[: cell.windows]:
            ids = torch.tensor(window)
            logits = decoder.forward(ids[:-1])
            nll.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item())
        tokens = [len(w) - 1 for w in windows.ids[: cell.windows]]
        return {"nll": nll, "tokens": tokens, "bits": [16.0 * t for t in tokens], "bytes": 0}

    def _measured(self, cell: Cell) -> dict:
        decoder, profile = self.decoder(cell.variant, cell.budget), self.profile(cell.variant)
        policy = bench_policy(cell.policy, cell.target, decoder, profile, self.gradients)
        if cell.text == "generated":
            return self._generated(cell, decoder, policy)
        scores = score(decoder, policy, windows_of(cell.text).ids[: cell.windows])
        read = sum(s.weight_bytes for s in scores) / sum(s.tokens for s in scores)
        return {
            "nll": [round(s.nll, 4) for s in scores], "tokens": [s.tokens for s in scores],
            "bits": [round(s.bits, 3) for s in scores], "bytes": round(read) + decoder.head_bytes(),
        }  # fmt: skip

    def _generated(self, cell: Cell, decoder: Decoder, policy) -> dict:
        """Text is sampled at temperature 0.8 after each prompt; what it read, not how good it is."""
        tokenizer = load_tokenizer(reference.overlay_path())
        engine = Engine(reference.overlay_path(), decoder, tokenizer, self.profile(cell.variant))
        engine.policy = policy
        bits, tokens, nbytes = [], [], 0
        whole = [w for w in windows_of("stdlib").ids if len(w) == CONTEXT]
        for i, ids in enumerate(whole[: cell.windows]):
            options = GenerateOptions(GENERATED, temperature=0.8, seed=i)
            decoded = [s for s in engine.generate_with(tokenizer.decode(ids[:PROMPT]), options) if s.bits]
            bits.append(round(sum(s.effective_bits for s in decoded), 3))
            tokens.append(len(decoded))
            nbytes += sum(s.weight_bytes for s in decoded)
        read = round(nbytes / sum(tokens))
        return {"nll": [0.0] * len(bits), "tokens": tokens, "bits": bits, "bytes": read}

    def gradients(self) -> WeightGradients:
        """Of the weights, for allocations that need them."""
        if self._gradients is None:
            from bench.quality.variants import gradients

            self._gradients = gradients(self.load("fused"))
        return self._gradients


# -- figures of cells ------------------------------------------------------------------------------------------


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
    shift = slope * excess.sum() / tokens.sum()
    difference = np.asarray(a["nll"][:windows]) - np.asarray(b["nll"][:windows]) - shift * tokens
    sums = np.zeros((owner.max() + 1, 2))
    np.add.at(sums, owner, np.stack([difference, tokens], axis=1))
    draws = np.random.default_rng(0).integers(0, len(sums), (rounds, len(sums)))
    totals = sums[draws].sum(axis=1)
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return float(difference.sum() / tokens.sum()), float(low), float(high)
