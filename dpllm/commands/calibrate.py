"""`dpllm calibrate`."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import transformers

from dpllm import __version__
from dpllm.calib.calibrate import CalibrateOptions, Calibrator
from dpllm.calib.profile import PROFILE_NAME
from dpllm.commands.common import (
    check_device,
    cpu_options,
    default_text,
    note,
    parse_targets,
    print_json,
    stage_bars,
)
from dpllm.kernels.errors import InputError
from dpllm.loading import LoadOptions, load_decoder
from dpllm.quant.overlay import Overlay
from dpllm.quant.text import documents_sha256, load_tokenizer, read_documents, sample_sequences


def run(
    overlay: str, targets: str | None, memory_bits: int | None, data: str | None, granularity: str, samples: int,
    sequence_length: int, out: str | None, device: str, threads: int | None, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Calibrates and writes the profile."""
    if granularity not in ("fused", "linear"):
        raise InputError(f"--granularity {granularity} is unknown. Use 'fused' or 'linear'.")
    if samples < 1 or sequence_length < 16:
        raise InputError("at least one sample of at least 16 tokens is needed to calibrate.")
    cpu = cpu_options(threads)
    path = Path(overlay).expanduser()
    opened = Overlay.open(path)
    if opened.bits[0] == opened.bits[1]:
        raise InputError(f"{path} stores one width only ({opened.bits[0]}); there is nothing to choose.")
    lo, hi = opened.bits
    budget = hi if memory_bits is None else memory_bits
    if not lo < budget <= hi:
        raise InputError(
            f"--memory-bits {budget} is not possible: {path} stores {lo}..{hi}. Choose {lo + 1}..{hi}."
        )
    wanted = [] if targets is None else parse_targets(targets)
    if outside := [t for t in wanted if not lo <= t <= budget]:
        raise InputError(f"target {outside[0]:g} bits is impossible: {lo} (seed) to {budget} can be read.")
    target = Path(out).expanduser() if out else path / PROFILE_NAME
    if not target.parent.is_dir():
        raise InputError(
            f"{target.parent} is no directory; the profile cannot be written there. Create it first."
        )
    if target.is_dir():
        raise InputError(f"{target} is a directory; --out names the profile's file.")
    documents = read_documents(default_text(data))
    tokenizer = load_tokenizer(path)
    sequences = sample_sequences(documents, tokenizer, samples, sequence_length, seed).to(
        check_device(device)
    )
    decoder = load_decoder(path, LoadOptions(granularity=granularity, device=device, cpu=cpu))
    origin = {
        "documents_sha256": documents_sha256(documents), "seed": seed, "samples": len(sequences),
        "sequence_length": sequence_length, "device": device,
        "versions": {"dpllm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    began = time.perf_counter()
    calibrator = Calibrator(decoder, sequences, CalibrateOptions(seed=seed))
    with stage_bars() as progress:
        profile = calibrator.run(opened.hash, granularity, origin, progress)
        checked = []
        for i, t in enumerate(wanted):
            used = calibrator.bits_used(profile, profile.lambda_for(t, budget), sequences, budget)
            checked.append({"target_bits": t, "memory_bits": budget, "effective_bits": round(used, 4)})
            progress("targets", i + 1, len(wanted))
    profile.save(target)
    seconds = time.perf_counter() - began
    low, high = profile.target_range()
    share = profile.estimator_bytes() / (profile.weights.sum() * 3.5 / 8)
    note(
        f"{target}: {len(profile.group_names)} groups, targets {low:.2f} to {high:.2f} bits, {seconds:.1f} s; "
        f"the selector reads {profile.estimator_bytes() / 1e3:.1f} kB a token ({share:.2%} of a 3.5-bit step)"
    )
    for row in checked:
        note(f"  target {row['target_bits']:g}: {row['effective_bits']:.3f} bits on the calibration text")
    note(f"next: dpllm generate --overlay {path} --target-bits 3.25 'your prompt'")
    if as_json:
        loss = profile.mean_loss.sum(axis=0)
        print_json(
            {"profile": str(target), "overlay_hash": opened.hash, "groups": len(profile.group_names),
             "granularity": granularity, "target_range": [low, high], "seconds": round(seconds, 2),
             "estimator_bytes": profile.estimator_bytes(), "targets": checked, "mean_loss": np.round(loss, 6).tolist()}
        )  # fmt: skip
