"""Parses the header of a GGUF file: metadata, and where each tensor lies. No tensor is read.

Every count and length in the file is compared with the bytes that are left before it is believed, so that a damaged
file costs neither time nor memory. The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpllm.base.errors import InputError
from dpllm.quant.gguf.types import stored_bytes, type_name

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, where the metadata do not name another
MAX_DIMENSIONS = 4
SCALARS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. shape: outermost dimension first. kind: the number of its GGML type. offset: in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The metadata of a file as plain Python values, and its tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def read(cls, path: Path) -> Header:
        """Parses a file. Raises InputError for anything that is not an intact GGUF file of version 2 or 3."""
        try:
            with path.open("rb") as f:
                if not path.stat().st_size:
                    raise InputError(f"{path} is empty. Download it again.")
                with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return _Parser(path, data).header()
        except OSError as e:
            raise InputError(f"{path} cannot be read: {e.strerror or e}. Give a GGUF file.") from None


def is_gguf(path: Path) -> bool:
    """Tells whether a file calls itself GGUF, by its name or by its first bytes."""
    try:
        with path.open("rb") as f:
            return path.suffix == ".gguf" or f.read(4) == MAGIC
    except OSError:
        return False


class _Parser:
    """A cursor over the bytes of one file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def header(self) -> Header:
        self.check_magic_and_version()
        tensor_count, metadata_count = self.unpack("<QQ")
        self.check_count(
            metadata_count, 13, "metadata entries"
        )  # bytes: a key's length, a type, a value of 1 byte
        self.check_count(
            tensor_count, 32, "tensors"
        )  # bytes: name's length, dimensions, one size, type, offset
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = self.string("a metadata key")
            if key in metadata:
                self.damaged(f"metadata '{key}' is there twice")
            metadata[key] = self.value(key, self.unpack("<I")[0])
        infos = dict(self.tensor_info() for _ in range(tensor_count))
        if len(infos) != tensor_count:
            self.damaged("two tensors have the same name")
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self.damaged(f"general.alignment is {alignment!r}, not a power of two")
        begin = -(-self.at // alignment) * alignment
        return Header(self.path, metadata, {n: self.placed(n, begin, *info) for n, info in infos.items()})

    def check_magic_and_version(self) -> None:
        magic = self.data[:4]
        if magic != MAGIC:
            raise InputError(f"{self.path} is not a GGUF file (it begins with {magic!r}). Give a GGUF file.")
        self.at = 4
        (version,) = self.unpack("<I")
        if version in VERSIONS:
            return
        if int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS:
            raise InputError(
                f"{self.path} is in big-endian byte order, which is not supported. Get the little-endian file."
            )
        raise InputError(
            f"{self.path} has GGUF version {version}; versions 2 and 3 are supported. Get a newer conversion."
        )

    def damaged(self, what: str) -> None:
        raise InputError(f"{self.path} is damaged: {what}. Download it again.")

    def check_count(self, count: int, least: int, what: str) -> None:
        """Refuses a number of things of which each takes at least `least` bytes, if the file is too short for them."""
        if count * least > self.size - self.at:
            self.damaged(
                f"it announces {count} {what} at byte {self.at}, but has only {self.size} bytes in all"
            )

    def unpack(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize(layout)
        self.check_count(1, size, f"value of {size} bytes")
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += size
        return values

    def string(self, what: str) -> str:
        (length,) = self.unpack("<Q")
        self.check_count(length, 1, f"bytes of {what}")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.damaged(f"{what} at byte {self.at - length} is not UTF-8 text")
            raise AssertionError from None

    def value(self, key: str, kind: int) -> Any:
        if kind == ARRAY:
            return self.array(key)
        if kind == STRING:
            return self.string(f"metadata '{key}'")
        return self.scalars(key, kind, 1)[0]

    def array(self, key: str) -> list[Any]:
        kind, count = self.unpack("<IQ")
        if kind == STRING:
            self.check_count(count, 8, f"strings of metadata '{key}'")
            return [self.string(f"metadata '{key}'") for _ in range(count)]
        return self.scalars(key, kind, count)

    def scalars(self, key: str, kind: int, count: int) -> list[Any]:
        if kind not in SCALARS:
            self.damaged(f"metadata '{key}' has type {kind}, which GGUF does not define here")
        dtype = np.dtype(SCALARS[kind])
        self.check_count(count, dtype.itemsize, f"values of metadata '{key}'")
        values = np.frombuffer(self.data[self.at : self.at + count * dtype.itemsize], dtype)
        self.at += count * dtype.itemsize
        return values.tolist()

    def tensor_info(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name = self.string("a tensor's name")
        (dimensions,) = self.unpack("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self.damaged(f"tensor '{name}' has {dimensions} dimensions")
        shape = self.unpack(f"<{dimensions}Q")
        if not all(shape):
            self.damaged(f"tensor '{name}' has shape {list(shape[::-1])}")
        kind, offset = self.unpack("<IQ")
        return name, (tuple(shape[::-1]), kind, offset)

    def placed(self, name: str, begin: int, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
        nbytes = stored_bytes(shape, kind)
        if nbytes is None:
            raise InputError(
                f"{self.path}: tensor '{name}' has type {type_name(kind)}, which dpllm cannot read (types of "
                "ik_llama.cpp are among these). Get the model in another type, such as Q6_K."
            )
        if not nbytes:
            self.damaged(
                f"rows of tensor '{name}', {list(shape)}, do not consist of whole {type_name(kind)} blocks"
            )
        if begin + offset + nbytes > self.size:
            self.damaged(
                f"tensor '{name}' ends at byte {begin + offset + nbytes}, but the file has {self.size}; it was cut off"
            )
        return StoredTensor(shape, kind, begin + offset, nbytes)
