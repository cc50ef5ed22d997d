"""Finds the directory of a model that is given as a directory, a GGUF file or a hub id."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from dpllm.base.errors import InputError
from dpllm.quant.gguf.folder import gguf_folder
from dpllm.quant.gguf.header import is_gguf


def resolve_model(model: str, tell: Callable[[str], None] = lambda line: None) -> Path:
    """The directory of a model, given as a directory, a GGUF file or a hub id ('owner/name').

    A hub id is looked up in the local Hugging Face cache, and else downloaded. tell: told what takes a while. Raises
    InputError if there is no such directory or file and the hub does not provide the model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if is_gguf(path):
        return gguf_folder(path, tell)
    if path.suffix == ".gguf" and not path.exists():
        raise InputError(f"{path} does not exist. Check the path.")
    if path.exists():
        raise InputError(
            f"{path} is a file; give the model's directory (config.json, *.safetensors) or a GGUF file."
        )
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
