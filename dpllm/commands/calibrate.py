"""`dpllm calibrate`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from dpllm import __version__
from dpllm.base.errors import InputError
from dpllm.base.text import documents_sha256, load_tokenizer, read_documents, sample_sequences
from dpllm.calib.calibrate import CalibrateOptions, Calibrator
from dpllm.calib.dequantised import dense
from dpllm.calib.dp_llm import DPLLMOptions, calibrate_dp_llm
from dpllm.calib.runtime.profile import PROFILE_NAME, CalibrationProfile, merge
from dpllm.commands.common import (
    check_device,
    cpu_options,
    default_text,
    note,
    parse_targets,
    print_json,
    stage_bars,
)
from dpllm.context.head_profile import head_profile
from dpllm.context.pruner import HEADS
from dpllm.decode.prompting import Prompts
from dpllm.model.decoder import Decoder
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.model.memory import peak_bytes
from dpllm.quant.overlay import Overlay

LLAMA_8B = 6.98e9  # weights of Llama-3-8B's decoder matrices


@dataclass(frozen=True)
class CalibrateArguments:
    """The command line. memory_bits: mean resident bits to allot planes for, '5' or '4.5,5'; dp_llm: also
    calibrate the paper's policy for every target; kv_heads: also score the KV heads."""

    overlay: str
    targets: str | None = None
    memory_bits: str | None = None
    data: str | None = None
    granularity: str = "fused"
    samples: int = 32
    sequence_length: int = 512
    asynchronous: bool = False
    dp_llm: bool = False
    out: str | None = None
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    json: bool = False
    kv_heads: bool = False


