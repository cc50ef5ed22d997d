"""Makes a GGUF file look like a Hugging Face model directory.

The first time that a file is used, a folder in the user's cache receives config.json, the tokenizer's files, and
`gguf.json`, which says where the tensors are. No weight is copied. Everything else in dpllm reads that folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpllm.base.errors import InputError
from dpllm.base.files import write_text
from dpllm.base.text import load_tokenizer
from dpllm.quant.gguf.config import Described, describe
from dpllm.quant.gguf.metadata import Metadata
from dpllm.quant.gguf.model import GGUF_LINK, GgufModel
from dpllm.quant.gguf.tokenizer import make_tokenizer
from dpllm.quant.sanity import TOKENS, is_sane, is_sure, losses
from dpllm.quant.source import ModelSource

RECIPE = 1  # raised when the contents of folders change


def gguf_folder(path: Path, tell: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of a GGUF file, which is made and checked the first time.

    tell: told what takes a while. Raises InputError for a file that is damaged or not supported, and for a model whose
    loss on plain text is that of nonsense.
    """
    model = GgufModel.read(path)
    folder = _cache() / f"{path.stem}-{_key(model)}"
    if (folder / GGUF_LINK).is_file():
        return folder
    described = describe(model.header, model.tensors)
    files = make_tokenizer(Metadata(path, model.header.metadata), described.config["vocab_size"])
    tell(
        f"{path.name}: this is the first use, so the loss on {2 * TOKENS} tokens of plain text is computed as a check"
    )
    with _new_folder(folder) as partial:
        _write(partial / "config.json", described.config)
        _write(partial / "tokenizer.json", files.tokenizer)
        _write(partial / "tokenizer_config.json", files.config)
        permuted, found = _settle(model, described, partial)
        link = {
            "files": model.fingerprints(),
            "sha256": model.sha256(),
            "permuted": permuted,
            "losses": found,
        }
        _write(partial / GGUF_LINK, link)
    return folder


def _settle(model: GgufModel, described: Described, folder: Path) -> tuple[bool, list[float]]:
    """Whether the rows of queries and keys are permuted, and the losses on two texts with this order.

    Raises InputError where every order gives nonsense.
    """
    tokenizer, vocabulary = load_tokenizer(folder), described.config["vocab_size"]
    tried: dict[bool, list[float]] = {}
    for permuted in (True, False) if described.family.permuted else (False,):
        source = ModelSource(folder, described.config, model.readers(described, permuted=permuted))
        tried[permuted] = losses(source, tokenizer)
        if is_sure(tried[permuted], vocabulary):
            return permuted, tried[permuted]
    permuted, found = min(tried.items(), key=lambda item: sum(item[1]))
    if is_sane(found, vocabulary):
        return permuted, found
    raise InputError(
        f"{model.paths[0]}: the loss on plain text is {min(found):.1f} nats per token, where guessing has "
        f"{math.log(vocabulary):.1f}. The file is damaged, untrained, or not the kind of model that it says."
    )


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpllm" / "gguf"


def _key(model: GgufModel) -> str:
    return hashlib.sha256(json.dumps([RECIPE, model.fingerprints()]).encode()).hexdigest()[:12]


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that takes the place of `folder` when the block ends well, and is deleted otherwise."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name[:64]}.", dir=folder.parent))
    except OSError as e:
        raise InputError(
            f"{folder.parent} cannot be written ({e.strerror or e}). Set XDG_CACHE_HOME to another place."
        ) from None
    try:
        yield partial
        partial.chmod(0o755)
        with suppress(OSError):  # another process made it in the meantime
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
