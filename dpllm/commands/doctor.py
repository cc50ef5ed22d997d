"""`dpllm doctor`: what this machine has, and whether the kernels compute correctly on it."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from dpllm.commands.app import Command, Json, app
from dpllm.commands.common import print_json, stdout, tell


@app.command(cls=Command)
def doctor(*, json: Json = False) -> None:
    """Show what this machine has, which backend will be used, and whether it computes correctly."""
    from dpllm.diagnostics.examination import examine

    found = examine()
    if json:
        print_json(found)
        return
    _show_machine(found)
    stdout.print(_errors(found["gemv_relative_error"]))
    _show_gpu(found["cuda"])
    verdict = (
        "Every kernel computes correctly."
        if found["ok"]
        else "Some kernel is wrong or cannot run: see above."
    )
    tell(verdict)


def _show_machine(found: dict[str, Any]) -> None:
    """Prints versions, cores, instruction sets and the backend, one line each."""
    versions = ", ".join(f"{p} {v or 'not installed'}" for p, v in found["versions"].items())
    tell(f"dpllm {found['dpllm']}, Python {found['python']}, {versions}")
    tell(f"processor: {found['machine']}, {found['cores']} cores, {found['torch_threads']} threads of torch")
    memory = found["usable_memory_bytes"]
    limits = "" if memory is None else f", {memory / 1e9:.1f} GB of memory"
    tell(f"this process may use: {found['usable_cores']} cores{limits}")
    sets = ", ".join(f"{name} ({state})" for name, state in found["instruction_sets"].items())
    tell(
        f"instruction sets of the native kernels: {sets or 'none, because the native library cannot be loaded'}"
    )
    tell(f"backend: {found['backend']['name']}, {found['backend']['reason']}")


def _errors(checks: dict[str, dict[str, float]]) -> Table:
    """The relative error of each backend at each width, one width a row."""
    names = (name.removeprefix("cpu:") for name in checks)  # short: a narrow terminal would cut them
    table = Table("bits", *names, title="relative error of a product on the CPU, against float64")
    for width in next(iter(checks.values())):
        table.add_row(width, *(f"{errors[width]:.1e}" for errors in checks.values()))
    return table


def _show_gpu(gpu: dict[str, Any] | None) -> None:
    """Prints the GPU's facts, one line each, and the error of each of its kernels."""
    if gpu is None:
        tell("GPU: none, torch sees no CUDA device")
        return
    shown = {"name", "backend", "kernel_errors", "kernels", "ok", "copy_gb_per_s", "copy"}
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in gpu.items() if key not in shown)
    tell(f"GPU: {gpu['name']}, {facts}")
    speed = gpu["copy"] if gpu["copy_gb_per_s"] is None else f"{gpu['copy_gb_per_s']:.0f} GB/s"
    tell(f"GPU copy: {speed}")
    tell(f"GPU backend: {gpu['backend']['name']}, {gpu['backend']['reason']}")
    if "kernels" in gpu:
        tell(f"GPU kernels: {gpu['kernels']}")
        return
    table = Table("GPU kernel", "relative error")
    for name, error in gpu["kernel_errors"].items():
        table.add_row(name, f"{error:.1e}")
    stdout.print(table)