def run(a: CalibrateArguments) -> None:
    """Calibrates and writes the profile."""
    if a.granularity not in ("fused", "linear"):
        raise InputError(f"--granularity {a.granularity} is unknown. Use 'fused' or 'linear'.")
    if a.samples < 1 or a.sequence_length < 16:
        raise InputError("at least one sample of at least 16 tokens is needed to calibrate.")
    cpu = cpu_options(a.threads)
    path = Path(a.overlay).expanduser()
    opened = Overlay.open(path)
    lo, hi = opened.bits
    if lo == hi:
        raise InputError(f"{path} stores one width only ({lo}); there is nothing to choose.")
    budgets, wanted = _budgets(a, path, lo, hi), [] if a.targets is None else parse_targets(a.targets)
    if outside := [t for t in wanted if not lo <= t <= max(budgets, default=hi)]:
        raise InputError(
            f"target {outside[0]:g} bits is impossible: {lo} (seed) to {max(budgets, default=hi):g} can be read."
        )
    if a.dp_llm and not wanted:
        raise InputError("--dp-llm is calibrated for each target. Give them: --targets 3.25,3.5,4")
    target = _destination(a, path)
    documents = read_documents(default_text(a.data))
    sequences = sample_sequences(
        documents, load_tokenizer(path), a.samples, a.sequence_length, a.seed
    ).to(check_device(a.device))  # fmt: skip
    decoder = load_decoder(path, LoadOptions(granularity=a.granularity, device=a.device, cpu=cpu))
    origin = {
        "documents_sha256": documents_sha256(documents), "seed": a.seed, "samples": len(sequences),
        "sequence_length": a.sequence_length, "device": a.device, "asynchronous": a.asynchronous,
        "versions": {"dpllm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    stored = tuple(sorted({5.0, *budgets} if lo < 5 <= hi else set(budgets)))
    options = CalibrateOptions(seed=a.seed, budgets=stored, asynchronous=a.asynchronous)
    began = time.perf_counter()
    calibrator = Calibrator(decoder, sequences, options, target.with_name(target.name + ".partial"))
    with stage_bars() as progress:
        profile = calibrator.run(opened.hash, a.granularity, origin, progress)
        if a.dp_llm:
            profile = _with_dp_llm(decoder, sequences, profile, wanted, progress, a.seed)
        if a.kv_heads:
            heads = head_profile(
                sequences.tolist(), lambda done: progress("KV heads", done, len(sequences)),
                decoder=decoder, prompts=Prompts(load_tokenizer(path), decoder.config, path),
            )  # fmt: skip
            profile = replace(profile, extra=dict(profile.extra) | {HEADS: heads.cpu().numpy()})
        checked = _check(calibrator, profile, wanted, budgets or [float(hi)], progress)
    _merged(profile, target).save(target)
    _report(a, path, target, profile, checked, time.perf_counter() - began)


def _budgets(a: CalibrateArguments, path: Path, lo: int, hi: int) -> list[float]:
    budgets = [] if a.memory_bits is None else parse_targets(a.memory_bits)
    for b in budgets:
        if not lo < b <= hi:
            raise InputError(
                f"--memory-bits {b:g} is not possible: {path} stores {lo}..{hi}. Choose {lo + 1}..{hi}."
            )
    return budgets


def _destination(a: CalibrateArguments, path: Path) -> Path:
    target = Path(a.out).expanduser() if a.out else path / PROFILE_NAME
    if not target.parent.is_dir():
        raise InputError(
            f"{target.parent} is no directory; the profile cannot be written there. Create it first."
        )
    if target.is_dir():
        raise InputError(f"{target} is a directory; --out names the profile's file.")
    return target


def _with_dp_llm(
    decoder: Decoder,
    sequences: torch.Tensor,
    profile: CalibrationProfile,
    targets: list[float],
    progress: Any,
    seed: int,
) -> CalibrationProfile:
    high = profile.bits[1]
    caps = {f"{high}": profile.planes(None)}
    caps |= {b: profile.resident[row] for b, row in profile.origin["budgets"].items() if float(b) < high}
    found = calibrate_dp_llm(
        decoder, sequences, caps, dict.fromkeys(caps, targets), DPLLMOptions(seed=seed), progress
    )
    return replace(profile, extra=dict(profile.extra) | found)


def _check(
    calibrator: Calibrator,
    profile: CalibrationProfile,
    targets: list[float],
    budgets: list[float],
    progress: Any,
) -> list[dict[str, float]]:
    """Effective bits of decoding the calibration text at every target under every budget."""
    checked = []
    cells = [(t, b) for b in budgets for t in targets if t <= b]
    with dense(calibrator.decoder):
        for i, (t, b) in enumerate(cells):
            planes = profile.budget(b)
            lam = profile.lambda_for(min(t, profile.target_range(planes)[1]), planes)
            used = calibrator.bits_used(profile, lam, calibrator.sequences, planes)
            checked.append({"target_bits": t, "memory_bits": b, "effective_bits": round(used, 4)})
            progress("targets", i + 1, len(cells))
    return checked


def _merged(profile: CalibrationProfile, target: Path) -> CalibrationProfile:
    """With the budgets and policies that an earlier run of the same measurement stored there."""
    if not target.is_file():
        return profile
    try:
        return merge(profile, CalibrationProfile.load(target, profile.overlay_hash))
    except InputError:  # of other text or another overlay, or damaged: it is replaced
        return profile


def _effort(profile: CalibrationProfile, seconds: float) -> str:
    """Time and memory this took, and the time an 8B model would take: products are all of it, so by weights."""
    peak = peak_bytes()
    memory = "" if peak is None else f"peak memory {peak / 1e9:.2f} GB; "
    hours = seconds * LLAMA_8B / float(profile.weights.sum()) / 3600
    return f"{memory}at this pace a Llama of 8B weights would take {hours:.1f} hours for as many tokens"


def _report(
    a: CalibrateArguments, path: Path, target: Path, profile: CalibrationProfile,
    checked: list[dict[str, float]], seconds: float,
) -> None:  # fmt: skip
    low, high = profile.target_range()
    share = profile.estimator_bytes() / (profile.weights.sum() * 3.5 / 8)
    note(
        f"{target}: {len(profile.group_names)} groups, targets {low:.2f} to {high:.2f} bits, {seconds:.1f} s; "
        f"the selector reads {profile.estimator_bytes() / 1e3:.1f} kB a token ({share:.2%} of a 3.5-bit step)"
    )
    note(f"  {_effort(profile, seconds)}")
    note(f"  a token's sensitivity is foretold with R^2 {profile.origin['probe_explains']:.2f}")
    for row in checked:
        note(
            f"  target {row['target_bits']:g} within {row['memory_bits']:g} resident: "
            f"{row['effective_bits']:.3f} bits on the calibration text"
        )
    note(f"next: dpllm generate --overlay {path} --target-bits 3.25 'your prompt'")
    if a.json:
        loss = profile.mean_loss.sum(axis=0)
        print_json(
            {"profile": str(target), "overlay_hash": profile.overlay_hash, "groups": len(profile.group_names),
             "granularity": a.granularity, "target_range": [low, high], "seconds": round(seconds, 2),
             "peak_bytes": peak_bytes(), "estimator_bytes": profile.estimator_bytes(),
             "probe_explains": profile.origin["probe_explains"], "targets": checked,
             "mean_loss": np.round(loss, 6).tolist()}
        )  # fmt: skip
