"""Opens an engine: what lies in a directory, with a policy and a target to begin with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dpllm import reference
from dpllm.base.errors import InputError
from dpllm.base.shell import command_line
from dpllm.base.text import load_tokenizer
from dpllm.calib.runtime.profile import PROFILE_NAME, CalibrationProfile
from dpllm.control.cost_model import CostModel
from dpllm.engine import Engine
from dpllm.model.loading import LoadOptions, is_overlay, load_decoder
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.make import resident_mean
from dpllm.quant.overlay import Overlay
from dpllm.quant.resolve import resolve_model

DEFAULT_TARGET_BITS = 3.5


def open_engine(
    path: str | Path | None = None,
    *,
    target_bits: float | None = None,
    policy: str | None = None,
    profile: str | Path | None = None,
    options: LoadOptions | None = None,
    measure_cost: Callable[[Engine], CostModel] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Engine:
    """Loads an overlay, a plain checkpoint or a GGUF file (None: the bundled reference model's overlay).

    `dpllm.load` is the same with plain arguments. target_bits, policy: default rate-distortion at 3.5 bits where a
    profile lies beside the overlay, else every resident plane. progress: told what takes a while, as the
    first use of a GGUF file, or the decode step that is compiled and captured on a GPU. Raises InputError for anything
    that cannot be loaded or met.
    """
    where = reference.overlay_path() if path is None else resolve_model(str(path), progress)
    engine = _loaded(where, profile, options, measure_cost)
    _aim(engine, target_bits, policy)
    engine.prepare(progress)
    return engine


def _loaded(
    where: Path, profile: str | Path | None, options: LoadOptions | None,
    measure_cost: Callable[[Engine], CostModel] | None,
) -> Engine:  # fmt: skip
    beside = where / PROFILE_NAME if profile is None else Path(profile)
    found = None
    if is_overlay(where) and (profile is not None or beside.exists()):
        found = CalibrationProfile.load(beside, Overlay.open(where).hash)
    options = options or LoadOptions()
    if found is not None:
        options = replace(options, granularity=found.granularity)
    return Engine(where, load_decoder(where, options), load_tokenizer(where), found, measure_cost)


def _aim(engine: Engine, target_bits: float | None, policy: str | None) -> None:
    """The policy and target that an engine begins with."""
    if not engine.quantized:
        if target_bits is not None or policy is not None:
            raise InputError(
                f"{engine.path} is not quantised, so it has one precision. "
                f"Run: {command_line('quantize', engine.path, 'OUT')}"
            )
        return
    held = resident_mean(engine.decoder)
    if policy is None and target_bits is None and engine.profile is None:
        engine.policy = StaticPolicy([g.resident_bits for g in engine.decoder.groups], name="uniform")
        engine.target_bits = held
        return
    if target_bits is None:
        target_bits = min(DEFAULT_TARGET_BITS, held)
    engine.set_policy(policy or ("rate-distortion" if engine.profile else "uniform"), target_bits)
