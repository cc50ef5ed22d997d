"""All that `dpllm doctor` finds out: versions, devices, the chosen backend, and whether the kernels are right."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from dpllm.base.machine import available_bytes, usable_cores
from dpllm.diagnostics import gpu as gpu_info
from dpllm.diagnostics.cpu import check_kernels, instruction_set_states
from dpllm.kernels.backend import choose_backend
from dpllm.version import __version__

TOLERANCE = 1e-4  # of 16-bit activations and tables
HALF_TOLERANCE = 5e-3  # of kernels that write half precision


def examine() -> dict[str, Any]:
    """The object of `dpllm doctor --json`. 'ok' says whether every kernel is right."""
    backend, checks, gpu = choose_backend(), check_kernels(), examine_gpu()
    return {
        "dpllm": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "usable_memory_bytes": available_bytes(),
        "torch_threads": torch.get_num_threads(),
        "versions": {p: _version(p) for p in ("torch", "transformers", "numpy", "safetensors", "triton")},
        "cuda": gpu,
        "backend": {"name": backend.name, "reason": backend.reason},
        "instruction_sets": instruction_set_states(),
        "gemv_relative_error": checks,
        "ok": all(e < TOLERANCE for errors in checks.values() for e in errors.values())
        and (gpu is None or gpu["ok"]),
    }


def examine_gpu() -> dict[str, Any] | None:
    """The GPU, its bandwidth, the backend that will be used on it, and each kernel's error; None without a GPU."""
    found = gpu_info.describe()
    if found is None:
        return None
    backend = choose_backend(device="cuda")
    found |= _copy() | {"backend": {"name": backend.name, "reason": backend.reason}}
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        errors = {f"step: {k}": e for k, e in gpu_info.check_step_kernels(device).items()}
        errors |= gpu_info.check_products(device)
    except Exception as e:  # of a compiler or a driver: the user wants to know what is wrong
        return found | {"kernels": _cannot_run(e), "ok": False}
    return found | {"kernel_errors": errors, "ok": all(e < HALF_TOLERANCE for e in errors.values())}


def _copy() -> dict[str, Any]:
    """The bandwidth of a copy; or why there is none, as on a GPU that other programs fill."""
    try:
        return {"copy_gb_per_s": round(gpu_info.copy_gb_per_s(), 1)}
    except Exception as e:
        return {"copy_gb_per_s": None, "copy": _cannot_run(e)}


def _cannot_run(e: Exception) -> str:
    """The error in one line."""
    return f"cannot run: {' '.join(str(e).split())[:300]}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
