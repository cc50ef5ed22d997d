"""`dpllm doctor`."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import numpy as np
import torch

from dpllm import __version__
from dpllm.commands.common import print_json, stdout
from dpllm.kernels.backend import choose_backend
from dpllm.kernels.cpu.library import CpuOptions, instruction_sets
from dpllm.kernels.weight import MAX_BITS, MIN_BITS, QuantizedWeight, pack
from dpllm.quant.kmeans import nested_codes

TOLERANCE = 1e-4  # of 16-bit activations and tables


def run(as_json: bool) -> None:
    """Reports versions, devices, and the chosen backend checked against float64."""
    backend = choose_backend()
    checks = check_kernels()
    report = {
        "dpllm": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": {p: _version(p) for p in ("torch", "transformers", "numpy", "safetensors", "triton")},
        "cuda": _cuda(),
        "backend": {"name": backend.name, "reason": backend.reason},
        "instruction_sets": _instruction_sets(),
        "gemv_relative_error": checks,
        "ok": all(e < TOLERANCE for errors in checks.values() for e in errors.values()),
    }
    if as_json:
        print_json(report)
        return
    for key, value in report.items():
        stdout.print(f"[bold]{key}[/bold]: {value}")


def _instruction_sets() -> dict[str, str]:
    """What the native library offers, and what this processor runs of it."""
    try:
        return {v.name: "runs here" if v.supported else f"needs {v.needs}" for v in instruction_sets()}
    except OSError:
        return {}


def check_kernels() -> dict[str, dict[str, float]]:
    """Relative error of gemv against float64, by backend and width; the native kernels at accuracy 'exact'."""
    usable = [f"cpu:{name}" for name, state in _instruction_sets().items() if state == "runs here"]
    return {name: _gemv_errors(name) for name in ("reference", *usable)}


def _gemv_errors(backend_name: str) -> dict[str, float]:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((33, 100)).astype(np.float32)
    codes, tables = nested_codes(w, np.ones_like(w), MIN_BITS, MAX_BITS)
    lut = torch.from_numpy(np.concatenate(list(tables.values()), axis=1))
    weight = QuantizedWeight(pack(codes, MAX_BITS), lut, 100, MIN_BITS)
    backend = choose_backend(backend_name, options=CpuOptions(accuracy="exact"))
    prepared = backend.prepare(weight)
    x = torch.from_numpy(rng.standard_normal((1, 100)).astype(np.float32))
    errors = {}
    for bits in range(MIN_BITS, MAX_BITS + 1):
        table = weight.table(bits).double().numpy()
        exact = x.double().numpy() @ np.take_along_axis(table, (codes >> (MAX_BITS - bits)).astype(int), 1).T
        y = backend.gemv(x, prepared, torch.tensor([bits], dtype=torch.int32)).double().numpy()
        errors[str(bits)] = float(np.linalg.norm(y - exact) / np.linalg.norm(exact))
    return errors


def _cuda() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(0)
    return {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gb": round(p.total_memory / 1e9, 1)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
