"""Reads importance matrices of llama.cpp: the mean square of each input column of each matrix, over some text.

It is the diagonal of what refinement calls a Hessian, and stands in for Fisher information where no gradients are
computed. Two formats exist: GGUF files of type 'imatrix', and the older binary files.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dpllm.base.errors import InputError
from dpllm.quant.gguf.families import LINEARS
from dpllm.quant.gguf.header import MAGIC, Header
from dpllm.quant.gguf.metadata import Metadata
from dpllm.quant.gguf.types import dequantized

SUMS, COUNTS = ".in_sum2", ".counts"
MAX_NAME = 256  # bytes, in the older format


@dataclass(frozen=True)
class ImportanceMatrix:
    """The importance of columns, float32 [K], by the names of matrices in the HF model. sha256: of the file."""

    path: Path
    columns: Mapping[str, np.ndarray]
    sha256: str

    @classmethod
    def read(cls, path: Path) -> ImportanceMatrix:
        """Reads a file of either format. Raises InputError for anything else."""
        try:
            content = path.read_bytes()
        except OSError as e:
            raise InputError(f"{path} cannot be read: {e.strerror or e}. Give an imatrix file.") from None
        entries = _entries_of_gguf(path) if content[:4] == MAGIC else _entries(path, content)
        names = {f"{stored}.weight": name for stored, name, *_ in LINEARS}
        found = {}
        for stored, values in entries:
            layer, _, rest = stored.removeprefix("blk.").partition(".")
            if layer.isdecimal() and rest in names:
                found[f"model.layers.{int(layer)}.{names[rest]}"] = _checked(path, stored, values)
        if not found:
            raise InputError(f"{path} holds no importance of a layer's matrices. Give an imatrix file.")
        return cls(path, found, hashlib.sha256(content).hexdigest())

    def weights(self, name: str, rows: int) -> torch.Tensor:
        """Weights of k-means, float32 [rows, K], for a matrix: each row has the importance of the columns."""
        return torch.from_numpy(self.columns[name]).expand(rows, -1)

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raises InputError unless each matrix [N, K] of a model has its K values."""
        for name, (_, k) in shapes.items():
            held = len(self.columns[name]) if name in self.columns else 0
            if held != k:
                raise InputError(
                    f"{self.path} holds {held} values for the {k} columns of '{name}'. Give the imatrix of this model."
                )


def _checked(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    """Values scaled to a mean of 1, and at least a thousandth, so that no column loses all its weight."""
    mean = float(values.mean()) if len(values) else 0.0
    if not np.isfinite(values).all() or values.min() < 0 or mean <= 0:
        raise InputError(f"{path}: '{name}' holds values that are not mean squares. Make the imatrix again.")
    return np.maximum(values / mean, 1e-3).astype(np.float32)


def _entries_of_gguf(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    header = Header.read(path)
    if (kind := Metadata(path, header.metadata).text("general.type", "model")) != "imatrix":
        raise InputError(f"{path} holds '{kind}', not an imatrix. Give an imatrix file.")
    for name, tensor in header.tensors.items():
        if name.endswith(SUMS):
            raw = np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.offset)
            yield (
                name.removesuffix(SUMS),
                dequantized(raw, tensor.shape, tensor.kind).float().flatten().numpy(),
            )


def _entries(path: Path, content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """The entries of an older file: a count, then for each a name, a number of calls, and sums of squares."""
    try:
        (count,), at = struct.unpack_from("<i", content), 4
        for _ in range(count):
            (length,) = struct.unpack_from("<i", content, at)
            if not 0 < length <= MAX_NAME:
                raise ValueError("a name's length")
            name = content[at + 4 : at + 4 + length].decode("utf-8")
            _, size = struct.unpack_from("<ii", content, at + 4 + length)
            at += length + 12
            if not 0 < size <= (len(content) - at) // 4:
                raise ValueError("a number of values")
            yield name, np.frombuffer(content, "<f4", size, at)
            at += 4 * size
    except (struct.error, ValueError):
        raise InputError(f"{path} is not an imatrix file, or it is cut off. Give an imatrix file.") from None
