"""What commands share: the machine they run on, progress on stderr, JSON on stdout, lists of numbers."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dpllm.base.errors import InputError
from dpllm.base.json_text import strict_json
from dpllm.base.progress import Progress, ProgressLines

if TYPE_CHECKING:
    from dpllm.engine import Engine
    from dpllm.model.decoder import Decoder
    from dpllm.model.loading import LoadOptions

# Without emoji: a path that holds :b: is not an emoji's code.
stderr = Console(stderr=True, highlight=False, emoji=False)
stdout = Console(highlight=False, emoji=False)


def note(message: str) -> None:
    """Prints a line for people on stderr, unbroken."""
    stderr.print(message, markup=False, soft_wrap=True)


def note_doubled_start(engine: Engine, text: str) -> None:
    """Says where a text begins with the start token that the tokenizer adds: the model would read two of them."""
    if (line := engine.prompts.doubled_start(text)) is not None:
        note(line)


def tell(message: str) -> None:
    """Prints a line for people on stdout, unbroken: a command in it can be copied."""
    stdout.print(message, markup=False, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """Prints one JSON object on one line of stdout, the last. A number that is not finite becomes null."""
    sys.stdout.write(strict_json(value) + "\n")
    sys.stdout.flush()


def shows_bars() -> bool:
    """Tells whether stderr is a terminal that can move its cursor. A log that asks for colours is none."""
    return stderr.is_interactive and not stderr.is_dumb_terminal and sys.stderr.isatty()


@contextmanager
def stage_bars() -> Iterator[Progress]:
    """A callback (stage, done, total) shown as progress bars with time elapsed and left.

    Where stderr is no terminal that can show bars, it is lines now and then: see ProgressLines."""
    if not shows_bars():
        yield ProgressLines(note)
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description:>10}"), bars.BarColumn(), bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(), bars.TextColumn("left"), bars.TimeRemainingColumn(),
    )  # fmt: skip
    shown = bars.Progress(*columns, console=stderr, transient=False)
    tasks: dict[str, Any] = {}

    def update(stage: str, done: int, total: int) -> None:
        shown.start()
        if stage not in tasks:
            tasks[stage] = shown.add_task(stage, total=total)
        shown.update(tasks[stage], completed=done, total=total)

    try:
        yield update
    finally:
        if tasks:  # stopping bars that never showed would print an empty line
            shown.stop()


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a command runs on.

    device: 'cpu' or 'cuda'. backend: name of the kernels; None is the best there is. threads, accuracy, pin: options of
    the CPU kernels.
    """

    device: str = "cpu"
    backend: str | None = None
    threads: int | None = None
    accuracy: str = "balanced"
    pin: bool = False

    def load_options(self, resident_bits: int | None = None) -> LoadOptions:
        """How to load a model onto it: half precision on a GPU. Raises InputError for a device that is not there."""
        import torch

        from dpllm.model.hardware import check_device, cpu_options
        from dpllm.model.loading import LoadOptions

        cpu = cpu_options(self.threads, self.accuracy, self.pin)
        dtype = torch.float16 if check_device(self.device) == "cuda" else torch.float32
        return LoadOptions(resident_bits, backend=self.backend, cpu=cpu, device=self.device, dtype=dtype)

    def words(self) -> list[str]:
        """The options that differ from the default, as words of a command line."""
        given = {"--device": self.device, "--backend": self.backend, "--threads": self.threads,
                 "--accuracy": self.accuracy}  # fmt: skip
        usual = {"--device": "cpu", "--accuracy": "balanced"}
        return [
            word for name, value in given.items() if value not in (None, usual.get(name))
            for word in (name, str(value))
        ]  # fmt: skip

    def note_about(self, decoder: Decoder) -> None:
        """Says what is unusual about a loaded model, and what would make it faster where fast kernels are missing."""
        backend = decoder.backend
        if self.backend is None and backend.name == "reference":
            note(f"backend {backend.name}: {backend.reason}")
        for line in decoder.notes:
            note(line)


def parse_numbers(text: str, option: str) -> list[float]:
    """'2.5,3.25' -> [2.5, 3.25]. option: the name that an InputError gives."""
    try:
        values = [float(t) for t in text.split(",")]
    except ValueError:
        raise InputError(
            f"{option} '{text}' is not a list of numbers. Write, for example, 2.5,3.25,4."
        ) from None
    if not all(map(math.isfinite, values)):
        raise InputError(
            f"{option} '{text}' holds a number that is not finite. Write, for example, 2.5,3.25,4."
        )
    return values


def parse_bits(text: str) -> tuple[int, int]:
    """'2-6' -> (2, 6). Raises InputError for anything else."""
    found = re.fullmatch(r"(\d)-(\d)", text.strip())
    if not found:
        raise InputError(f"--bits '{text}' is not a range. Write, for example, 2-6.")
    return int(found[1]), int(found[2])


def parse_policies(text: str) -> list[str]:
    """'static,dp-llm' -> ['static', 'dp-llm']. Raises InputError for a policy that does not exist."""
    from dpllm.policies.make import POLICIES

    names = [n.strip() for n in text.split(",")]
    for name in names:
        if name not in POLICIES:
            raise InputError(f"unknown policy '{name}'. Choose from: {', '.join(POLICIES)}.")
    return names
