"""Reads a Hugging Face model directory: config and tensors by name. Nothing is unpickled."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dpllm.base.errors import InputError
from dpllm.base.places import check_readable

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
            raise InputError(f"{path} is missing. Copy the model again.") from None
        except (SafetensorError, OSError) as e:
            raise InputError(f"{path} is damaged or not a safetensors file ({e}). Copy it again.") from None

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


def resolve_model(model: str) -> Path:
    """The directory of a model, given as a directory or as a hub id ('owner/name').

    A hub id is looked up in the local Hugging Face cache, and else downloaded. Raises InputError if there is no such
    directory and the hub does not provide the model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path} is a file; give the model's directory (config.json, *.safetensors).")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise InputError(
            f"'{model}' is not a directory, and not a hub id ('owner/name') either. Check the path."
        )
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (
        Exception
    ) as e:  # the hub library raises many kinds of errors, and each means that the model is not available
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(
            f"'{model}' is not a directory, and could not be downloaded from the hub ({reason[:160]}). "
            "Check the name and the connection, or give a local directory."
        ) from None


@dataclass
class ModelSource:
    """A checkpoint directory: `config` as JSON, tensors by name over all shards."""

    path: Path
    config: dict[str, Any]
    files: dict[str, TensorFile] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> ModelSource:
        """Opens config and shards. Raises InputError for pickled weights, and for shards that differ from the index."""
        config = read_json(path / "config.json")
        if (path / INDEX).exists():
            weight_map = read_json(path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError(f"{path / INDEX} has no 'weight_map'. Copy the model again.")
            shards = {name: TensorFile(path / name) for name in sorted(set(weight_map.values()))}
            files = {}
            for tensor, shard in weight_map.items():
                files[tensor] = shards[shard]
            for name, shard in shards.items():
                listed = {t for t, s in weight_map.items() if s == name}
                if odd := listed.symmetric_difference(shard.names()):
                    raise InputError(
                        f"{shard.path} and its index disagree about {min(odd)!r}. Copy the model again."
                    )
            return cls(path, config, files)
        if (path / "model.safetensors").exists():
            single = TensorFile(path / "model.safetensors")
            return cls(path, config, dict.fromkeys(single.names(), single))
        if any(path.glob("*.bin")) or any(path.glob("*.pt")):
            raise InputError(
                f"{path} holds pickled weights only, which can run code when opened. "
                "Convert them: transformers' save_pretrained writes safetensors."
            )
        raise InputError(f"{path} holds no *.safetensors. Give a Hugging Face model directory.")

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Raises InputError if it is missing, or holds NaN or infinity."""
        file = self._file(name)
        tensor = file.read(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
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
