"""Reads a Hugging Face model directory: config and tensors by name. Nothing is unpickled."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dpllm.base.errors import InputError
from dpllm.base.places import check_readable
from dpllm.quant.gguf.model import GGUF_LINK, linked_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
    "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError if the file is missing, or does not hold an object."""
    check_readable(path)
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing. Give a directory that holds it.") from None
    except (OSError, ValueError, RecursionError) as e:  # undecodable, not JSON, or nested too deeply
        raise InputError(f"{path} cannot be read as JSON: {e}. Restore the file and try again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, not an object. Restore the file.")
    return value


class TensorFile:
    """One safetensors file, whose tensors are read when they are asked for. `bytes_read` counts their bytes.

    Raises InputError for a file that is missing or damaged.
    """

    def __init__(self, path: Path):
        self.path, self.bytes_read = path, 0
        self._lock = threading.Lock()
        check_readable(path)
        try:
            self._file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise InputError(f"{path} {_absence(path)}. Copy the model again.") from None
        except SafetensorError as e:
            raise InputError(f"{path} is damaged or not a safetensors file ({e}). {_remedy(path)}") from None
        except OSError as e:
            raise InputError(
                f"{path} cannot be read: {e.strerror or e}. Make it readable, or copy it again."
            ) from None

    def names(self) -> list[str]:
        """Names of the tensors in the file."""
        return list(self._file.keys())

    def read(self, name: str) -> torch.Tensor:
        """One tensor, copied out of the mapped file. Raises InputError if it cannot be read."""
        try:
            tensor = self._file.get_tensor(name)
        except SafetensorError as e:
            raise InputError(
                f"{self.path}: tensor '{name}' cannot be read ({e}). Copy the file again."
            ) from None
        with self._lock:
            self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def layout(self, name: str) -> tuple[list[int], str]:
        """A tensor's (shape, dtype name), without reading its data."""
        piece = self._file.get_slice(name)
        return list(piece.get_shape()), str(piece.get_dtype())


@dataclass
class ModelSource:
    """A checkpoint directory: `config` as JSON, tensors by their stored names over all shards.

    listed: the shard of each tensor as the index lists it, which need not be true.
    """

    path: Path
    config: dict[str, Any]
    files: dict[str, TensorFile] = field(repr=False)
    listed: dict[str, str] = field(default_factory=dict, repr=False)
    note: str | None = None  # what its user should know about the quality of these weights

    @classmethod
    def open(cls, path: Path) -> ModelSource:
        """Opens the files that transformers 5 would read, in its order.

        Every tensor in a shard counts, whether the index lists it or not. If two shards hold a tensor, the later shard
        counts. Raises InputError for pickled weights, adapters, and files that are missing or damaged.
        """
        config = read_json(path / "config.json")
        if (path / GGUF_LINK).is_file():
            tensors, note = linked_tensors(path, read_json(path / GGUF_LINK))
            return cls(path, config, tensors, note=note)
        first = weight_file(path, config)
        listed = read_index(first) if first.name.endswith(".index.json") else {}
        shards = sorted(set(listed.values())) or [first.name]
        files: dict[str, TensorFile] = {}
        for shard in shards:
            file = TensorFile(path / shard)
            files |= dict.fromkeys(file.names(), file)
        return cls(path, config, files, listed)

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Raises InputError if it is missing, or holds NaN or infinity."""
        file = self._file(name)
        tensor = file.read(name)
        if (
            tensor.is_floating_point()
            and not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all()
        ):
            raise InputError(
                f"{file.path}: tensor '{name}' holds NaN or infinite values; "
                "such a model cannot be used. Get an intact checkpoint."
            )
        return tensor

    def _file(self, name: str) -> TensorFile:
        if name not in self.files:
            raise InputError(
                f"{self.path} has no tensor '{name}', which its config.json calls for. Copy it again."
            )
        return self.files[name]

    def names(self) -> Iterator[str]:
        """All tensor names."""
        return iter(self.files)

    def shape(self, name: str) -> list[int]:
        """A tensor's shape, without reading its data."""
        return self._file(name).layout(name)[0]

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors spells it ("BF16")."""
        return self._file(name).layout(name)[1]

    @property
    def bytes_read(self) -> int:
        """Tensor bytes read so far."""
        return sum({f.path: f.bytes_read for f in self.files.values()}.values())


def weight_file(path: Path, config: Mapping[str, Any]) -> Path:
    """The file that the weights begin with: one safetensors file or an index of several.

    It is the file that config.json names as `transformers_weights`, else model.safetensors, else the index. Raises
    InputError, with what is there instead, where none of them exists.
    """
    if (path / "adapter_config.json").exists():
        raise InputError(
            f"{path} holds an adapter (adapter_config.json), which dpllm does not apply. Merge it into the model first."
        )
    named = config.get("transformers_weights")
    if named is not None:
        beside = isinstance(named, str) and Path(named).name == named
        if not beside or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise InputError(
                f"{path / 'config.json'}: transformers_weights is {named!r}, which is not the name of a safetensors "
                "file or index beside it. Mend the field."
            )
        return path / named
    for name in (SINGLE, INDEX):
        if (path / name).is_file():
            return path / name
    for name in (SINGLE, INDEX):
        if (path / name).is_symlink():
            raise InputError(f"{path / name} {_absence(path / name)}. Copy the model again.")
    if others := sorted(p.name for p in path.glob("*.safetensors")):
        raise InputError(
            f"{path} holds {others[0]}, but neither {SINGLE} nor {INDEX}, which says what belongs together. Copy the "
            "model again."
        )
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        raise InputError(
            f"{path} holds pickled weights only, which can run code when opened. "
            "Convert them: transformers' save_pretrained writes safetensors."
        )
    raise InputError(f"{path} holds no *.safetensors. Give a Hugging Face model directory.")


def read_index(file: Path) -> dict[str, str]:
    """The shard of each tensor, as an index lists it. Raises InputError for an index that does not say so."""
    listed = read_json(file).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{file} has no 'weight_map' that lists tensors. Copy the model again.")
    for tensor, shard in listed.items():
        if not isinstance(shard, str) or not shard:
            raise InputError(
                f"{file} lists tensor '{tensor}' in {shard!r}, which is not the name of a file. Copy the model again."
            )
    return listed


def _absence(path: Path) -> str:
    """Says why a file is not there."""
    return f"is a link to {path.readlink()}, which does not exist" if path.is_symlink() else "is missing"


def _remedy(path: Path) -> str:
    """Says what to do about a file that is not safetensors."""
    with path.open("rb") as f:
        pointer = f.read(40).startswith(b"version https://git-lfs")
    return "It is a Git LFS pointer. Run: git lfs pull" if pointer else "Copy it again."
