"""Calibrates an overlay: measures what each bit of each group is worth, and stores it as a profile.

report = calibrate("llama-1b", targets=[3.25, 4])
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import transformers

from dpllm.base.errors import InputError
from dpllm.base.files import remove_leftovers
from dpllm.base.locks import only_writer
from dpllm.base.places import file_to_write
from dpllm.base.progress import Progress, no_progress
from dpllm.base.text import check_tokens, documents_sha256, load_tokenizer, sample_sequences
from dpllm.calib.calibrate import CalibrateOptions, Calibrator
from dpllm.calib.dp_llm import DPLLMOptions, calibrate_dp_llm
from dpllm.calib.partial_results import PartialResults
from dpllm.calib.runtime.profile import PROFILE_NAME, CalibrationProfile, merge
from dpllm.context.head_profile import head_profile
from dpllm.context.pruner import HEADS
from dpllm.decode.prompting import Prompts
from dpllm.model.config import ModelConfig
from dpllm.model.decoder import Decoder
from dpllm.model.hardware import check_device, cpu_options
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.model.memory import process_peak_bytes
from dpllm.prepare.data import calibration_documents
from dpllm.quant.overlay import Overlay
from dpllm.version import __version__

LLAMA_8B = 6.98e9  # weights of Llama-3-8B's decoder matrices
USUAL_BUDGET = (
    5.0  # mean resident bits that every profile allots planes for, where the overlay stores so many
)


@dataclass(frozen=True)
class CheckedTarget:
    """The effective bits that decoding the calibration text really read at a target.

    target_bits: mean bits per weight asked for. memory_bits: mean resident bits. effective_bits: bits per weight read.
    """

    target_bits: float
    memory_bits: float
    effective_bits: float


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration measured, and where it stored it.

    path: the profile's file. overlay: the overlay's directory. profile: what this run measured; the file also holds
    what earlier runs of the same measurement stored there. targets: the targets that were checked. seconds: the time
    it took. process_peak_bytes: the most memory the process has held; None where the system does not say.
    """

    path: Path
    overlay: Path
    profile: CalibrationProfile = field(repr=False)
    targets: tuple[CheckedTarget, ...]
    seconds: float
    process_peak_bytes: int | None

    @property
    def target_range(self) -> tuple[float, float]:
        """The lowest and the highest target that can be met, in bits per weight."""
        return self.profile.target_range()

    @property
    def hours_for_8b(self) -> float:
        """Hours that a Llama of 8B weights would take for as many tokens: nearly all time is products."""
        return self.seconds * LLAMA_8B / float(self.profile.weights.sum()) / 3600


