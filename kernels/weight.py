"""The weights that kernels read: nested bitplanes with lookup tables, and plain int8 for the head.

One stored code serves every width. The b-bit code of a weight is the top b bits of its parent code, so reading b planes
is enough, and each width has its own table to translate codes into values (Any-Precision LLM, arXiv:2402.10517). Widths
up to 6 bits have stored tables. The tables of 7 and 8 bits are derived from the 64 values of 6 bits, because stored
tables of 128 and 256 entries would take 12 to 49% of the size of the planes.
"""

from __future__ import annotations

import ctypes
import math
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8
MAX_TABLE_BITS = 6
WORD = 32  # weights per int32 word of a plane


def lut_columns(seed_bits: int, bits: int) -> tuple[int, int]:
    """Returns (first, last + 1) of the columns of the concatenated table that hold width `bits` (at most 6)."""
    return 2**bits - 2**seed_bits, 2 ** (bits + 1) - 2**seed_bits


class BitplaneWeight(ABC):
    """What the memory layouts of nested bitplanes have in common.

    planes: int32 [P, N, words of a row], most significant plane first.
    """

    planes: Tensor

    @property
    def out_features(self) -> int:
        """N, the rows of the matrix."""
        return self.planes.shape[1]

    @property
    def resident_bits(self) -> int:
        """P, the planes held: the widest width that can be used."""
        return self.planes.shape[0]

    def nbytes(self, bits: int) -> int:
        """Bytes that one pass reads at this width: planes, tables and scales."""
        return bits * self.planes[0].numel() * 4 + self.table_bytes(bits)

    @abstractmethod
    def table_bytes(self, bits: int) -> int:
        """Bytes that one pass reads at this width apart from the planes: the width's tables, and scales."""


@dataclass(frozen=True)
class QuantizedWeight(BitplaneWeight):
    """An [N, K] matrix as nested bitplanes.

    planes: int32 [P, N, ceil(K/32)], most significant plane first; bit i of word w is column 32*w+i.
    lut: float16 [N/rows_per_table, sum of 2^b], the tables of widths seed_bits..min(P, 6) side by side.
    in_features: K; columns beyond it in the last word are zero bits and are ignored.
    scale: float16 [N] when rows share a table (which then holds normalised values), else None.
    """

    planes: Tensor
    lut: Tensor
    in_features: int
    seed_bits: int
    scale: Tensor | None = None

    @property
    def rows_per_table(self) -> int:
        """The number of rows that share one table."""
        return self.out_features // self.lut.shape[0]

    def table(self, bits: int) -> Tensor:
        """Returns the values of each code at this width, float16 [N / rows_per_table, 2^bits]."""
        if not self.seed_bits <= bits <= self.resident_bits:
            raise ValueError(f"bits={bits} is not resident: {self.seed_bits}..{self.resident_bits} are.")
        first, last = lut_columns(self.seed_bits, min(bits, MAX_TABLE_BITS))
        return (
            derived_table(self.lut[:, first:last], bits) if bits > MAX_TABLE_BITS else self.lut[:, first:last]
        )

    def table_bytes(self, bits: int) -> int:
        """Bytes of the stored table that this width reads, and of the row scales."""
        table = self.lut.shape[0] * 2 ** min(bits, MAX_TABLE_BITS) * 2
        return table + (0 if self.scale is None else self.scale.numel() * 2)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Returns the same weight on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, planes=self.planes.to(device), lut=self.lut.to(device), scale=scale)


