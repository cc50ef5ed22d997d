"""What commands share: progress on stderr, JSON on the last line of stdout, parsing of lists and sizes."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dpllm.base.errors import InputError
from dpllm.kernels.backend import Backend
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.model.loading import LoadOptions

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)


def note(message: str) -> None:
    """A line for people."""
    stderr.print(message, markup=False, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on one line of stdout, the last."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


@contextmanager
def stage_bars() -> Iterator[Any]:
    """A callback (stage, done, total) shown as progress bars with time elapsed and left."""
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    progress = Progress(*columns, console=stderr, transient=False)
    tasks: dict[str, Any] = {}

    def update(stage: str, done: int, total: int) -> None:
        progress.start()
        if stage not in tasks:
            tasks[stage] = progress.add_task(stage, total=total)
        progress.update(tasks[stage], completed=done, total=total)

    try:
        yield update
    finally:
        if tasks:  # stopping bars that never showed would print an empty line
            progress.stop()


def cpu_options(threads: int | None, accuracy: str = "balanced", pin: bool = False) -> CpuOptions:
    """What the CPU kernels run with; torch is held to the same number of threads (None leaves both free)."""
    if threads is None:
        return CpuOptions(accuracy=accuracy, pin=pin)
    if threads < 1:
        raise InputError(f"--threads {threads} is not possible; at least 1 is needed.")
    options = CpuOptions(threads=threads, accuracy=accuracy, pin=pin)
    torch.set_num_threads(threads)
    return options


def check_device(device: str) -> str:
    """The device name, if torch can use it."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device {device} is unknown. Use cpu or cuda.")
    return device


@dataclass(frozen=True)
class Hardware:
    """What a command runs on. backend: None for the best there is. threads, accuracy, pin: of the CPU kernels."""

    device: str = "cpu"
    backend: str | None = None
    threads: int | None = None
    accuracy: str = "balanced"
    pin: bool = False

    def load_options(self, resident_bits: int | None = None) -> LoadOptions:
        """How to load a model onto it: half precision on a GPU. Raises InputError for a device that is not there."""
        cpu = cpu_options(self.threads, self.accuracy, self.pin)
        dtype = torch.float16 if check_device(self.device) == "cuda" else torch.float32
        return LoadOptions(resident_bits, backend=self.backend, cpu=cpu, device=self.device, dtype=dtype)

    def note_if_slow(self, backend: Backend) -> None:
        """Says what would make it faster, where the kernels are missing."""
        if self.backend is None and backend.name == "reference":
            note(f"backend {backend.name}: {backend.reason}")


def parse_targets(text: str) -> list[float]:
    """'2.5,3.25' -> [2.5, 3.25]."""
    try:
        values = [float(t) for t in text.split(",")]
    except ValueError:
        raise InputError(
            f"--target-bits '{text}' is no list of numbers. Write, for example, 2.5,3.25,4."
        ) from None
    if not all(map(math.isfinite, values)):
        raise InputError(f"--target-bits '{text}' holds no finite number. Write, for example, 2.5,3.25,4.")
    return values


def parse_bits(text: str) -> tuple[int, int]:
    """'2-6' -> (2, 6)."""
    found = re.fullmatch(r"(\d)-(\d)", text.strip())
    if not found:
        raise InputError(f"--bits '{text}' is no range. Write, for example, 2-6.")
    return int(found[1]), int(found[2])


def parse_size(text: str) -> int:
    """'4GB', '600 MiB', '1e9' -> bytes."""
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    try:
        value = float(found[1]) if found else 0.0
    except ValueError:
        value = 0.0
    if found is None or not 0 < value < math.inf:
        raise InputError(f"'{text}' is no size. Write, for example, 4GB or 600MiB.")
    return int(value * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


def parse_share(text: str) -> float:
    """'2%' -> 0.02, '0.02' -> 0.02."""
    number = text.strip().removesuffix("%")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"--max-quality-loss '{text}' is no share. Write, for example, 2% or 0.02.")
    return value / 100 if text.strip().endswith("%") else value


def default_text(data: str | None) -> Path:
    """The text to calibrate on: the user's, or the bundled one."""
    from dpllm import reference

    return reference.calibration_text() if data is None else Path(data).expanduser()
