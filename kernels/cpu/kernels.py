"""The native kernels, wrapped in the signatures of kernels/reference.py."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dpllm.kernels.cpu.library import STORAGE, Draw, Handle, Matrix, load_library, torch_reports
from dpllm.kernels.weight import BitplaneWeight, Int8Weight, QuantizedWeight

BLOCK_BYTES = 16 << 20  # bytes of weights dequantised at a time, where torch multiplies in bfloat16
FEW_ROWS = 8  # so few rows are multiplied faster one by one than with a dequantised matrix


@dataclass(frozen=True, eq=False)
class PreparedWeight(BitplaneWeight):
    """Planes as they are stored, tables as digits; `matrix` is what the library reads."""

    planes: Tensor
    tables: dict[int, Tensor]  # width -> int8 [T, 2, 2^width], high and low digits
    scales: dict[int, Tensor]  # width -> float32 [T]
    row_scale: Tensor | None
    in_features: int
    seed_bits: int
    matrix: Matrix = field(repr=False)

    def table_bytes(self, bits: int) -> int:
        """Bytes of the width's digits and scales, and of the row scales."""
        tables = sum(t.numel() * t.element_size() for t in (self.tables[bits], self.scales[bits]))
        return tables + (0 if self.row_scale is None else 4 * self.out_features)

    @property
    def held_bytes(self) -> int:
        """Bytes of planes, tables and scales in memory."""
        tensors = [self.planes, *self.tables.values(), *self.scales.values()]
        if self.row_scale is not None:
            tensors.append(self.row_scale)
        return sum(t.numel() * t.element_size() for t in tensors)


