"""Counts bytes by kind: the bytes that a token reads and the bytes that memory holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dpllm.kernels.cpu.kernels import PreparedWeight
from dpllm.kernels.weight import WORD, Int8Weight, QuantizedWeight
from dpllm.model.decoder import Decoder, Group
from dpllm.report.data import KindBytes


def bytes_by_kind(
    decoder: Decoder, bits: Sequence[Sequence[int]], selector: int, kv_bytes: Sequence[int]
) -> tuple[KindBytes, ...]:
    """Counts the bytes of a generation by kind.

    bits: widths [tokens][groups]. selector: bytes that choosing the widths reads for a token. kv_bytes: bytes of the
    cache after each token. Bytes read are counted in the overlay's format, as the steps count them
    (`Group.bytes_at`). Bytes held are counted as the backend stores them.
    """
    read, held = np.zeros(3), np.zeros(3, dtype=np.int64)
    for group, widths in zip(decoder.groups, zip(*bits, strict=True), strict=True):
        for width, count in Counter(widths).items():
            read += np.asarray(read_bytes(group, width)) * (count / len(widths))
        held += held_bytes(group.weight)
    head, tied = decoder.head_bytes(), decoder.embedding is decoder.head
    table, row = _embedding_bytes(decoder.embedding)
    norms = _norm_bytes(decoder)
    matrices = zip(("planes", "tables", "scales"), read.tolist(), held.tolist(), strict=True)
    return (
        *(KindBytes(kind, round(r, 1), h) for kind, r, h in matrices),
        KindBytes("head", head, head),
        KindBytes("embedding", row, 0 if tied else table),
        KindBytes("norms", norms, norms),
        KindBytes("selector", selector, selector),
        KindBytes("KV cache", round(float(np.mean(kv_bytes)), 1), max(kv_bytes)),
    )


def read_bytes(group: Group, bits: int) -> tuple[int, int, int]:
    """Returns the bytes (planes, tables, scales) that one pass reads at this width; their sum is `Group.bytes_at`."""
    weight = group.weight
    words = -(-weight.in_features // WORD)  # words of a stored row; a GPU may pad its rows
    planes = bits * weight.out_features * words * 4
    scales = 0 if _row_scale(weight) is None else 2 * weight.out_features
    return planes, group.bytes_at[bits - group.seed_bits] - planes - scales, scales


def held_bytes(weight: Any) -> tuple[int, int, int]:
    """Returns the bytes (planes, tables, scales) in memory of a weight as its backend prepared it."""
    scales = [_row_scale(weight)]
    if isinstance(weight, PreparedWeight):
        tables, scales = [*weight.tables.values()], [*weight.scales.values(), *scales]
    else:
        tables = [weight.lut if isinstance(weight, QuantizedWeight) else weight.tables]
    return _size(weight.planes), sum(map(_size, tables)), sum(map(_size, scales))


def _row_scale(weight: Any) -> Tensor | None:
    return weight.row_scale if isinstance(weight, PreparedWeight) else weight.scale


def _embedding_bytes(embedding: Tensor | Int8Weight) -> tuple[int, int]:
    """Returns the bytes (of the whole table, of the row that a token reads)."""
    if isinstance(embedding, Int8Weight):
        return embedding.nbytes(), embedding.nbytes() // len(embedding.values)
    return _size(embedding), _size(embedding[0])


def _norm_bytes(decoder: Decoder) -> int:
    norms = [decoder.norm]
    for layer in decoder.layers:
        norms += [n for n in (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm) if n is not None]
    return sum(map(_size, norms))


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
