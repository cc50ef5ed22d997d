"""How every benchmark reports: a table for people, one JSON line last, the same object under results/."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpllm.planning.machine import processor_name

RESULTS = Path(__file__).resolve().parents[1] / "results"


def versions() -> dict[str, str]:
    """Python and the libraries that decide a figure."""
    names = ("dpllm", "torch", "transformers", "numpy", "triton", "bitsandbytes", "torchao", "gemlite", "hqq")
    found = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    return {"python": platform.python_version()} | {n: found[n] for n in names if n in found}


def commit() -> str:
    """The checkout's commit, marked when files differ from it."""
    run = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True, cwd=RESULTS).stdout.strip()  # noqa: E731
    changed = [p for p in run("status", "--porcelain", "--", ":/").splitlines() if "bench/results" not in p]
    return run("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def report(
    bench: str, rows: list[dict[str, Any]], *, device: str = "cpu", hardware: str | None = None, write: bool = True,
    **facts: Any,
) -> None:  # fmt: skip
    """Prints rows as a table and as JSON, and writes results/<bench>-<device>.json. hardware: what was measured, the
    processor unless told otherwise."""
    table = Table(*(str(k) for k in rows[0]))
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=150).print(table)
    result = {
        "bench": bench, "commit": commit(), "command": " ".join(["python", *sys.argv]),
        "device": hardware or processor_name(),
        "versions": versions(), **facts, "rows": rows,
    }  # fmt: skip
    if write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{bench}-{device}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
