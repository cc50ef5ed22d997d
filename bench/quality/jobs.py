"""Calibrations and cells of quality_vs_bits.py in several processes, each on cores of its own.

Every process writes the files it made and nothing else, so it may be killed at any moment: what is there is kept.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from bench.quality.cells import Bench, Cell, means
from bench.quality.variants import Effort, calibrator_for

_bench: Bench


def _start(work: Path, cores: Any, threads: int, effort: Effort) -> None:
    """Once per process: takes cores, and makes the process's own bench."""
    global _bench
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    mine = cores.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, mine)
    torch.set_num_threads(threads)
    _bench = Bench(work, calibrator_for(work, threads, effort), threads)


def _end_with(parent: int) -> None:
    """A pool that was killed leaves its processes waiting for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _calibrate(chain: tuple[str, ...]) -> tuple[str, ...]:
    for name in chain:
        _bench.calibrate(name)
    return chain


def _measure(cell: Cell) -> tuple[Cell, float, float, float]:
    found = _bench.measure(cell)
    return cell, found["seconds"], *means(found)


def _shares(jobs: int) -> list[set[int]]:
    """The cores this process may use, dealt out; each of more jobs than cores shares one."""
    own = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    return [set(own[i::jobs]) or {own[i % len(own)]} for i in range(jobs)]


class Jobs:
    """A pool of `jobs` processes over one work directory. Use as a context manager."""

    def __init__(self, work: Path, jobs: int, effort: Effort):
        context = multiprocessing.get_context("spawn")  # the kernels' thread pool does not survive a fork
        shares = _shares(jobs)
        cores = context.Queue()
        for share in shares:
            cores.put(share)
        threads = min(len(s) for s in shares)
        self._pool = ProcessPoolExecutor(jobs, context, _start, (work, cores, threads, effort))

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)

    def calibrate(self, chains: Sequence[tuple[str, ...]]) -> None:
        """Every variant of every chain, the chains side by side."""
        for done in as_completed([self._pool.submit(_calibrate, c) for c in chains]):
            done.result()

    def measure(self, cells: Sequence[Cell]) -> None:
        """These cells, in about this order, with a line for each."""
        began, total = time.perf_counter(), max(1, sum(c.windows for c in cells))
        read = 0
        for i, done in enumerate(as_completed([self._pool.submit(_measure, c) for c in cells])):
            cell, seconds, bits, nll = done.result()
            read += cell.windows
            left = (time.perf_counter() - began) * (total - read) / read / 60
            print(
                f"[{i + 1}/{len(cells)}, {left:.0f} min left] {cell.key}: {bits:.3f} bits, {nll:.5f} nats, {seconds} s",
                flush=True,
            )
