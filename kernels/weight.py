"""What kernels compute with: nested bitplanes with lookup tables, and plain int8 for the head.

One stored code serves every width: the b-bit code of a weight is the top b bits of its parent code, so
reading b planes is enough, and each width has its own table to translate codes into values
(Any-Precision LLM, arXiv:2402.10517). Tables are free up to 6 bits; 7 and 8 bits derive theirs from the
64 centres, because 128- and 256-entry tables would cost 12-49% of the planes they serve.
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
    """Columns of the concatenated table that hold width `bits` (at most 6)."""
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
    in_features: K; columns beyond it in the last word are zero bits and mean nothing.
    scale: float16 [N] when rows share a table (which then holds normalised values), else None.
    """

    planes: Tensor
    lut: Tensor
    in_features: int
    seed_bits: int
    scale: Tensor | None = None

    @property
    def rows_per_table(self) -> int:
        """Rows that share one table."""
        return self.out_features // self.lut.shape[0]

    def table(self, bits: int) -> Tensor:
        """[N/rows_per_table, 2^bits] float16: the values of each code at this width."""
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
        """The same weight on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, planes=self.planes.to(device), lut=self.lut.to(device), scale=scale)


@dataclass(frozen=True)
class Int8Weight:
    """An [N, K] matrix as int8 with one float16 scale a row: values[n, k] * scale[n]."""

    values: Tensor
    scale: Tensor

    @property
    def out_features(self) -> int:
        """N."""
        return self.values.shape[0]

    def nbytes(self) -> int:
        """Bytes one pass reads."""
        return self.values.numel() + self.scale.numel() * 2

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Selected rows, dequantised: the embedding look-up of a tied model."""
        return self.values[index].to(dtype) * self.scale[index].to(dtype)[..., None]

    def to(self, device: torch.device | str) -> Int8Weight:
        """The same weight on another device."""
        return Int8Weight(self.values.to(device), self.scale.to(device))


def derived_table(centres: Tensor, bits: int) -> Tensor:
    """The 2^bits table that the 64 centres imply: each cell, bounded by midpoints, cut evenly.

    The halves left and right of a centre are cut separately, so cells of unequal sides keep their shape;
    the outermost cells mirror their inner half. centres: [T, 64] ascending. Returns [T, 2^bits].
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
    """uint8 codes [N, K] of `bits` bits -> int32 planes [bits, N, ceil(K/32)], MSB first."""
    n, k = codes.shape
    padded = np.zeros((n, -(-k // WORD) * WORD), np.uint8)
    padded[:, :k] = codes
    planes = [np.packbits(padded >> (bits - 1 - p) & 1, axis=1, bitorder="little") for p in range(bits)]
    return torch.from_numpy(np.stack(planes).view("<i4"))


def unpack(planes: Tensor, in_features: int) -> Tensor:
    """int32 planes [b, N, W] -> uint8 codes [N, in_features] of b bits."""
    spread = _spread_table(planes.device)
    codes = None
    for plane in planes.contiguous().view(torch.uint8).to(torch.int32):  # [N, 4W]
        lanes = spread.index_select(0, plane.reshape(-1))  # eight codes ride in one int64
        codes = lanes if codes is None else codes.mul_(2).bitwise_or_(lanes)
    assert codes is not None
    return codes.view(torch.uint8).view(planes.shape[1], -1)[:, :in_features]


def _spread_table(device: torch.device) -> Tensor:
    """int64 [256]: byte i of entry v is bit i of v."""
    if device not in _SPREAD:
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        _SPREAD[device] = torch.from_numpy(np.ascontiguousarray(bits).view("<i8")[:, 0].copy()).to(device)
    return _SPREAD[device]


_SPREAD: dict[torch.device, Tensor] = {}


def empty_planes(shape: tuple[int, int, int]) -> Tensor:
    """int32 planes to be filled, in large pages where the system offers them.

    A step sweeps through all planes at once; 4 KB pages cost it some 10% (bench/cpu_kernels.py).
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
    """Stacks matrices that share one input (q, k, v; gate, up) into one, row after row.

    planes: those of all of them, where they lie behind one another already.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    if any((w.in_features, w.seed_bits, w.resident_bits) != (first.in_features, first.seed_bits, first.resident_bits) for w in weights):  # fmt: skip  # noqa: E501
        raise ValueError("only matrices of the same input and bit range can be fused")
    share = math.gcd(*(w.rows_per_table for w in weights))  # a table repeated serves fewer rows, still right
    luts = [w.lut.repeat_interleave(w.rows_per_table // share, dim=0) for w in weights]
    scales = [w.scale if w.scale is not None else w.lut.new_ones(w.out_features) for w in weights]
    return QuantizedWeight(
        planes=torch.cat([w.planes for w in weights], dim=1) if planes is None else planes,
        lut=torch.cat(luts),
        in_features=first.in_features,
        seed_bits=first.seed_bits,
        scale=None if all(w.scale is None for w in weights) else torch.cat(scales),
    )
