"""The overlay on disk: one directory, with separate planes and a checksum for every tensor (docs/format.md).

`model.safetensors.index.json` is the manifest: it lists which file holds which tensor, each tensor's sha256, each
side file's sha256, and a sha256 of the manifest itself. It is written last. A reader that needs width b reads planes
0..b-1 and tables up to b, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpllm.base.errors import InputError
from dpllm.base.shell import command_line
from dpllm.kernels.weight import (
    MAX_BITS,
    MAX_TABLE_BITS,
    MIN_BITS,
    WORD,
    Int8Weight,
    QuantizedWeight,
    empty_planes,
    fuse,
)
from dpllm.quant.source import INDEX, TensorFile, read_json

FORMAT_VERSION = 1
QUANT_METHOD = "dpllm"


def tensor_sha256(tensor: torch.Tensor) -> str:
    """The sha256 of a CPU tensor's bytes, in hex."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a small file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """The manifest's own checksum, in hex: over everything in the manifest except that checksum."""
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class LinearLayout:
    """One quantised matrix as config.json describes it.

    shape: (N, K). bits: the narrowest and the widest stored width. rows_per_table: rows that share one table.
    """

    shape: tuple[int, int]
    bits: tuple[int, int]
    rows_per_table: int

    @classmethod
    def of(cls, name: str, entry: Any) -> LinearLayout:
        """Parses an entry of `quantization_config.linears`. Raises InputError for an invalid one."""
        try:
            (n, k), (lo, hi), share = entry["shape"], entry["bits"], entry["rows_per_table"]
            ok = all(isinstance(v, int) and v > 0 for v in (n, k, lo, hi, share))
        except (KeyError, TypeError, ValueError):
            ok = False
        if not ok or not MIN_BITS <= lo <= hi <= MAX_BITS or lo > MAX_TABLE_BITS or n % share:
            raise InputError(
                f"config.json: quantization_config.linears['{name}'] is {entry!r}, which is not a valid layout."
            )
        return cls((n, k), (lo, hi), share)

    def tensors(self, name: str) -> dict[str, tuple[list[int], torch.dtype]]:
        """Every tensor that the matrix consists of: name -> (shape, dtype)."""
        n, k = self.shape
        lo, hi = self.bits
        out = {f"{name}.planes.{p}": ([n, -(-k // WORD)], torch.int32) for p in range(hi)}
        for b in range(lo, min(hi, MAX_TABLE_BITS) + 1):
            out[f"{name}.lut.{b}"] = ([n // self.rows_per_table, 2**b], torch.float16)
        if self.rows_per_table > 1:
            out[f"{name}.scale"] = ([n], torch.float16)
        return out


class Overlay:
    """An opened overlay. `bits` is the stored range of widths; calibration profiles refer to the overlay by `hash`."""

    def __init__(self, path: Path, config: dict[str, Any], manifest: dict[str, Any]):
        self.path, self.config = path, config
        self.hash: str = manifest["sha256"]
        self._tensors: dict[str, dict[str, Any]] = manifest["tensors"]
        self._files: dict[str, TensorFile] = {}
        self._lock = threading.Lock()
        quantization = config["quantization_config"]
        self.bits: tuple[int, int] = (quantization["bits"][0], quantization["bits"][1])
        self.linears = {n: LinearLayout.of(n, e) for n, e in quantization["linears"].items()}
        self.quantization = quantization

    @property
    def int8_nats(self) -> dict[str, float]:
        """Nats per token that int8 activations cost at each matrix; empty where this was not measured."""
        stored = self.quantization.get("int8_nats")
        known = stored.items() if isinstance(stored, dict) else ()
        return {n: float(x) for n, x in known if isinstance(x, (int, float)) and x >= 0}

    @classmethod
    def open(cls, path: Path) -> Overlay:
        """Opens an overlay. Checks manifest, config and the list of tensors, but reads no weights.

        Raises InputError for anything that is missing, altered or unexpected, and for another format version.
        """
        if not path.is_dir():
            raise InputError(
                f"{path} is not a directory. Make an overlay: {command_line('quantize', 'MODEL', path)}"
            )
        config = read_json(path / "config.json")
        quantization = config.get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
            raise InputError(
                f"{path} is not a dpllm overlay. Make one: {command_line('quantize', path, 'OUT')}"
            )
        version = quantization.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path / 'config.json'}: format_version is {version!r}, this dpllm reads {FORMAT_VERSION}. "
                "Upgrade dpllm, or quantise the model again."
            )
        if quantization.get("codebook") != "lut":
            raise InputError(
                f"{path / 'config.json'}: codebook {quantization.get('codebook')!r} is unknown; this dpllm reads 'lut'."
            )
        manifest = read_json(path / INDEX)
        _check_manifest(path, manifest)
        overlay = cls(path, config, manifest)
        overlay._check_tensor_list()
        return overlay

    def _check_tensor_list(self) -> None:
        wanted = {t for n, layout in self.linears.items() for t in layout.tensors(n)}
        wanted |= set(self.quantization["plain_tensors"])
        if odd := wanted.symmetric_difference(self._tensors):
            name = min(odd)
            what = "missing from" if name in wanted else "not expected in"
            raise InputError(f"{self.path}: tensor {name!r} is {what} the overlay. Quantise the model again.")

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Raises InputError if its shape, dtype or sha256 is not as listed."""
        entry = self._tensors.get(name)
        if entry is None:
            raise InputError(f"{self.path} has no tensor '{name}'. Quantise the model again.")
        shard = entry["file"]
        tensor = self._file(shard).read(name)
        if list(tensor.shape) != entry["shape"] or _dtype_name(tensor.dtype) != entry["dtype"]:
            raise InputError(
                f"{self.path / shard}: tensor '{name}' has shape {list(tensor.shape)} {tensor.dtype}, "
                f"not {entry['shape']} {entry['dtype']} as listed. Copy the overlay again."
            )
        if tensor_sha256(tensor) != entry["sha256"]:
            raise InputError(
                f"{self.path / shard}: tensor '{name}' is damaged (checksum). Copy the overlay again."
            )
        return tensor

    def _file(self, shard: str) -> TensorFile:
        with self._lock:  # several threads may load a model
            if shard not in self._files:
                self._files[shard] = TensorFile(self.path / shard)
                listed = {t for t, e in self._tensors.items() if e["file"] == shard}
                if odd := listed.symmetric_difference(self._files[shard].names()):
                    raise InputError(
                        f"{self.path / shard}: tensor {min(odd)!r} is not as listed. Copy the overlay again."
                    )
            return self._files[shard]

    def linear(
        self, name: str, resident_bits: int | None = None, planes: torch.Tensor | None = None
    ) -> QuantizedWeight:
        """One quantised matrix with its top `resident_bits` planes (default: all).

        planes: int32 [resident planes, N, ceil(K/32)] to read into; None allocates memory. Raises InputError for fewer
        planes than the seed width, and for tensors that are not as listed.
        """
        layout = self.linears[name]
        keep = self._planes_to_read(name, resident_bits)
        for tensor, (shape, dtype) in layout.tensors(name).items():
            entry = self._tensors[tensor]
            if entry["shape"] != shape or entry["dtype"] != _dtype_name(dtype):
                raise InputError(
                    f"{self.path}: tensor '{tensor}' has shape {entry['shape']}, not {shape} {dtype}."
                )
        if planes is None:
            planes = empty_planes((keep, layout.shape[0], -(-layout.shape[1] // WORD)))
        for p in range(keep):
            planes[p] = self.read(f"{name}.planes.{p}")
        widths = range(layout.bits[0], min(keep, MAX_TABLE_BITS) + 1)
        lut = torch.cat([self.read(f"{name}.lut.{b}") for b in widths], dim=1)
        scale = self.read(f"{name}.scale") if layout.rows_per_table > 1 else None
        return QuantizedWeight(planes, lut, layout.shape[1], layout.bits[0], scale)

    def stacked(self, names: Sequence[str], resident_bits: int | None = None) -> QuantizedWeight:
        """Matrices that share an input as one matrix, row after row. Each plane is read directly into place."""
        if len(names) == 1:
            return self.linear(names[0], resident_bits)
        layouts = [self.linears[n] for n in names]
        keep, columns = self._planes_to_read(names[0], resident_bits), layouts[0].shape[1]
        if any(x.bits != layouts[0].bits or x.shape[1] != columns for x in layouts):
            raise InputError(
                f"{self.path}: {', '.join(names)} differ in range or width. Quantise the model again."
            )
        rows = [x.shape[0] for x in layouts]
        planes = empty_planes((keep, sum(rows), -(-columns // WORD)))
        pieces = planes.split(rows, dim=1)
        return fuse([self.linear(n, keep, p) for n, p in zip(names, pieces, strict=True)], planes)

    def _planes_to_read(self, name: str, resident_bits: int | None) -> int:
        lo, hi = self.linears[name].bits
        keep = hi if resident_bits is None else min(hi, resident_bits)
        if keep < lo:
            raise InputError(f"{keep} resident bits are below the seed width: {self.path} stores {lo}..{hi}.")
        return keep

    def int8(self, name: str) -> Int8Weight:
        """One int8 matrix, such as the head."""
        return Int8Weight(self.read(f"{name}.int8"), self.read(f"{name}.scale"))

    def has(self, name: str) -> bool:
        """Whether the overlay stores this tensor."""
        return name in self._tensors

    def entries(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of every stored tensor."""
        return ((name, entry["nbytes"]) for name, entry in self._tensors.items())

    def linear_of(self, tensor: str) -> LinearLayout | None:
        """The layout of the matrix a tensor belongs to, None for plain tensors."""
        for marker in (".planes.", ".lut.", ".scale"):
            name, found, _ = tensor.partition(marker)
            if found and name in self.linears:
                return self.linears[name]
        return None

    @property
    def bytes_read(self) -> int:
        """Tensor bytes read so far."""
        return sum(f.bytes_read for f in self._files.values())

    def stored_bytes(self) -> dict[str, int]:
        """Tensor bytes on disk, by kind: planes, tables, scales, other."""
        out = {"planes": 0, "tables": 0, "scales": 0, "other": 0}
        for name, entry in self._tensors.items():
            kind = "planes" if ".planes." in name else "tables" if ".lut." in name else "other"
            if name.endswith(".scale"):
                kind = "scales"
            out[kind] += entry["nbytes"]
        return out


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    where = path / INDEX
    if not isinstance(manifest.get("tensors"), dict) or not isinstance(manifest.get("files"), dict):
        raise InputError(
            f"{where} is not a dpllm manifest ('tensors' or 'files' is missing). Copy the overlay again."
        )
    if manifest.get("sha256") != manifest_sha256(manifest):
        raise InputError(f"{where} is damaged: its checksum does not match. Copy the overlay again.")
    for name, sha in manifest["files"].items():
        if not (path / name).is_file():
            raise InputError(f"{path / name} is missing. Copy the overlay again.")
        if file_sha256(path / name) != sha:
            raise InputError(
                f"{path / name} was altered after quantisation (checksum). Restore it, or quantise again."
            )
