"""What a decode step costs on this machine: measured in seconds, kept per overlay and device, for plans and control.

A step's time is that of reading the weights at some effective bits plus that of attending to the pairs a cache holds;
both are tables of measured points, straight lines between them. What is timed is the step a user waits for: the
native call, the policy's decisions, sampling and the Python around them.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from dpllm.base.errors import InputError
from dpllm.base.progress import Progress, silent
from dpllm.control.cost_model import CostModel
from dpllm.planning.machine import processor_name
from dpllm.policies.base import PrecisionPolicy
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.make import make_policy, resident_mean

if TYPE_CHECKING:
    from dpllm.engine import Engine, Step
    from dpllm.kvzip_bridge.cache import KVCache

POINTS = 7  # effective bits at which the step is timed
TOKENS = 12  # decoded in a row at each point, the first of which do not count: caches and predictors settle
WARM_UP = 4
SECONDS = 4.0  # to spend, more or less: slow models get fewer rounds
ROUNDS = (3, 24)  # at least, at most
EVENLY = 0.02  # how firmly planes are held to one time, relative to what was measured
CONTEXTS = (1024, 4096)  # tokens of cache whose attention is timed, as far as the model has the positions


class Cell(NamedTuple):
    """One point to time: effective bits asked for, tokens of context, and whether every group reads the same width."""

    bits: float
    context: int = 0
    uniform: bool = False


def device_name(engine: Engine) -> str:
    """What a measurement holds for: processor or GPU, backend, threads."""
    backend, threads = engine.decoder.backend, ""
    if backend.cpu is not None:
        threads = f", {backend.cpu.handle.threads} threads, {backend.cpu.handle.options.accuracy}"
    device = engine.decoder.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return f"{name}, {backend.name}{threads}"


def cost_path(engine: Engine) -> Path:
    """The file where this machine keeps the cost of this overlay, held with this number of planes."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpllm"
    key = f"{device_name(engine)} {resident_mean(engine.decoder):.4f}"
    return root / f"{_hash(engine)[:16]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"


def cost_of(engine: Engine, path: Path | None = None, progress: Progress = silent) -> CostModel:
    """The stored cost model, or a fresh one, which is then stored.

    path: a file to use instead of the cache. Raises InputError where it was measured with another overlay or device.
    """
    if path is not None:
        found = CostModel.load(path)
        if found.overlay_hash != _hash(engine):
            raise InputError(f"{path} was measured with another overlay. Run: dpllm profile")
        if found.device != device_name(engine):
            raise InputError(
                f"{path} was measured on another device ({found.device}; this is {device_name(engine)}). "
                "Run: dpllm profile"
            )
        return found
    stored = cost_path(engine)
    if stored.exists():
        with contextlib.suppress(InputError):  # a cache: what cannot be read is measured again
            return CostModel.load(stored)
    found = measure(engine, progress)
    with contextlib.suppress(OSError, InputError):  # no place to keep it; it costs seconds
        found.save(stored)
    return found


def measure(engine: Engine, progress: Progress = silent) -> CostModel:
    """Times decode steps: effective bits and contexts take turns, so that a machine that changes its speed meanwhile
    slows all of them alike. Raises InputError for a model without bits to choose."""
    taken: dict[Cell, list[Step]] = {cell: [] for cell in cells_of(engine)}
    began, rounds = time.perf_counter(), ROUNDS[1]
    done = 0
    while done < rounds:
        for cell, steps in taken.items():
            steps += steps_at(engine, cell)
        done += 1
        if time.perf_counter() - began > SECONDS and done >= ROUNDS[0]:
            rounds = done
        progress("timing", done, rounds)
    return fit(engine, taken)