@dataclass(frozen=True)
class Int8Weight:
    """An [N, K] matrix values[n, k] * scale[n], of int8 values with one float16 scale for each row."""

    values: Tensor
    scale: Tensor

    @property
    def out_features(self) -> int:
        """The number of rows, N."""
        return self.values.shape[0]

    def nbytes(self) -> int:
        """Returns the bytes that one pass reads."""
        return self.values.numel() + self.scale.numel() * 2

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns selected rows, dequantised, which is the embedding look-up of a tied model."""
        return self.values[index].to(dtype) * self.scale[index].to(dtype)[..., None]

    def to(self, device: torch.device | str) -> Int8Weight:
        """Returns the same weight on another device."""
        return Int8Weight(self.values.to(device), self.scale.to(device))


def derived_table(centres: Tensor, bits: int) -> Tensor:
    """Derives a table of 2^bits values from 64 centres, by dividing each cell evenly.

    Cells are bounded by the midpoints between centres. The parts of a cell left and right of its centre are divided
    separately, because they may have different widths. The outermost cells mirror their inner part. centres: [T, 64],
    ascending. Returns [T, 2^bits].
    """
    c = centres.float()
    mid = (c[:, 1:] + c[:, :-1]) / 2
    left = torch.cat([2 * c[:, :1] - mid[:, :1], mid], dim=1)
    right = torch.cat([mid, 2 * c[:, -1:] - mid[:, -1:]], dim=1)
    cuts = 2 ** (bits - MAX_TABLE_BITS - 1)  # values on each side of the centre
    at = (torch.arange(cuts, device=c.device) + 0.5) / cuts
    low = left[..., None] + (c - left)[..., None] * at
    high = c[..., None] + (right - c)[..., None] * at
    return torch.cat([low, high], dim=2).reshape(len(c), -1).to(centres.dtype)


def pack(codes: np.ndarray, bits: int) -> Tensor:
    """Packs uint8 codes [N, K] of `bits` bits into int32 planes [bits, N, ceil(K / 32)], most significant first."""
    n, k = codes.shape
    padded = np.zeros((n, -(-k // WORD) * WORD), np.uint8)
    padded[:, :k] = codes
    planes = [np.packbits(padded >> (bits - 1 - p) & 1, axis=1, bitorder="little") for p in range(bits)]
    return torch.from_numpy(np.stack(planes).view("<i4"))


def unpack(planes: Tensor, in_features: int) -> Tensor:
    """Unpacks int32 planes [b, N, W] into uint8 codes [N, in_features] of b bits."""
    spread = _spread_table(planes.device)
    codes = None
    for plane in planes.contiguous().view(torch.uint8).to(torch.int32):  # [N, 4W]
        lanes = spread.index_select(0, plane.reshape(-1))  # one int64 holds eight codes
        codes = lanes if codes is None else codes.mul_(2).bitwise_or_(lanes)
    assert codes is not None
    return codes.view(torch.uint8).view(planes.shape[1], -1)[:, :in_features]


def _spread_table(device: torch.device) -> Tensor:
    """Returns int64 [256], where byte i of entry v is bit i of v."""
    if device not in _SPREAD:
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        _SPREAD[device] = torch.from_numpy(np.ascontiguousarray(bits).view("<i8")[:, 0].copy()).to(device)
    return _SPREAD[device]


_SPREAD: dict[torch.device, Tensor] = {}


def empty_planes(shape: tuple[int, int, int]) -> Tensor:
    """Returns uninitialised int32 planes, in large pages where the system offers them.

    A step reads all planes in one sweep, and 4 KB pages would make it about 10% slower.
    """
    planes = torch.empty(shape, dtype=torch.int32)
    page = 2 << 20
    start = -(-planes.data_ptr() // page) * page
    end = (planes.data_ptr() + planes.numel() * 4) // page * page
    if sys.platform == "linux" and end > start:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), 14
        )  # MADV_HUGEPAGE; may be refused
    return planes


def fuse(weights: list[QuantizedWeight], planes: Tensor | None = None) -> QuantizedWeight:
    """Stacks the rows of matrices that share one input (q, k, v; gate, up) into one matrix.

    planes: the planes of the result, where the matrices already lie next to each other in memory. Raises ValueError
    where the matrices differ in their input or in their range of bits.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    if any((w.in_features, w.seed_bits, w.resident_bits) != (first.in_features, first.seed_bits, first.resident_bits) for w in weights):  # fmt: skip  # noqa: E501
        raise ValueError("only matrices of the same input and bit range can be fused")
    share = math.gcd(
        *(w.rows_per_table for w in weights)
    )  # repeating a table for fewer rows gives the same values
    luts = [w.lut.repeat_interleave(w.rows_per_table // share, dim=0) for w in weights]
    scales = [w.scale if w.scale is not None else w.lut.new_ones(w.out_features) for w in weights]
    return QuantizedWeight(
        planes=torch.cat([w.planes for w in weights], dim=1) if planes is None else planes,
        lut=torch.cat(luts),
        in_features=first.in_features,
        seed_bits=first.seed_bits,
        scale=None if all(w.scale is None for w in weights) else torch.cat(scales),
    )
