"""Whether the CPU kernels compute what they should: for `dpllm doctor`."""

from __future__ import annotations

import numpy as np
import torch

from dpllm.kernels.backend import choose_backend
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.kernels.cpu.library import instruction_sets as offered
from dpllm.kernels.weight import MAX_BITS, MIN_BITS, QuantizedWeight, pack
from dpllm.quant.kmeans import nested_codes

RUNS = "runs here"


def instruction_sets() -> dict[str, str]:
    """The instruction sets of the native library by name: 'runs here', or what this processor lacks."""
    try:
        return {v.name: RUNS if v.supported else f"needs {v.needs}" for v in offered()}
    except OSError:
        return {}


def check_kernels() -> dict[str, dict[str, float]]:
    """Relative error of gemv against float64, by backend and width; the native kernels at accuracy 'exact'."""
    usable = [f"cpu:{name}" for name, state in instruction_sets().items() if state == RUNS]
    return {name: _gemv_errors(name) for name in ("reference", *usable)}


def _gemv_errors(backend_name: str) -> dict[str, float]:
    """Relative error of one backend by width, on a random matrix [33, 100]."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((33, 100)).astype(np.float32)
    codes, tables = nested_codes(w, np.ones_like(w), MIN_BITS, MAX_BITS)
    lut = torch.from_numpy(np.concatenate(list(tables.values()), axis=1))
    weight = QuantizedWeight(pack(codes, MAX_BITS), lut, 100, MIN_BITS)
    backend = choose_backend(backend_name, options=CpuOptions(accuracy="exact"))
    prepared = backend.prepare(weight, "cpu")
    x = torch.from_numpy(rng.standard_normal((1, 100)).astype(np.float32))
    errors = {}
    for bits in range(MIN_BITS, MAX_BITS + 1):
        table = weight.table(bits).double().numpy()
        exact = x.double().numpy() @ np.take_along_axis(table, (codes >> (MAX_BITS - bits)).astype(int), 1).T
        y = backend.gemv(x, prepared, torch.tensor([bits], dtype=torch.int32)).double().numpy()
        errors[str(bits)] = float(np.linalg.norm(y - exact) / np.linalg.norm(exact))
    return errors
