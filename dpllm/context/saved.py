"""Saves a pruned context to a directory and loads it again: pairs in safetensors, everything else in JSON.

    context.json        format, the model it belongs to, tokens, how it was made, sha256 of the pairs
    pairs.safetensors   k.LAYER, v.LAYER [pairs, D]: head after head; positions.LAYER int32; lengths, kept [layers,
    KVH]; ids

The files are written to a sibling directory, which is renamed when it is complete, so a reader sees a whole context
or none.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.base.files import flush_folder, write_tensors, write_text
from dpllm.base.places import check_readable, check_space, folder_to_make, temporary_name
from dpllm.base.shell import command_line
from dpllm.kvzip_bridge.ragged_cache import RaggedKVCache
from dpllm.model.decoder import Decoder
from dpllm.model.loading import is_overlay
from dpllm.quant.gguf.model import GGUF_LINK
from dpllm.quant.overlay import Overlay
from dpllm.quant.source import ModelSource, read_json
from dpllm.version import __version__

FORMAT, FORMAT_VERSION = "dpllm-context", 1
MANIFEST, PAIRS = "context.json", "pairs.safetensors"
KEYS: dict[str, Any] = {
    "model": dict, "tokens": int, "base": int, "protected": int, "kept_ratio": (int, float), "nbytes": int,
    "chat": dict, "pending": list, "made": dict, "sha256": str,
}  # fmt: skip
SAMPLE = 1024  # bytes at the beginning and in the middle of each tensor that enter a checkpoint's hash


class Savable(Protocol):
    """The fields of a context that are saved: see KVContext."""

    cache: RaggedKVCache
    ids: list[int]
    protected: int
    behind: str
    between: str
    pending: list[int]
    facts: dict[str, Any]

    @property
    def kept_ratio(self) -> float:
        """Pairs held over pairs read, all layers and heads."""
        ...


def is_context(path: Path) -> bool:
    """Tells whether this directory holds a saved context."""
    return (path / MANIFEST).is_file()


def model_hash(path: Path) -> str:
    """Returns the hash, in hexadecimal, of the model that a context is bound to.

    It is an overlay's own hash. A plain checkpoint's covers its config and a sample of every tensor, because reading
    every byte would take as long as loading."""
    if is_overlay(path):
        return Overlay.open(path).hash
    digest = hashlib.sha256((path / "config.json").read_bytes())
    if (path / GGUF_LINK).is_file():
        digest.update(read_json(path / GGUF_LINK)["sha256"].encode())
        return digest.hexdigest()
    for file in sorted({f.path for f in ModelSource.open(path).files.values()}):
        with file.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = f.read(size)
            digest.update(file.name.encode() + header)
            for name, entry in sorted(json.loads(header).items()):
                begin, end = (0, 0) if name == "__metadata__" else entry["data_offsets"]
                for at in (begin, (begin + end) // 2):
                    f.seek(8 + size + at)
                    digest.update(f.read(min(SAMPLE, end - at)))
    return digest.hexdigest()


def place_for(path: Path) -> Path:
    """The directory that a context will be written to: `path`, or the empty directory that a link leads to.

    Makes the directories above it. Raises InputError where it exists already or cannot be made."""
    try:
        if not path.is_symlink():
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{path} cannot be made: {e.strerror or e}. Choose another place.") from None
    return folder_to_make(path)


def save_context(context: Savable, path: Path, *, model: Path) -> dict[str, Any]:
    """Writes the context and returns its manifest.

    path: the new directory. model: the directory of the model that read the context. Raises InputError where the
    context cannot be written; no file is left then."""
    target = place_for(path)
    partial = temporary_name(target)
    try:
        partial.mkdir()
        check_space(partial, context.cache.nbytes)
        write_tensors(partial / PAIRS, _tensors(context))
        manifest = _manifest(context, model) | {"sha256": _sha256(partial / PAIRS)}
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        partial.replace(target)
        flush_folder(target.parent)
    except OSError as e:
        raise InputError(
            f"{path} cannot be written: {e.strerror or e}. Free space or choose another place."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads and checks the manifest of a saved context. Raises InputError for anything else."""
    if not is_context(path):
        raise InputError(
            f"{path} is not a saved context: it has no {MANIFEST}. "
            f"Make one: {command_line('context', 'build', 'FILE', '-o', path)}"
        )
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path / MANIFEST} is not in the format '{FORMAT}' but '{manifest.get('format')}'.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path / MANIFEST}: format version {manifest.get('format_version')}; this dpllm reads {FORMAT_VERSION}. "
            "Build the context again, or use the dpllm that wrote it."
        )
    wrong = [key for key, kind in KEYS.items() if not isinstance(manifest.get(key), kind)]
    wrong += [f"model.{key}" for key in ("path", "sha256") if not _holds(manifest.get("model"), key)]
    wrong += [f"chat.{key}" for key in ("behind", "between") if not _holds(manifest.get("chat"), key)]
    if wrong:
        raise InputError(
            f"{path / MANIFEST}: '{wrong[0]}' is missing or has the wrong type. Build the context again."
        )
    return manifest


def _holds(part: Any, key: str) -> bool:
    return isinstance(part, dict) and isinstance(part.get(key), str)


