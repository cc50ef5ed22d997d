"""Loads a model with plain arguments: what `dpllm.load` is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dpllm import reference
from dpllm.base.errors import InputError
from dpllm.base.quantities import parse_share, parse_size, rise
from dpllm.base.shell import command_line
from dpllm.control.cost_model import CostModel
from dpllm.engine import Engine
from dpllm.model.hardware import check_device, cpu_options
from dpllm.model.loading import LoadOptions, is_overlay
from dpllm.model.memory import resident_bits_within
from dpllm.opening import open_engine
from dpllm.planning.cost_measurement import cost_of
from dpllm.planning.quality_model import quality_of
from dpllm.quant.resolve import resolve_model

if TYPE_CHECKING:
    import torch


def load(
    path_or_hub_id: str | Path | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    backend: str | None = None,
    accuracy: str = "balanced",
    resident_bits: int | None = None,
    max_memory: int | str | None = None,
    policy: str | None = None,
    target_bits: float | None = None,
    tpot_ms: float | None = None,
    max_quality_loss: float | str | None = None,
    profile: str | Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Engine:
    """Loads an overlay, a plain checkpoint or a GGUF file.

    path_or_hub_id: a directory, a GGUF file, or the id of a model on the Hugging Face hub; None is the bundled
    reference model. device: 'cpu' or 'cuda'. dtype: of activations; default float32 on a CPU and float16 on a GPU.
    threads: CPU threads; default one per core. backend: kernels, such as 'cpu:avx2' or 'reference'; default the best
    there is. accuracy: of the CPU kernels, 'balanced', 'exact' (16-bit activations) or 'fast'.

    resident_bits: planes to read from disk and hold; or max_memory: hold as many planes as fit, in bytes or as '4GB'.

    The target is one of target_bits (mean bits per weight, chosen per layer and token by `policy`) and tpot_ms
    (milliseconds per token; the time of a step is measured at the first use). max_quality_loss: with tpot_ms, read at
    least the bits that keep the rise of perplexity below this share, as 0.02 or '2%'. Without a target: 3.5 bits where
    a calibration profile lies beside the overlay, else every resident plane. profile: another calibration profile.
    progress: called with a line about what takes a while.

    Raises InputError for anything that cannot be loaded or met.
    """
    where = _directory(path_or_hub_id, progress)
    if tpot_ms is not None and (target_bits is not None or policy not in (None, "rate-distortion")):
        raise InputError(
            "tpot_ms chooses the bits itself, by policy rate-distortion. Leave out target_bits and policy."
        )
    if max_quality_loss is not None and tpot_ms is None:
        raise InputError(
            "max_quality_loss is a bound for tpot_ms. Give tpot_ms, or call dpllm.plan for a plan."
        )
    options = LoadOptions(
        _planes(where, resident_bits, max_memory), backend=backend, cpu=cpu_options(threads, accuracy),
        device=check_device(device), dtype=_dtype(device, dtype),
    )  # fmt: skip
    engine = open_engine(
        where, target_bits=target_bits, policy=policy, profile=profile, options=options, measure_cost=stored_cost,
        progress=progress,
    )  # fmt: skip
    if tpot_ms is not None:
        engine.set_target(tpot_ms=tpot_ms, least_bits=bits_for_quality(engine, max_quality_loss))
    return engine


def stored_cost(engine: Engine) -> CostModel:
    """The cost model of an engine: as stored on this machine, or measured now and stored."""
    return cost_of(engine)


def bits_for_quality(engine: Engine, max_quality_loss: float | str | None) -> float:
    """The fewest effective bits at which perplexity rises by no more than this share; 0 without a bound.

    Raises InputError for a share that is not one, or a model without measured or calibrated quality.
    """
    if max_quality_loss is None:
        return 0.0
    share, quality = parse_share(max_quality_loss), quality_of(engine)
    return next((b for b in quality.bits if rise(quality.loss(b)) <= share), quality.bits[-1])


def _directory(path_or_hub_id: str | Path | None, progress: Callable[[str], None]) -> Path:
    if path_or_hub_id is None:
        return reference.overlay_path()
    return resolve_model(str(path_or_hub_id), progress)


def _planes(where: Path, resident_bits: int | None, max_memory: int | str | None) -> int | None:
    """The number of planes to hold; None for all of them. Raises InputError where none fits."""
    if resident_bits is not None and max_memory is not None:
        raise InputError("resident_bits and max_memory exclude each other: give one of them.")
    if resident_bits is None and max_memory is None:
        return None
    if not is_overlay(where):
        raise InputError(
            f"{where} is not quantised: all of it is resident. Run: {command_line('quantize', where, 'OUT')}"
        )
    if max_memory is None:
        return resident_bits
    return resident_bits_within(where, parse_size(max_memory))


def _dtype(device: str, dtype: torch.dtype | None) -> torch.dtype:
    import torch

    if dtype is not None:
        return dtype
    return torch.float16 if device == "cuda" else torch.float32
