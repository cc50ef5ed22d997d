"""Repacks weights for the GPU kernels: planes in another order of columns, and tables in the form of the look-ups.

Bit q and bit q + 8 of word kw (q in 0-7 and 16-23) are columns 2 * (m * KW + kw) and the next, m = q or q - 8, where a
row has KW words. Bytes of transposed bits are then pairs of neighbouring columns, which PRMT joins and tensor cores
multiply, and the activations of a pair are one aligned word, read in order along kw. All kernels use this order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpllm.kernels.weight import MAX_BITS, WORD, BitplaneWeight, QuantizedWeight, unpack

ROW_ALIGN = 4  # words: rows begin at 16 bytes
TABLE_ALIGN = 128  # bytes: a line of the L1 cache (as TABLE_ALIGN of bitplane_codes.py)
CHUNK_WEIGHTS = 1 << 24  # weights that are repacked at a time, one byte for each
MAX_WORDS = 2**31 - 1  # kernels count a matrix's words in 32 bits


@dataclass(frozen=True)
class TritonWeight(BitplaneWeight):
    """An [N, K] matrix for the kernels of this folder.

    planes: int32 [P, N, KW], the columns in the order above, KW a multiple of 4; columns beyond K are zero bits.
    tables: uint8, one width after the other, each from a multiple of 128 bytes: [T, 2, 2^b] low and high bytes of
    float16 for b <= 4, float16 [T, 2^b] for wider ones. scale: float16 [N] where rows share tables, else None.
    widths: the widths that products may read; a narrower range than the resident widths makes smaller and faster code.
    """

    planes: Tensor
    tables: Tensor
    table_count: int
    in_features: int
    seed_bits: int
    scale: Tensor | None
    widths: tuple[int, int]

    @property
    def rows_per_table(self) -> int:
        """The number of rows that share one table."""
        return self.out_features // self.table_count

    @property
    def padded_features(self) -> int:
        """The columns of the packed matrix: K rounded up to whole words and aligned rows."""
        return self.planes.shape[2] * WORD

    def table_bytes(self, bits: int) -> int:
        """Bytes of the width's tables and of the row scales."""
        return (self.table_count << (bits + 1)) + (0 if self.scale is None else 2 * self.out_features)

    @property
    def held_bytes(self) -> int:
        """Bytes of the weight in the device's memory."""
        held = [self.planes, self.tables] + ([] if self.scale is None else [self.scale])
        return sum(t.numel() * t.element_size() for t in held)

    def between(self, low: int, high: int) -> TritonWeight:
        """Returns a weight in the same memory for a policy that chooses only among widths low .. high.

        Raises ValueError where these are not resident.
        """
        if not self.seed_bits <= low <= high <= self.resident_bits:
            raise ValueError(
                f"widths {low}..{high} are not resident: {self.seed_bits}..{self.resident_bits} are."
            )
        return replace(self, widths=(low, high))


def table_offset(tables: int, bits: int, seed_bits: int) -> int:
    """Returns the bytes before width `bits`, as table_offset of bitplane_codes.py does on the device."""
    sizes = [tables << (b + 1) for b in range(seed_bits, bits)]
    return sum(-(-size // TABLE_ALIGN) * TABLE_ALIGN for size in sizes)


def pack_tables(w: QuantizedWeight) -> Tensor:
    """Returns the tables of every resident width, uint8, as TritonWeight describes them."""
    count = w.lut.shape[0]
    out = w.lut.new_zeros(table_offset(count, w.resident_bits + 1, w.seed_bits), dtype=torch.uint8)
    for bits in range(w.seed_bits, w.resident_bits + 1):
        values = w.table(bits).contiguous().view(torch.uint8)  # [T, 2 * 2^b], a value's low byte first
        if bits <= 4:
            values = values.view(count, -1, 2).transpose(1, 2).reshape(count, -1)
        at = table_offset(count, bits, w.seed_bits)
        out[at : at + values.numel()] = values.reshape(-1)
    return out


def pack_plane(plane: Tensor, words: int) -> Tensor:
    """Repacks one stored plane int32 [n, W] to int32 [n, words] in the column order of this file."""
    n, stored = plane.shape
    bits = unpack(plane[None], stored * WORD)  # uint8 [n, 32 W], a bit each
    bits = torch.nn.functional.pad(bits, (0, (words - stored) * WORD))
    bits = bits.view(n, 2, 8, words, 2)  # m = 8 i + j, kw, which of the pair
    packed = bits[:, :, 0]
    for j in range(1, 8):
        packed = packed | bits[:, :, j] << j
    return packed.permute(0, 2, 1, 3).reshape(n, -1).view(torch.int32)  # bytes: i, then which


def prepare(w: QuantizedWeight, device: torch.device | str = "cuda") -> TritonWeight:
    """Repacks the resident planes on the device, some rows at a time, so that the device never holds a second copy.

    Raises ValueError for a matrix of 2^31 words or more.
    """
    resident, n, stored = w.planes.shape
    words = -(-stored // ROW_ALIGN) * ROW_ALIGN
    if resident * n * words > MAX_WORDS or not 2 <= w.seed_bits <= resident <= MAX_BITS:
        raise ValueError(
            f"planes {list(w.planes.shape)} with seed width {w.seed_bits} are not supported by the GPU kernels."
        )
    planes = torch.empty(resident, n, words, dtype=torch.int32, device=device)
    rows = max(1, CHUNK_WEIGHTS // (words * WORD))
    for p in range(resident):
        for first in range(0, n, rows):
            part = w.planes[p, first : first + rows].to(device)
            planes[p, first : first + rows] = pack_plane(part, words)
    scale = None if w.scale is None else w.scale.to(device)
    return TritonWeight(
        planes, pack_tables(w).to(device), w.lut.shape[0], w.in_features, w.seed_bits, scale,
        (w.seed_bits, resident),
    )  # fmt: skip
