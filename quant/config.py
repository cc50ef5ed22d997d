"""Reads a model's config.json as transformers does."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpllm.base.errors import InputError
from dpllm.quant.source import read_json

CONFIG = "config.json"
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# Fields with which transformers 5 builds another model than the rest of the file describes.
FOREIGN_FIELDS = {
    "per_layer_config": "gives layers different shapes",
    "configuration_files": "names other configuration files",
}


def read_config(path: Path) -> Any:
    """Returns transformers' configuration object of the model in a directory, with absent fields filled in.

    Nothing in the directory is executed. Raises InputError for a model type that dpllm does not run, and for a file
    that transformers does not accept.
    """
    file = path / CONFIG
    fields = read_json(file)
    if fields.get("model_type") not in SUPPORTED:
        raise InputError(
            f"{file}: model type {fields.get('model_type')!r} is not supported. dpllm runs: {', '.join(SUPPORTED)} "
            "(SmolLM and SmolLM2 are 'llama')."
        )
    for field, effect in FOREIGN_FIELDS.items():
        if fields.get(field) is not None:
            raise InputError(f"{file}: '{field}' {effect}, which is not supported. Give another model.")
    from transformers import AutoConfig

    with refusing(file), contextlib.redirect_stdout(io.StringIO()):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


@contextlib.contextmanager
def refusing(file: Path) -> Iterator[None]:
    """Turns what transformers raises for a configuration file into one InputError line."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:  # transformers validates with many exception kinds
        said = f"{e} is missing" if isinstance(e, KeyError) else str(e)
        reason = " ".join(said.split())[:200] or type(e).__name__
        raise InputError(f"{file} is not valid: {reason}. Restore the file, or mend this field.") from None
