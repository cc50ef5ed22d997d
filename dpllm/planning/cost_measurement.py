"""Measures how long a decode step takes on this machine, and stores the result for plans and for control.

The measurement takes a few seconds. It is stored once for each overlay and device. A step's time is the time to read
the weights at some effective bits plus the time to attend to the pairs in the cache. Both are tables of measured points
with linear interpolation between them. What a user waits for besides is one number: drawing a token, text, and the
Python code around them.
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
from dpllm.base.progress import Progress, no_progress
from dpllm.base.shell import command_line
from dpllm.control.cost_model import CostModel
from dpllm.planning.host import processor_name
from dpllm.policies.base import PrecisionPolicy
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.make import make_policy, resident_mean

if TYPE_CHECKING:
    from dpllm.engine import Engine, Step
    from dpllm.kvzip_bridge.cache import KVCache

POINTS = 7  # numbers of effective bits at which the step is timed
TOKENS = 12  # decoded in a row at each point
WARM_UP = 4  # first tokens of each row that do not count, because caches and branch predictors settle
SECONDS = 4.0  # approximate time to spend; slow models get fewer rounds
ROUNDS = (3, 24)  # least and greatest number of rounds
EVENLY = 0.02  # weight of the prior that all planes take the same time, relative to the measurements
CONTEXTS = (1024, 4096)  # tokens in the cache when attention is timed; limited to the positions of the model


class Cell(NamedTuple):
    """One setting that is timed.

    bits: target in effective bits. context: tokens in the cache. uniform: every group reads the same width.
    """

    bits: float
    context: int = 0
    uniform: bool = False


def device_name(engine: Engine) -> str:
    """Names the processor or GPU, the backend and its threads. A measurement is valid only for the same name."""
    backend, threads = engine.decoder.backend, ""
    if backend.cpu is not None:
        threads = f", {backend.cpu.handle.threads} threads, {backend.cpu.handle.options.accuracy}"
    device = engine.decoder.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return f"{name}, {backend.name}{threads}"


def cost_path(engine: Engine) -> Path:
    """Returns the file in which this machine stores the cost of this overlay with its resident planes."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpllm"
    key = f"{device_name(engine)} {resident_mean(engine.decoder):.4f}"
    return root / f"{_hash(engine)[:16]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"


def cost_of(engine: Engine, path: Path | None = None, progress: Progress = no_progress) -> CostModel:
    """Returns the stored cost model, or measures one and stores it.

    path: a file to read instead of the cache. Raises InputError if `path` was measured with another overlay or device.
    """
    if path is not None:
        found, again = CostModel.load(path), command_line("profile", "--overlay", engine.path)
        if found.overlay_hash != _hash(engine):
            raise InputError(f"{path} was measured with another overlay. Run: {again}")
        if found.device != device_name(engine):
            raise InputError(
                f"{path} was measured on another device ({found.device}; this is {device_name(engine)}). "
                f"Run: {again}"
            )
        return found
    stored = cost_path(engine)
    if stored.exists():
        with contextlib.suppress(InputError):  # this is only a cache: measure again if it cannot be read
            return CostModel.load(stored)
    found = measure_cost(engine, progress)
    with contextlib.suppress(OSError, InputError):  # the next call can measure again
        found.save(stored)
    return found


def measure_cost(engine: Engine, progress: Progress = no_progress) -> CostModel:
    """Times decode steps and returns the cost model.

    The cells take turns, so that a machine that changes its speed meanwhile slows all of them alike. Raises InputError
    for a model that has no calibration profile or only one resident width.
    """
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
    return fit_cost_model(engine, taken)


def cells_of(engine: Engine) -> list[Cell]:
    """Returns the cells to time.

    They are a range of effective bits with an empty cache (both ends included), the whole widths inside that range, and
    several contexts at the fewest bits. Raises InputError if only the seed width is resident.
    """
    low, high = engine.calibration().target_range(engine.planes)
    if high - low < 0.1:
        raise InputError(
            "only the seed width is resident, so there are no bits to choose. Load more planes (--resident-bits)."
        )
    room = engine.decoder.config.max_positions - TOKENS - 1
    contexts = sorted({min(n, room) for n in CONTEXTS if room > 0})
    return [
        *(Cell(float(t)) for t in np.linspace(low, high, POINTS)),
        *(Cell(b, uniform=True) for b in range(math.floor(low) + 1, math.ceil(high))),
        *(Cell(float(low), n) for n in contexts),
    ]


def steps_at(engine: Engine, cell: Cell, cache: KVCache | None = None) -> list[Step]:
    """Decodes TOKENS tokens and returns their steps without the warm-up.

    cache: decode after this cache; None: after a cache of `cell.context` tokens that were never read, because the
    values of the pairs do not change the time.
    """
    groups = engine.decoder.groups
    policy: PrecisionPolicy = (
        StaticPolicy([min(int(cell.bits), g.resident_bits) for g in groups], name="uniform")
        if cell.uniform
        else make_policy("rate-distortion", cell.bits, engine.decoder, engine.profile)
    )
    return list(engine.decode_after(cell.context, TOKENS, policy, cache))[WARM_UP:]


def fit_cost_model(engine: Engine, taken: dict[Cell, list[Step]]) -> CostModel:
    """Fits the cost model to the steps of every cell of `cells_of`."""
    ms = {cell: statistics.median(s.step_ms for s in steps) for cell, steps in taken.items()}
    beside = [s.ms - s.step_ms for steps in taken.values() for s in steps]
    read = {cell: statistics.mean(s.effective_bits for s in steps) for cell, steps in taken.items()}
    empty = [cell for cell in taken if not cell.context]
    filled = [cell for cell in taken if cell.context]
    at = sorted({round(read[cell], 4): ms[cell] for cell in empty if not cell.uniform}.items())
    heads = engine.decoder.config.num_layers * engine.decoder.config.num_kv_heads
    added = [ms[cell] - ms[Cell(cell.bits)] for cell in filled]
    return CostModel(
        device=device_name(engine), overlay_hash=_hash(engine), resident_bits=resident_mean(engine.decoder),
        bits=tuple(b for b, _ in at), weights_ms=_rising([t for _, t in at]),
        pairs=(0.0, *(float(cell.context * heads) for cell in filled)),
        attention_ms=_rising([0.0, *(max(0.0, a) for a in added)]),
        plane_ms=plane_times(engine, [Timed(taken[cell], ms[cell], not cell.uniform) for cell in empty]),
        other_ms=statistics.median(beside),
    )  # fmt: skip


class Timed(NamedTuple):
    """Timed steps of one cell.

    ms: median time of a step. chosen: a policy chose the widths, which also takes time.
    """

    steps: Sequence[Step]
    ms: float
    chosen: bool


def plane_times(engine: Engine, timed: Sequence[Timed]) -> tuple[float, ...]:
    """Returns `CostModel.plane_ms`, in ms, by non-negative least squares on relative errors.

    Planes that were always read together share their time evenly.
    """
    from scipy.optimize import (
        nnls,  # imported here because most runs measure nothing and need not wait for it
    )

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
    """Returns the nearest values that do not fall.

    Where more bits or more pairs took less time, that was chance.
    """
    from scipy.optimize import isotonic_regression

    return tuple(isotonic_regression(values).x.tolist())


def _hash(engine: Engine) -> str:
    return engine.calibration().overlay_hash
