"""Finds the directory of a model that is given as a directory, a GGUF file or a hub id."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dpllm.base.errors import InputError
from dpllm.quant.gguf.folder import gguf_folder
from dpllm.quant.gguf.header import is_gguf

HUB_ID = r"[\w.-]+/[\w.-]+"
CHECKPOINT = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")


def resolve_model(model: str, tell: Callable[[str], None] = lambda line: None) -> Path:
    """The directory of a model, given as a directory, a GGUF file, a hub id ('owner/name') or a GGUF file of a hub id
    ('owner/name/file.gguf').

    A hub id is looked up in the local Hugging Face cache, and else downloaded. tell: told what takes a while. Raises
    InputError if there is no such directory or file and the hub does not provide the model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if is_gguf(path):
        return gguf_folder(path, tell)
    if path.exists():
        raise InputError(
            f"{path} is a file; give the model's directory (config.json, *.safetensors) or a GGUF file."
        )
    if re.fullmatch(HUB_ID, model) and path.suffix != ".gguf":
        return _snapshot(model, model, CHECKPOINT)
    if named := re.fullmatch(rf"({HUB_ID})/(.+\.gguf)", model):
        hub_id, file = named.groups()
        parts = re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"-*\1", file)  # all files of a split model
        found = _snapshot(model, hub_id, (parts,)) / file
        if not found.is_file():
            raise InputError(f"'{hub_id}' on the hub has no file '{file}'. Check the name.")
        return gguf_folder(found, tell)
    if path.suffix == ".gguf":
        raise InputError(f"{path} does not exist. Check the path.")
    raise InputError(f"'{model}' is not a directory, and not a hub id ('owner/name') either. Check the path.")


def _snapshot(model: str, hub_id: str, wanted: Sequence[str]) -> Path:
    """The folder in the hub's cache with the files of `hub_id` that match `wanted`. model: as the user gave it."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(wanted)))
    except (
        Exception
    ) as e:  # the hub library raises many kinds, and each means that the model is not available
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(
            f"'{model}' is not here, and could not be downloaded from the hub ({reason[:160]}). "
            "Check the name and the connection, or give a local directory."
        ) from None
