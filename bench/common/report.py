"""How every benchmark reports: a table for people, one line of JSON last, and the same object in bench/results/.

A script makes its parser with `arguments`, calls `begin` before it measures anything, and `Run.report` at the end. A
result is written only from a work tree without edits, so that its commit is the code that ran.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.common.checkout import RESULTS, ROOT, Checkout
from dpllm.kernels.cpu.library import instruction_sets
from dpllm.planning.host import processor_name

# What tells processors with the same name apart, as /proc/cpuinfo calls it on x86 and on ARM.
CPUINFO = ("cpu family", "model", "stepping", "CPU implementer", "CPU part")
SHOWN = 3  # edited files that an error names


def result_path(bench: str, device: str = "cpu") -> Path:
    """The file in bench/results/ that holds the result of a benchmark."""
    return ROOT / RESULTS / f"{bench}-{device}.json"


# -- what ran ----------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that decide a figure."""
    names = ("dpllm", "torch", "transformers", "numpy", "triton", "bitsandbytes", "torchao", "gemlite", "hqq")
    found = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    return {"python": platform.python_version()} | {n: found[n] for n in names if n in found}


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name with its family, model and stepping, such as 'AMD EPYC (cpu family 25, model 1)'.

    Virtual machines give processors of several generations the same name.
    """
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    numbers = ", ".join(f"{k} {found[k]}" for k in CPUINFO if k in found)
    return processor_name() + (f" ({numbers})" if numbers else "")


def instruction_set(device: str = "cpu") -> str:
    """The instruction set that our kernels use: a backend's name such as 'cpu:avx512', or 'sm_90' on a CUDA device.

    'reference' where the CPU kernels were not built.
    """
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    try:
        names = [s.name for s in instruction_sets() if s.supported]
    except OSError:
        return "reference"
    return f"cpu:{names[0]}"


def torch_instruction_set() -> str:
    """The instruction set that torch uses on the CPU, such as 'torch:avx512', for what our kernels have no part in."""
    return f"torch:{torch.backends.cpu.get_cpu_capability().lower()}"


def command() -> str:
    """The command that started this process, as a shell reads it."""
    spec = sys.modules["__main__"].__spec__
    return shlex.join(["python", *(["-m", spec.name] if spec else sys.argv[:1]), *sys.argv[1:]])


# -- a run -------------------------------------------------------------------------------------------------------


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark's command line, with what all of them take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--allow-dirty",
        action="store_true",
        help="run on an edited work tree; the result is printed, not written",
    )
    return parser


@dataclass(frozen=True)
class Run:
    """One run of a benchmark. commit: the short hash of what is measured, with '+' where the work tree has edits.
    writes: whether results are written."""

    checkout: Checkout
    commit: str
    writes: bool

    def report(
        self, bench: str, rows: list[dict[str, Any]], *, device: str = "cpu", hardware: str | None = None,
        instructions: str | None = None, **facts: Any,
    ) -> None:  # fmt: skip
        """Prints rows as a table and as JSON, and writes bench/results/<bench>-<device>.json.

        hardware: what was measured; None for the processor. instructions: the instruction set that ran; None for that
        of the CPU kernels. facts: what else the result holds. Ends the process with a line on standard error, after
        printing, where the work tree was edited during the run.
        """
        table = Table(*(str(k) for k in rows[0]))
        for row in rows:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        Console(width=150).print(table)
        result = {
            "bench": bench, "commit": self.commit, "command": command(), "device": hardware or processor_name(),
            "processor": processor(), "instruction_set": instructions or instruction_set(),
            "versions": versions(), **facts, "rows": rows,
        }  # fmt: skip
        print(json.dumps(result), flush=True)
        if self.writes:
            refuse_edits(self.checkout, "The result above is not written")
            path = self.checkout.root / RESULTS / f"{bench}-{device}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")


def refuse_edits(checkout: Checkout, consequence: str) -> None:
    """Ends the process with one line on standard error where the work tree has edits.

    consequence: what does not happen because of them, the beginning of a sentence.
    """
    try:
        edits = checkout.edits()
    except (OSError, subprocess.CalledProcessError):
        sys.exit(
            f"bench: {consequence}: git knows of no checkout at {checkout.root}, so no commit says what ran. "
            "Give --allow-dirty to print the result."
        )
    if edits:
        more = f" and {len(edits) - SHOWN} more" if len(edits) > SHOWN else ""
        sys.exit(
            f"bench: {consequence}: the work tree has edits ({', '.join(edits[:SHOWN])}{more}), so no commit says "
            "what ran. Commit them, or give --allow-dirty to print the result without writing it."
        )


def begin(args: argparse.Namespace, *, writes: bool = True, checkout: Checkout | None = None) -> Run:
    """Begins a run, and ends the process with one line where its result could not be written later.

    args: parsed by a parser of `arguments`. writes: False for a run whose figures mean nothing, which is only printed.
    checkout: None for that of this file.
    """
    checkout, writes = checkout or Checkout(), writes and not args.allow_dirty
    if writes:
        refuse_edits(checkout, "Nothing is measured")
    return Run(checkout, _commit(checkout), writes)


def _commit(checkout: Checkout) -> str:
    try:
        return checkout.head() + ("+" if checkout.edits() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