def load_context(path: Path, *, decoder: Decoder, model: Path) -> dict[str, Any]:
    """Loads the fields of a saved context for the model that read it.

    decoder: the loaded model; the cache takes its dtype and device. model: the model's directory. Raises InputError
    for another model, another format, or a damaged file.
    """
    manifest = read_manifest(path)
    made_with, found = manifest["model"], model_hash(model)
    if made_with["sha256"] != found:
        raise InputError(
            f"{path} was made with another model (hash {made_with['sha256'][:12]}) than {model} (hash {found[:12]}). "
            f"{_remedy(Path(made_with['path']), model)}"
        )
    tensors = _read(path / PAIRS, manifest)
    _check(path / PAIRS, tensors, manifest, decoder)
    cache = RaggedKVCache.of_runs(
        [tensors[f"k.{i}"] for i in range(len(tensors["lengths"]))],
        [tensors[f"v.{i}"] for i in range(len(tensors["lengths"]))],
        tensors["lengths"], _by_head(tensors), int(manifest["base"]), int(manifest["tokens"]),
    )  # fmt: skip
    if not all(torch.isfinite(t).all() for t in (*cache.k, *cache.v)):
        raise InputError(f"{path} holds keys or values that are not finite. Build the context again.")
    cache = cache.to(decoder.kv_dtype, decoder.device)
    frame = manifest["chat"]
    return {
        "cache": cache, "ids": tensors["ids"].tolist(), "protected": manifest["protected"], "behind": frame["behind"],
        "between": frame["between"], "pending": manifest["pending"], "facts": manifest["made"],
    }  # fmt: skip


def _remedy(made_with: Path, model: Path) -> str:
    """Advice for a context of another model. made_with: the directory of the model that read the context."""
    if made_with.absolute() == model.absolute():
        return "The model there has changed since. Build the context again."
    words = shlex.join(["--overlay", str(made_with)])
    if made_with.exists():
        return f"Give {words}, or build the context again."
    return f"The context was made with {words}, which is not there now. Give its new place, or build the context again."


def _tensors(context: Savable) -> dict[str, Tensor]:
    cache = context.cache
    tensors = {"ids": torch.tensor(context.ids, dtype=torch.int64), "lengths": cache.lengths}
    tensors["kept"] = torch.tensor([[len(p) for p in heads] for heads in cache.kept], dtype=torch.int32)
    for layer, heads in enumerate(cache.kept):
        k, v = zip(*(cache.run(layer, h) for h in range(len(heads))), strict=True)
        tensors |= {
            f"k.{layer}": torch.cat(k),
            f"v.{layer}": torch.cat(v),
            f"positions.{layer}": torch.cat(heads),
        }
    return {name: t.cpu() for name, t in tensors.items()}


def _by_head(tensors: dict[str, Tensor]) -> list[list[Tensor]]:
    sizes = tensors["kept"].tolist()
    return [list(tensors[f"positions.{layer}"].split(counts)) for layer, counts in enumerate(sizes)]


def _manifest(context: Savable, model: Path) -> dict[str, Any]:
    cache = context.cache
    return {
        "format": FORMAT, "format_version": FORMAT_VERSION, "dpllm": __version__,
        "model": {"path": str(model.absolute()), "sha256": model_hash(model)},
        "tokens": cache.length, "base": cache.base, "protected": context.protected,
        "kept_ratio": round(context.kept_ratio, 6), "nbytes": cache.nbytes,
        "chat": {"behind": context.behind, "between": context.between}, "pending": context.pending,
        "made": context.facts,
    }  # fmt: skip


def _read(path: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path} is missing. Build the context again.")
    check_readable(path)
    if _sha256(path) != manifest["sha256"]:
        raise InputError(
            f"{path} is damaged: its sha256 is not the one in {MANIFEST}. Build the context again."
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path} cannot be read: {e}. Build the context again.") from None


def _check(path: Path, tensors: dict[str, Tensor], manifest: dict[str, Any], decoder: Decoder) -> None:
    """Compares every size with every other, because later code trusts them."""
    c = decoder.config
    try:
        lengths, kept, tail = tensors["lengths"], tensors["kept"], manifest["tokens"] - manifest["base"]
        fits = lengths.shape == (c.num_layers, c.num_kv_heads) and torch.equal(lengths, kept + tail)
        ids = [*tensors["ids"].tolist(), *manifest["pending"]]
        fits = fits and len(tensors["ids"]) == manifest["tokens"] and int(kept.min()) >= 0
        fits = fits and 0 <= manifest["protected"] <= manifest["base"] <= manifest["tokens"]
        fits = fits and all(isinstance(i, int) and 0 <= i < c.vocab_size for i in ids)
        for layer, (held, pruned) in enumerate(
            zip(lengths.sum(1).tolist(), kept.sum(1).tolist(), strict=True)
        ):
            shape = (held, c.head_dim)
            fits = fits and tensors[f"k.{layer}"].shape == tensors[f"v.{layer}"].shape == shape
            fits = fits and tensors[f"positions.{layer}"].shape == (pruned,)
    except (KeyError, TypeError, RuntimeError, ValueError):
        fits = False
    if not fits:
        raise InputError(f"{path}: its tensors do not fit together. Build the context again.")


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
