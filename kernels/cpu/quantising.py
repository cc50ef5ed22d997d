"""The quantiser's native kernels: nested k-means and the steps of its refinement (src/quantize.h)."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from dpllm.base.machine import usable_cores
from dpllm.kernels.cpu.library import CpuOptions, Handle, Int, Pointer


class Descent(ctypes.Structure):
    """`Descent` of kernels.h."""

    __slots__ = ()
    _fields_ = (
        ("weight", Pointer), ("codes", Pointer), ("error", Pointer), ("pull", Pointer), ("hessian", Pointer),
        ("leaf", Pointer), ("root", Pointer), ("change", Pointer),
        ("columns", Int), ("widths", Int), ("parent_bits", Int), ("rows_per_table", Int), ("first", Int), ("last", Int),
    )  # fmt: skip


class QuantiserKernels:
    """Kernels of the quantiser on a thread pool of their own. Arguments are contiguous tensors on the CPU.

    A matrix has N rows and K columns, T tables and B widths from seed_bits to parent_bits, at most 6. Tables are
    [T, B, 2^parent_bits]; each width uses the first 2^bits entries. All floats are float32.
    """

    def __init__(self, threads: int) -> None:
        self.handle = Handle(CpuOptions(threads=threads))

    def nested_codes(
        self, values: Tensor, weights: Tensor, seed_bits: int, parent_bits: int, iterations: int
    ) -> tuple[Tensor, Tensor]:
        """Computes nested k-means of each row as quant/kmeans.py defines it.

        values, weights: [R, n]. iterations: the most steps of Lloyd's algorithm. Returns codes uint8 [R, n] and centres
        float64 [R, B, 2^parent_bits].
        """
        rows, count = values.shape
        codes = torch.empty(rows, count, dtype=torch.uint8)
        centres = torch.zeros(rows, parent_bits - seed_bits + 1, 2**parent_bits, dtype=torch.float64)
        self.handle.call(
            "dpllm_nested_codes", values.data_ptr(), weights.data_ptr(), rows, count, seed_bits, parent_bits,
            iterations, codes.data_ptr(), centres.data_ptr(),
        )  # fmt: skip
        return codes, centres

    def values(self, codes: Tensor, tables: Tensor) -> Tensor:
        """Looks up every weight's value at each width. codes: uint8 [N, K]. Returns [N, B, K]."""
        rows, columns = codes.shape
        count, widths, entries = tables.shape
        parent = entries.bit_length() - 1
        out = torch.empty(rows, widths, columns)
        self.handle.call(
            "dpllm_table_values", codes.data_ptr(), tables.data_ptr(), rows, columns, parent - widths + 1, parent,
            rows // count, out.data_ptr(),
        )  # fmt: skip
        return out

    def sums(self, codes: Tensor, values: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
        """Sums scale[n] * values[n, b, k] over the weights of each code. shape: of the tables, which is returned."""
        rows, columns = codes.shape
        count, widths, entries = shape
        parent = entries.bit_length() - 1
        out = torch.empty(shape)
        self.handle.call(
            "dpllm_table_sums", codes.data_ptr(), values.data_ptr(), scale.data_ptr(), rows, columns,
            parent - widths + 1, parent, rows // count, out.data_ptr(),
        )  # fmt: skip
        return out

    def descend(
        self, *, weight: Tensor, codes: Tensor, error: Tensor, pull: Tensor, hessian: Tensor, leaf: Tensor,
        root: Tensor, first: int, last: int,
    ) -> Tensor:  # fmt: skip
        """Updates the codes and errors of columns first to last - 1, at most 64, as quant/descent.py defines it.

        Returns the change of the error, [N, B, last - first].
        """
        rows, widths, columns = error.shape
        change = torch.empty(rows, widths, last - first)
        block = Descent(
            *(t.data_ptr() for t in (weight, codes, error, pull, hessian, leaf, root, change)),
            columns, widths, leaf.shape[2].bit_length() - 1, rows // len(leaf), first, last,
        )  # fmt: skip
        self.handle.call("dpllm_descend", ctypes.byref(block), rows)
        return change


@cache
def quantiser_kernels(threads: int = 0) -> QuantiserKernels | None:
    """Returns the native kernels, or None where the library is missing. threads: at most; 0: every usable core."""
    try:
        return QuantiserKernels(min(threads or usable_cores(), usable_cores()))
    except OSError:
        return None
