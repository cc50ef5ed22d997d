"""A model in one or several GGUF files: its parts, its types, and how it is read by the names of the HF model."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpllm.base.errors import InputError
from dpllm.quant.gguf.config import Described, describe
from dpllm.quant.gguf.header import Header, StoredTensor
from dpllm.quant.gguf.metadata import Metadata
from dpllm.quant.gguf.tensors import GgufTensors
from dpllm.quant.gguf.types import bits_per_weight, is_quantized, type_name

GGUF_LINK = "gguf.json"  # in the folder that stands for a GGUF file (folder.py)
PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
SAMPLE = 4096  # bytes of each tensor that identify a file


@dataclass(frozen=True)
class GgufModel:
    """All files of a model: their paths, the first one's header, and file and place of every tensor."""

    paths: tuple[Path, ...]
    header: Header
    tensors: dict[str, tuple[Path, StoredTensor]]

    @classmethod
    def read(cls, path: Path) -> GgufModel:
        """Reads the headers of a model that is given by any of its files. Raises InputError if one is missing."""
        headers = [Header.read(p) for p in _all_parts(path)]
        first = Metadata(headers[0].path, headers[0].metadata)
        tensors: dict[str, tuple[Path, StoredTensor]] = {}
        for number, header in enumerate(headers):
            meta = Metadata(header.path, header.metadata)
            if meta.whole("split.no", 0, least=0) != number or meta.whole("split.count", 1, least=0) not in (
                0,
                len(headers),
            ):
                raise InputError(
                    f"{header.path} says that it is another part than its name says. Restore the files' names."
                )
            if twice := set(tensors) & set(header.tensors):
                raise InputError(
                    f"{header.path}: tensor '{min(twice)}' is in another part too. Download both again."
                )
            tensors |= {name: (header.path, tensor) for name, tensor in header.tensors.items()}
        if not tensors:
            raise InputError(f"{path} holds no tensors (a vocabulary only). Give the file of a model.")
        if len(tensors) != first.whole("split.tensors.count", len(tensors)):
            raise InputError(f"{path}: its parts hold {len(tensors)} tensors, not as many as they announce.")
        return cls(tuple(h.path for h in headers), headers[0], tensors)

    def types(self) -> dict[str, int]:
        """The number of weights of each GGML type, the most frequent type first."""
        counts: Counter[str] = Counter()
        for _, tensor in self.tensors.values():
            counts[type_name(tensor.kind)] += math.prod(tensor.shape)
        return dict(counts.most_common())

    def quantized_note(self) -> str | None:
        """One sentence about matrices of fewer than 16 bits, if there are any."""
        matrices = [t for _, t in self.tensors.values() if len(t.shape) > 1]
        if not any(is_quantized(t.kind) for t in matrices):
            return None
        weights = sum(math.prod(t.shape) for t in matrices)
        bits = sum(bits_per_weight(t.kind) * math.prod(t.shape) for t in matrices) / weights
        kinds = Counter(type_name(t.kind) for t in matrices)
        shown = ", ".join(kind for kind, _ in kinds.most_common(3))
        return (
            f"{self.paths[0].name} is quantised itself ({shown}; {bits:.1f} bits per weight): its errors stay. The "
            "original checkpoint gives a better result."
        )

    def fingerprints(self) -> list[list[Any]]:
        """Path, size and time of change of every file."""
        stats = [(p, p.stat()) for p in self.paths]
        return [[str(p.absolute()), s.st_size, s.st_mtime_ns] for p, s in stats]

    def sha256(self) -> str:
        """Identifies the model: names, places and a sample of each tensor. All bytes would take as long as loading."""
        digest = hashlib.sha256(json.dumps(sorted(map(str, self.header.metadata.items()))).encode())
        for name, (path, tensor) in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.shape} {tensor.kind}".encode())
            with path.open("rb") as f:
                for at in (0, tensor.nbytes // 2):
                    f.seek(tensor.offset + at)
                    digest.update(f.read(min(SAMPLE, tensor.nbytes - at)))
        return digest.hexdigest()

    def readers(self, described: Described, *, permuted: bool) -> dict[str, Any]:
        """The reader of each tensor, by its name in the Hugging Face model.

        permuted: whether rows of queries and keys are stored in llama.cpp's order.
        """
        by_name: dict[str, Any] = {}
        for path in self.paths:
            parts = {n: p for n, p in described.parts.items() if p.path == path}
            reader = GgufTensors(path, parts, head=described.config["head_dim"], permuted=permuted)
            by_name |= dict.fromkeys(parts, reader)
        return by_name


def linked_tensors(folder: Path, link: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """What a folder's link points to: the reader of each tensor by name, and a note about the weights' quality.

    Raises InputError if the GGUF files are missing or were replaced.
    """
    try:
        first, files, permuted = Path(link["files"][0][0]), link["files"], link["permuted"]
    except (KeyError, IndexError, TypeError):
        raise InputError(
            f"{folder / GGUF_LINK} is damaged. Delete {folder}, and give the GGUF file."
        ) from None
    model = GgufModel.read(first)
    if model.fingerprints() != files:
        raise InputError(f"{first} has changed since {folder} was made. Give the GGUF file itself.")
    described = describe(model.header, model.tensors)
    return model.readers(described, permuted=permuted), model.quantized_note()


def _all_parts(path: Path) -> list[Path]:
    """All files of a model, of which `path` is one. Raises InputError if one is missing."""
    named = PART_NAME.fullmatch(path.name)
    if named is None:
        return [path]
    stem, _, count = named.groups()
    parts = [path.with_name(f"{stem}-{n:05d}-of-{count}.gguf") for n in range(1, min(int(count), 1000) + 1)]
    if missing := [p.name for p in parts if not p.is_file()]:
        raise InputError(
            f"{path} is one of {int(count)} files; {missing[0]} is missing beside it. Download all of them."
        )
    return parts
