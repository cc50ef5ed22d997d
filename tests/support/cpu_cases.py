"""For tests of the native CPU kernels: random weights beside what they mean in float64, and kernels of every kind
that this processor runs."""

from __future__ import annotations

from functools import cache, cached_property

import numpy as np
import pytest
import torch

from dpllm.kernels.cpu.kernels import CpuKernels, PreparedWeight, prepare
from dpllm.kernels.cpu.library import ACCURACIES, CpuOptions, Handle, instruction_sets
from dpllm.kernels.weight import MAX_TABLE_BITS, Int8Weight, QuantizedWeight, pack

WIDTHS = range(2, 9)
TOLERANCE = {"exact": 1e-4, "balanced": 2e-2, "fast": 2e-2}  # of a product, relative to its norm


def usable_isas() -> list[str]:
    """Instruction sets that this processor runs; none where the library was not built."""
    try:
        return [v.name for v in instruction_sets() if v.supported]
    except OSError:
        return []


ISAS = usable_isas()
needs_library = pytest.mark.skipif(not ISAS, reason="the native kernels were not built")
each_isa = pytest.mark.parametrize("isa", ISAS)
each_accuracy = pytest.mark.parametrize("accuracy", ACCURACIES)


def options_of(isa: str | None = None, accuracy: str = "exact", threads: int = 1) -> CpuOptions:
    """Options for any number of threads, also for more than this machine has cores."""
    options = CpuOptions(isa=isa, accuracy=accuracy)
    object.__setattr__(options, "threads", threads)
    return options


@cache
def kernels_of(isa: str | None = None, accuracy: str = "exact", threads: int = 1) -> CpuKernels:
    kernels = CpuKernels(Handle(options_of(isa, accuracy, threads)))
    assert kernels.handle.threads == threads
    assert isa in (None, kernels.handle.isa.name)
    return kernels


class Weights:
    """A random quantised matrix; `dense` is its meaning, from codes and tables alone."""

    def __init__(self, n: int, k: int, share: int = 1, lo: int = 2, hi: int = 8, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.k, self.share, self.hi = k, share, hi
        self.codes = rng.integers(0, 2**hi, (n, k)).astype(np.uint8)
        tables = [
            np.sort(rng.normal(size=(n // share, 2**b)), axis=1)
            for b in range(lo, min(hi, MAX_TABLE_BITS) + 1)
        ]
        scale = rng.uniform(0.25, 4, n).astype(np.float16) if share > 1 else None
        self.stored = QuantizedWeight(
            planes=pack(self.codes, hi),
            lut=torch.from_numpy(np.concatenate(tables, axis=1).astype(np.float16)),
            in_features=k,
            seed_bits=lo,
            scale=None if scale is None else torch.from_numpy(scale),
        )

    @cached_property
    def prepared(self) -> PreparedWeight:
        """For the CPU kernels."""
        return prepare(self.stored)

    def table(self, bits: int) -> np.ndarray:
        """[N, 2^bits] float64: what each row's codes mean, the row's scale included."""
        table = self.stored.table(bits).double().numpy().repeat(self.share, axis=0)
        return table if self.stored.scale is None else table * self.stored.scale.double().numpy()[:, None]

    def dense(self, bits: int) -> np.ndarray:
        """[N, K] float64."""
        return np.take_along_axis(self.table(bits), (self.codes >> (self.hi - bits)).astype(int), axis=1)


@cache
def weights_of(n: int, k: int, share: int = 1) -> Weights:
    return Weights(n, k, share, seed=n + k)


def int8_of(n: int, k: int) -> tuple[Int8Weight, np.ndarray]:
    """(a random int8 matrix, its meaning in float64)."""
    rng = np.random.default_rng(n + k)
    values = rng.integers(-127, 128, (n, k)).astype(np.int8)
    scale = rng.uniform(0.001, 0.1, n).astype(np.float16)
    dense = values.astype(np.float64) * scale.astype(np.float64)[:, None]
    return Int8Weight(torch.from_numpy(values), torch.from_numpy(scale)), dense


def inputs(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32))


def widths_of(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32)


def relative_error(y: torch.Tensor, x: torch.Tensor, dense: np.ndarray) -> float:
    """The largest |y - x dense^T| of a row, relative to the norm that this row's product has on average over the
    signs of its terms: that norm itself may vanish by chance where a matrix has few rows."""
    wide = x.double().numpy()
    exact, typical = wide @ dense.T, np.sqrt(wide**2 @ (dense**2).T)
    assert y.shape == exact.shape
    error = np.linalg.norm(y.detach().double().numpy() - exact, axis=1) / np.linalg.norm(typical, axis=1)
    return float(error.max())