def cells_of(engine: Engine) -> list[Cell]:
    """Effective bits with an empty cache, ends included; widths between them; and contexts at the least bits."""
    low, high = engine.calibration().target_range(engine.planes)
    if high - low < 0.1:
        raise InputError("only the seed width is resident, so there are no bits to choose. Hold more planes.")
    room = engine.decoder.config.max_positions - TOKENS - 1
    contexts = sorted({min(n, room) for n in CONTEXTS if room > 0})
    return [
        *(Cell(float(t)) for t in np.linspace(low, high, POINTS)),
        *(Cell(b, uniform=True) for b in range(math.floor(low) + 1, math.ceil(high))),
        *(Cell(float(low), n) for n in contexts),
    ]


def steps_at(engine: Engine, cell: Cell, behind: KVCache | None = None) -> list[Step]:
    """A few tokens after a cache of `cell.context` pairs a head, or after a given one. Values do not change time."""
    groups = engine.decoder.groups
    policy: PrecisionPolicy = (
        StaticPolicy([min(int(cell.bits), g.resident_bits) for g in groups], name="uniform")
        if cell.uniform
        else make_policy("rate-distortion", cell.bits, engine.decoder, engine.profile)
    )
    return list(engine.decode_after(cell.context, TOKENS, policy, behind))[WARM_UP:]


def fit(engine: Engine, taken: dict[Cell, list[Step]]) -> CostModel:
    """The cost model of the steps that were timed at `cells_of`."""
    ms = {cell: statistics.median(s.tpot_ms for s in steps) for cell, steps in taken.items()}
    read = {cell: statistics.mean(s.effective_bits for s in steps) for cell, steps in taken.items()}
    empty = [cell for cell in taken if not cell.context]
    behind = [cell for cell in taken if cell.context]
    at = sorted({round(read[cell], 4): ms[cell] for cell in empty if not cell.uniform}.items())
    heads = engine.decoder.config.num_layers * engine.decoder.config.num_kv_heads
    added = [ms[cell] - ms[Cell(cell.bits)] for cell in behind]
    return CostModel(
        device=device_name(engine), overlay_hash=_hash(engine), resident_bits=resident_mean(engine.decoder),
        bits=tuple(b for b, _ in at), weights_ms=_rising([t for _, t in at]),
        pairs=(0.0, *(float(cell.context * heads) for cell in behind)),
        attention_ms=_rising([0.0, *(max(0.0, a) for a in added)]),
        plane_ms=plane_times(engine, [Timed(taken[cell], ms[cell], not cell.uniform) for cell in empty]),
    )  # fmt: skip


class Timed(NamedTuple):
    """Steps, the milliseconds of one of them, and whether they chose their widths, which takes time too."""

    steps: Sequence[Step]
    ms: float
    chosen: bool


def plane_times(engine: Engine, timed: Sequence[Timed]) -> tuple[float, ...]:
    """CostModel.plane_ms: the least squares of relative errors, and none below 0.

    Where the steps leave it open which of some planes took the time, they share it evenly.
    """
    from scipy.optimize import nnls  # most runs measure nothing, and need not wait for it

    groups, seed = engine.decoder.groups, engine.decoder.groups[0].seed_bits
    planes = max(g.resident_bits for g in groups) - seed
    weights = np.asarray([g.weights for g in groups], np.float64)
    rows, ms = [], np.asarray([t.ms for t in timed])
    for t in timed:
        bits = np.asarray([s.bits for s in t.steps])  # [T, G]
        read = [((bits > seed + p) * weights).sum(1).mean() / weights.sum() for p in range(planes)]
        rows.append([1.0, float(t.chosen), *read])
    each = (ms.max() - ms.min()) / planes
    even = EVENLY * np.eye(planes + 2)[2:]
    found, _ = nnls(
        np.concatenate([np.asarray(rows) / ms[:, None], even / ms.max()]),
        np.concatenate([np.ones(len(ms)), np.full(planes, EVENLY * each / ms.max())]),
    )
    return tuple(found[2:].tolist())


def _rising(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest values that do not fall: more bits and more pairs take less time by chance only."""
    from scipy.optimize import isotonic_regression

    return tuple(isotonic_regression(values).x.tolist())


def _hash(engine: Engine) -> str:
    return engine.calibration().overlay_hash