def digits_of(table: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a table [T, E] into digits int8 [T, 2, E] and scales float32 [T]: value = scale * (255 * high + low)."""
    values = table.float().contiguous()
    tables, entries = values.shape
    digits, scale = torch.empty(tables, 2, entries, dtype=torch.int8), torch.empty(tables)
    load_library().dpllm_digits(values.data_ptr(), tables, entries, digits.data_ptr(), scale.data_ptr())
    return digits, scale


def prepare(w: QuantizedWeight, device: torch.device | str = "cpu") -> PreparedWeight:
    """Splits tables into digits; planes are not copied. Raises ValueError for a device other than the CPU."""
    if torch.device(device).type != "cpu":
        raise ValueError(f"the CPU kernels cannot prepare a weight on {device}.")
    planes = w.planes.contiguous()
    row_scale = None if w.scale is None else w.scale.float().contiguous()
    tables, scales = {}, {}
    matrix = Matrix(
        planes=planes.data_ptr(), plane_bytes=planes.stride(0) * 4, row_bytes=planes.stride(1) * 4,
        row_scale=None if row_scale is None else row_scale.data_ptr(), bias=None,
        rows=w.out_features, columns=w.in_features, rows_per_table=w.rows_per_table,
    )  # fmt: skip
    for bits in range(w.seed_bits, w.resident_bits + 1):
        tables[bits], scales[bits] = digits_of(w.table(bits))
        matrix.tables[bits], matrix.scales[bits] = tables[bits].data_ptr(), scales[bits].data_ptr()
    return PreparedWeight(planes, tables, scales, row_scale, w.in_features, w.seed_bits, matrix)


class CpuKernels:
    """The kernel functions of the CPU backend, bound to a handle."""

    def __init__(self, handle: Handle):
        self.handle = handle
        self._own = threading.local()  # scratch memory of each thread

    def gemv(
        self,
        x: Tensor,
        w: PreparedWeight,
        bits: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Computes x W_b^T + bias, each row of x at its own width, as kernels/reference.py defines it.

        A row's result does not depend on the other rows. Where gradients are needed, torch computes the product from
        dequantised weights instead.
        """
        _check_input(x, w.in_features)
        if bits.shape != (len(x),):
            raise ValueError(f"{bits.numel()} widths do not match {len(x)} rows of activations.")
        if torch.is_grad_enabled() and x.requires_grad:
            y = _differentiable(self, x, w, bits)
            return y if bias is None else y + bias
        values = _floats(x)
        y = torch.empty(len(x), w.out_features)
        if len(x):
            widths = bits.to(torch.int32).contiguous()
            _check_resident(w, int(widths.min()), int(widths.max()))
            self.handle.call(
                "dpllm_gemm",
                ctypes.byref(w.matrix),
                values.data_ptr(),
                widths.data_ptr(),
                len(x),
                y.data_ptr(),
            )
        y = y if bias is None else y.add_(bias)
        return y.to(x.dtype) if out is None else out.copy_(y)

    def matmul(self, x: Tensor, w: PreparedWeight) -> Tensor:
        """Computes x W^T with every resident plane, for the many rows of a prompt.

        On processors with AMX, torch multiplies dequantised blocks in bfloat16. On others the library multiplies in
        int8 where there are AVX-512 VNNI and VBMI, else in float32, and a few tokens as `gemv`. For accuracy 'exact' it
        always multiplies in float32.
        """
        _check_input(x, w.in_features)
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.dequantize(w, w.resident_bits, x.dtype))
        exact = self.handle.options.accuracy == "exact" or w.matrix.x_digits == 2
        if not exact and torch_reports("_is_amx_tile_supported"):
            if len(x) <= FEW_ROWS:
                return self.gemv(x, w, torch.full((len(x),), w.resident_bits, dtype=torch.int32))
            return self._matmul_by_torch(x, w)
        values, y = _floats(x), torch.empty(len(x), w.out_features)
        self.handle.call("dpllm_matmul", ctypes.byref(w.matrix), values.data_ptr(), w.resident_bits, len(x), int(exact),
            y.data_ptr(),
        )  # fmt: skip
        return y.to(x.dtype)

    def _matmul_by_torch(self, x: Tensor, w: PreparedWeight) -> Tensor:
        rows = max(1, BLOCK_BYTES // (w.in_features * 2))
        xs, y = x.bfloat16(), x.new_empty(len(x), w.out_features)
        for first in range(0, w.out_features, rows):
            last = min(first + rows, w.out_features)
            block = self._scratch((last - first) * w.in_features).view(last - first, -1)
            self._dequantize_into(block, w, w.resident_bits, first)
            y[:, first:last] = xs @ block.T
        return y

    def _scratch(self, size: int) -> Tensor:
        """Memory for one block: fresh pages for each would cost as much as filling them."""
        block = getattr(self._own, "block", None)
        if block is None or block.numel() < size:
            block = self._own.block = torch.empty(max(size, BLOCK_BYTES // 2), dtype=torch.bfloat16)
        return block[:size]

    def dequantize(self, w: PreparedWeight, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the b-bit matrix [N, K]."""
        _check_resident(w, bits, bits)
        exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        out = torch.empty(w.out_features, w.in_features, dtype=exact)
        self._dequantize_into(out, w, bits, 0)
        return out.to(dtype)

    def _dequantize_into(self, out: Tensor, w: PreparedWeight, bits: int, first: int) -> None:
        """Rows first, first + 1, ... to out [rows, K], float32 or bfloat16."""
        self.handle.call(
            "dpllm_dequantize", ctypes.byref(w.matrix), bits, int(out.dtype == torch.bfloat16), out.data_ptr(),
            first, first + len(out),
        )  # fmt: skip

    def int8_linear(self, x: Tensor, w: Int8Weight) -> Tensor:
        """Computes x W^T for the int8 head. x: [M, K]. Returns [M, N] in x's dtype."""
        _check_input(x, w.values.shape[1])
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, w.values.to(x.dtype)) * w.scale.to(x.dtype)
        values, y = _floats(x), torch.empty(len(x), w.out_features)
        self.handle.call("dpllm_int8_gemm", w.values.data_ptr(), w.scale.data_ptr(), w.out_features, w.values.shape[1],
            values.data_ptr(), len(x), y.data_ptr(),
        )  # fmt: skip
        return y.to(x.dtype)

    def select(self, signal: Tensor, diagonal: Tensor, thresholds: Tensor, seed_bits: int) -> Tensor:
        """Chooses the bits of each row, as kernels/reference.py defines it. signal: [M, K]. Returns int32 [M]."""
        _check_input(signal, len(diagonal))
        values, weights = _floats(signal), diagonal.to(torch.float16).contiguous()
        error = torch.empty(len(signal))
        self.handle.call(
            "dpllm_weighted_square",
            values.data_ptr(),
            weights.data_ptr(),
            len(signal),
            signal.shape[1],
            error.data_ptr(),
        )
        return seed_bits + (error[:, None] > thresholds).sum(1, dtype=torch.int32)

    def decode_attention(
        self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Computes the attention of one token over per-head runs of a flat cache (float32, float16 or bfloat16)."""
        _check_storage(k, v)
        queries, y = _floats(q), torch.empty(q.shape)
        k, v = k.contiguous(), v.contiguous()
        starts, lengths = start.to(torch.int64).contiguous(), length.to(torch.int32).contiguous()
        self.handle.call("dpllm_attention", queries.data_ptr(), k.data_ptr(), v.data_ptr(), STORAGE[k.dtype],
            starts.data_ptr(), lengths.data_ptr(), q.shape[0], len(start), q.shape[1], scale, y.data_ptr(),
        )  # fmt: skip
        return y.to(q.dtype) if out is None else out.copy_(y)

    def prompt_attention(
        self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float,
        window: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Computes the causal attention of many tokens over per-head runs, which end with the tokens' own pairs."""
        _check_storage(k, v)
        queries, y = _floats(q), torch.empty(q.shape)
        k, v = k.contiguous(), v.contiguous()
        starts, lengths = start.to(torch.int64).contiguous(), length.to(torch.int32).contiguous()
        self.handle.call("dpllm_prompt_attention", queries.data_ptr(), k.data_ptr(), v.data_ptr(), STORAGE[k.dtype],
            starts.data_ptr(), lengths.data_ptr(), *q.shape[:2], len(start), q.shape[2], window or 0, scale,
            y.data_ptr(),
        )  # fmt: skip
        return y.to(q.dtype)

    def attention_peaks(
        self, q: Tensor, k: Tensor, columns: slice, scale: float, offset: Tensor | None = None
    ) -> Tensor:
        """Computes the largest attention, as a logarithm minus `offset`, that any token pays to each of some keys."""
        _check_storage(k, k)
        if not 0 <= columns.start <= columns.stop <= k.shape[1] - len(q):
            raise ValueError(f"{columns} must lie among the keys before the tokens' own keys.")
        queries, k = _floats(q), k.contiguous()
        offsets = None if offset is None else _floats(offset)
        best = torch.empty(q.shape[1], columns.stop - columns.start)
        self.handle.call(
            "dpllm_attention_peaks", queries.data_ptr(), k.data_ptr(), STORAGE[k.dtype], *q.shape[:2], len(k),
            q.shape[2], k.shape[1], columns.start, best.shape[1], scale,
            None if offsets is None else offsets.data_ptr(), best.data_ptr(),
        )  # fmt: skip
        return best.unflatten(0, (len(k), -1))

    def draw(self, logits: Tensor, how: Draw) -> int:
        """Draws a token from logits [V], as dpllm/decode/sampling.py defines it.

        It uses no thread of the pool, so that texts need not take turns.
        """
        if logits.ndim != 1 or not len(logits):
            raise ValueError(f"logits {list(logits.shape)} are not one row of a vocabulary.")
        plain = logits.dtype == torch.float32 and logits.is_contiguous()
        values, handle = logits if plain else _floats(logits), self.handle
        return handle.lib.dpllm_draw(handle.context, values.data_ptr(), len(values), ctypes.byref(how))

    def read_bandwidth(self, memory: Tensor) -> float:
        """Bytes per second of one plain parallel read of all of `memory`, which should be larger than any cache."""
        return self.handle.call(
            "dpllm_read_bandwidth", memory.data_ptr(), memory.numel() * memory.element_size()
        )


def _floats(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).contiguous()


def _check_input(x: Tensor, columns: int) -> None:
    """Checks shapes, because the library does not: it would read beyond the end of what does not match."""
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"activations {list(x.shape)} do not match a matrix of {columns} columns.")


def _check_storage(k: Tensor, v: Tensor) -> None:
    if k.dtype not in STORAGE or v.dtype != k.dtype:
        raise ValueError(f"the cache holds {k.dtype}; it must hold float32, float16 or bfloat16.")


def _check_resident(w: PreparedWeight, low: int, high: int) -> None:
    if low < w.seed_bits or high > w.resident_bits:
        raise ValueError(f"bits {low}..{high} are not resident: {w.seed_bits}..{w.resident_bits} are.")


def _differentiable(kernels: CpuKernels, x: Tensor, w: PreparedWeight, bits: Tensor) -> Tensor:
    widths = bits.unique().tolist()
    y = x.new_zeros(len(x), w.out_features)
    for width in widths:
        rows = (bits == width).nonzero()[:, 0]
        y = y.index_add(0, rows, F.linear(x[rows], kernels.dequantize(w, width, x.dtype)))
    return y
