"""The calibrations that quality_vs_bits.py compares, made as needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from bench.quality.other_allocations import WeightGradients, weight_gradients
from dpllm import reference
from dpllm.base.errors import InputError
from dpllm.base.progress import no_progress
from dpllm.base.text import load_tokenizer, read_documents, sample_sequences
from dpllm.calib.calibrate import CalibrateOptions, Calibrator
from dpllm.calib.dequantised import dequantised_view
from dpllm.calib.dp_llm import DPLLMOptions, calibrate_dp_llm
from dpllm.calib.dp_llm_averages import AveragesOptions
from dpllm.calib.partial_results import PartialResults
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.model.decoder import Decoder
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.quant.overlay import Overlay

TARGETS = (2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 4.75)
SOME = (2.5, 3.0, 3.5, 4.0)
GRADIENTS = 12  # sequences
ASYNC = {"asynchronous": True}


@dataclass(frozen=True)
class Effort:
    """sequences: of 512 tokens, for every variant alike; tuning: sequences for DP-LLM's averages (with fewer, they
    would be seen again and again); paper: its other options."""

    sequences: int = 32
    tuning: int = 256
    paper: DPLLMOptions = field(default_factory=DPLLMOptions)


SMOKE = Effort(
    2, 4, DPLLMOptions(averages=AveragesOptions(steps=3, length=64), continued=2, tokens=512, tune_steps=5)
)


@dataclass(frozen=True)
class Variant:
    """granularity and options: of `dpllm calibrate`. dp_llm: targets of DP-LLM per budget; averages_of: the
    variant whose tuned averages are taken over."""

    granularity: str
    options: dict = field(default_factory=dict)
    dp_llm: dict[str, tuple[float, ...]] = field(default_factory=dict)
    averages_of: str | None = None


VARIANTS = {
    "linear-async": Variant("linear", ASYNC, {"6": TARGETS, "5": TARGETS}),
    "linear-sync": Variant("linear", {}, {"6": TARGETS, "5": TARGETS}, "linear-async"),
    "fused-sync": Variant("fused", {}, {"6": SOME}),
    "fused-async": Variant("fused", ASYNC, {"6": SOME}, "fused-sync"),
    "no-token-sensitivity": Variant("fused", {"token_sensitivity": False}),
    "no-saliency": Variant("fused", {"weighted": False}),
}
# What one process makes in a row, the longest first.
CHAINS = (
    ("linear-async", "linear-sync"), ("fused-sync", "fused-async"), ("no-token-sensitivity",), ("no-saliency",),
)  # fmt: skip


def calibration_sequences(count: int) -> Tensor:
    """int64 [count, 512] of the bundled calibration text."""
    documents = read_documents(reference.calibration_text())
    return sample_sequences(documents, load_tokenizer(reference.overlay_path()), count, 512, 0)


def calibrate(work: Path, name: str, threads: int = 1, effort: Effort = Effort()) -> None:
    """A variant, if it is not there yet for this overlay."""
    out, path = work / f"{name}.safetensors", reference.overlay_path()
    overlay_hash = Overlay.open(path).hash
    if _whole(out, overlay_hash):
        return
    variant, began = VARIANTS[name], time.perf_counter()
    cpu = CpuOptions(threads=threads)
    decoder = load_decoder(path, LoadOptions(granularity=variant.granularity, cpu=cpu))
    options = CalibrateOptions(**variant.options)
    partial = PartialResults(out)
    calibrator = Calibrator(decoder, calibration_sequences(effort.sequences), options, partial)
    profile = calibrator.run(overlay_hash, variant.granularity, {"variant": name}, no_progress)
    if variant.dp_llm:
        profile = _with_dp_llm(work, decoder, profile, variant, effort)
    profile.save(out)
    partial.remove()
    print(f"calibrated {name}: {time.perf_counter() - began:.0f} s", flush=True)


def _whole(path: Path, overlay_hash: str) -> bool:
    try:
        CalibrationProfile.load(path, overlay_hash)
    except InputError:  # not there, damaged, or of another overlay
        return False
    return True


def _with_dp_llm(
    work: Path, decoder: Decoder, profile: CalibrationProfile, variant: Variant, effort: Effort
) -> CalibrationProfile:
    caps = {b: profile.planes(None) if b == "6" else profile.budget(float(b)) for b in variant.dp_llm}
    targets = {b: list(t) for b, t in variant.dp_llm.items()}
    options = replace(effort.paper, asynchronous=variant.options.get("asynchronous", False))
    rows = None
    if variant.averages_of is not None:
        found = CalibrationProfile.load(work / f"{variant.averages_of}.safetensors").extra
        caps = {
            f"{b:g}": c for b, c in zip(found["dp-llm.budgets"], found["dp-llm.caps"], strict=True)
        }  # averages belong to their caps
        rows = list(
            zip(found["dp-llm.budgets"], found["dp-llm.targets"], found["dp-llm.averages"], strict=True)
        )
    found = calibrate_dp_llm(
        decoder, calibration_sequences(effort.tuning), caps, targets, options, no_progress, rows
    )
    return replace(profile, extra=dict(profile.extra) | found)


def gradients(decoder: Decoder) -> WeightGradients:
    """What HAWQ-V2-like and LLM-MQ-like allocations are made from."""
    return weight_gradients(dequantised_view(decoder), calibration_sequences(GRADIENTS), 0, no_progress)


def calibrator_for(work: Path, threads: int = 1, effort: Effort = Effort()) -> Callable[[str], None]:
    """What a Bench calls for a profile it lacks."""
    return lambda name: calibrate(work, name, threads, effort)