def calibrate(
    overlay: str | Path,
    *,
    targets: Sequence[float] | None = None,
    memory_bits: float | Sequence[float] | None = None,
    data: str | Path | None = None,
    granularity: str = "fused",
    samples: int = 32,
    sequence_length: int = 512,
    asynchronous: bool = False,
    dp_llm: bool = False,
    kv_heads: bool = False,
    out: str | Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    seed: int = 0,
    restart: bool = False,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Measures what each group's next bit is worth and writes the profile; one run serves every target.

    A run that is stopped continues where it was when it is called again with the same arguments. What an earlier run
    of the same measurement stored in the same file is kept.

    overlay: a directory made by `quantize`. targets: mean bits per weight to check by decoding at the end.
    memory_bits: mean resident bits to allot planes for. data: the text to calibrate on; None is the bundled Python
    code. granularity: 'fused' decides once for q/k/v and once for gate/up, 'linear' once per matrix. samples,
    sequence_length: how many sequences of how many tokens. asynchronous: estimate q/k/v and gate/up from inputs one
    sub-block old. dp_llm: also calibrate DP-LLM's policy for each target. kv_heads: also score the KV heads, for KV
    policy 'whole-heads'. out: the profile's file; None is profile.safetensors in the overlay. device: 'cpu' or 'cuda'.
    threads: CPU threads; None is one per core. seed: of the sample. restart: delete the unfinished work of a run with
    other arguments. progress: called with (stage, done, total).

    Raises InputError for an overlay, a text, a place or an option that cannot be used, and where another process is
    writing the profile.
    """
    _check_sample(granularity=granularity, samples=samples, sequence_length=sequence_length)
    cpu, show, path = cpu_options(threads), progress or no_progress, Path(overlay).expanduser()
    opened = Overlay.open(path)
    wanted = _Wanted.of(opened, path, targets=targets, memory_bits=memory_bits, dp_llm=dp_llm)
    place = path / PROFILE_NAME if out is None else Path(out).expanduser()
    target = file_to_write(place)
    check_device(device)
    with only_writer(target):
        remove_leftovers(target)
        documents, tokenizer = calibration_documents(data), load_tokenizer(path)
        sequences = sample_sequences(documents, tokenizer, samples, sequence_length, seed).to(device)
        check_tokens(sequences.flatten().tolist(), ModelConfig.read(path).vocab_size, path)
        decoder = load_decoder(path, LoadOptions(granularity=granularity, device=device, cpu=cpu))
        origin = {
            "documents_sha256": documents_sha256(documents), "seed": seed, "samples": len(sequences),
            "sequence_length": sequence_length, "device": device, "asynchronous": asynchronous,
            "versions": {"dpllm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        }  # fmt: skip
        options = CalibrateOptions(seed=seed, budgets=wanted.stored, asynchronous=asynchronous)
        began = time.perf_counter()
        calibrator = Calibrator(decoder, sequences, options, PartialResults(target))
        profile = calibrator.run(opened.hash, granularity, origin, show, restart=restart)
        if dp_llm:
            profile = _with_dp_llm(calibrator, profile, wanted.targets, seed=seed, progress=show)
        if kv_heads:
            prompts = Prompts(tokenizer, decoder.config, path)
            profile = _with_heads(calibrator, profile, show, decoder=decoder, prompts=prompts)
        checked = _check_targets(calibrator, profile, wanted, show)
        _merged(profile, target).save(target)
        calibrator.partial.remove()  # the profile is on disk now
    return CalibrationReport(
        path=place, overlay=path, profile=profile, targets=checked, seconds=time.perf_counter() - began,
        process_peak_bytes=process_peak_bytes(),
    )  # fmt: skip


def _check_sample(*, granularity: str, samples: int, sequence_length: int) -> None:
    if granularity not in ("fused", "linear"):
        raise InputError(f"granularity '{granularity}' is unknown. Use 'fused' or 'linear'.")
    if samples < 1 or sequence_length < 16:
        raise InputError("at least one sample of at least 16 tokens is needed to calibrate.")


@dataclass(frozen=True)
class _Wanted:
    """What the profile is to serve: stored widths, targets to check, mean resident bits to allot planes for."""

    bits: tuple[int, int]
    targets: tuple[float, ...]
    budgets: tuple[float, ...]

    @classmethod
    def of(
        cls,
        opened: Overlay,
        path: Path,
        *,
        targets: Sequence[float] | None,
        memory_bits: float | Sequence[float] | None,
        dp_llm: bool,
    ) -> _Wanted:
        """Raises InputError for what this overlay cannot serve."""
        lo, hi = opened.bits
        if lo == hi:
            raise InputError(f"{path} stores one width only ({lo}); there is nothing to choose.")
        if isinstance(memory_bits, (int, float)):
            memory_bits = [memory_bits]
        asked, budgets = tuple(targets or ()), tuple(memory_bits or ())
        for b in budgets:
            if not lo < b <= hi:
                raise InputError(
                    f"memory_bits {b:g} is not possible: {path} stores {lo}..{hi}. Choose {lo + 1}..{hi}."
                )
        most = max(budgets, default=hi)
        if outside := [t for t in asked if not lo <= t <= most]:
            raise InputError(
                f"target {outside[0]:g} bits is impossible: {lo} (seed) to {most:g} can be read. "
                "Choose a target in between."
            )
        if dp_llm and not asked:
            raise InputError(
                "DP-LLM's policy is calibrated for each target. Give targets, such as 3.25,3.5,4."
            )
        return cls((lo, hi), asked, budgets)

    @property
    def stored(self) -> tuple[float, ...]:
        """The budgets that the profile allots planes for, ascending."""
        lo, hi = self.bits
        return tuple(sorted({USUAL_BUDGET, *self.budgets} if lo < USUAL_BUDGET <= hi else set(self.budgets)))

    @property
    def cells(self) -> list[tuple[float, float]]:
        """Pairs of a target and a budget that holds it."""
        budgets = self.budgets or (float(self.bits[1]),)
        return [(t, b) for b in budgets for t in self.targets if t <= b]


def _with_dp_llm(
    calibrator: Calibrator,
    profile: CalibrationProfile,
    targets: Sequence[float],
    *,
    seed: int,
    progress: Progress,
) -> CalibrationProfile:
    """Adds DP-LLM's policy for every target, under every budget of planes."""
    high = profile.bits[1]
    caps = {f"{high}": profile.planes(None)}
    caps |= {b: profile.resident[row] for b, row in profile.origin["budgets"].items() if float(b) < high}
    found = calibrate_dp_llm(
        calibrator.decoder, calibrator.sequences, caps, {name: list(targets) for name in caps},
        DPLLMOptions(seed=seed), progress, partial=calibrator.partial,
    )  # fmt: skip
    return replace(profile, extra=dict(profile.extra) | found)


def _with_heads(
    calibrator: Calibrator,
    profile: CalibrationProfile,
    progress: Progress,
    *,
    decoder: Decoder,
    prompts: Prompts,
) -> CalibrationProfile:
    """Adds the score of every KV head, for KV policy 'whole-heads': its largest in any text."""
    best: list[np.ndarray] = []
    for i, ids in enumerate(calibrator.sequences.tolist()):

        def compute(ids: list[int] = ids) -> dict[str, np.ndarray]:
            return {"scores": head_profile([ids], decoder=decoder, prompts=prompts).cpu().numpy()}

        best.append(calibrator.partial.keep("heads", i, compute)["scores"])
        progress("KV heads", i + 1, len(calibrator.sequences))
    return replace(profile, extra=dict(profile.extra) | {HEADS: np.max(best, axis=0)})


def _check_targets(
    calibrator: Calibrator, profile: CalibrationProfile, wanted: _Wanted, progress: Progress
) -> tuple[CheckedTarget, ...]:
    """Decodes the calibration text at every target under every budget."""
    checked, cells, fast = [], wanted.cells, calibrator.dequantised()
    for done, (target, budget) in enumerate(cells, 1):
        planes = profile.budget(budget)
        lam = profile.lambda_for(min(target, profile.target_range(planes)[1]), planes)

        def compute(lam: float = lam, planes: np.ndarray = planes) -> dict[str, np.ndarray]:
            return {"bits": np.asarray([fast.bits_used(profile, lam, calibrator.sequences, planes)])}

        used = float(calibrator.partial.keep("target", [target, budget], compute)["bits"][0])
        checked.append(CheckedTarget(target, budget, round(used, 4)))
        progress("targets", done, len(cells))
    return tuple(checked)


def _merged(profile: CalibrationProfile, target: Path) -> CalibrationProfile:
    """The profile with the budgets and policies that an earlier run of the same measurement stored there."""
    if not target.is_file():
        return profile
    try:
        return merge(profile, CalibrationProfile.load(target, profile.overlay_hash))
    except InputError:  # of other text or another overlay, or damaged: it is replaced
        return profile
