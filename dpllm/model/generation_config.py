"""The end tokens and the suggested sampling options of a model, from its generation_config.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dpllm.base.errors import InputError
from dpllm.quant.source import read_json

NAME = "generation_config.json"
# Sampling options that the file may suggest, and the value of each that changes nothing in dpllm.
SAMPLING: dict[str, float] = {
    "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
}  # fmt: skip


def read_generation_config(path: Path) -> dict[str, Any]:
    """The object in path/generation_config.json; an empty one without that file. Raises InputError for other JSON."""
    return read_json(path / NAME) if (path / NAME).is_file() else {}


def end_tokens(path: Path, usual: Any) -> tuple[int, ...]:
    """The tokens that end a text: those of generation_config.json, or else `usual`, those of config.json.

    Either file names an id, a list of ids, or nothing. Raises InputError for anything else.
    """
    found, name = read_generation_config(path).get("eos_token_id"), NAME
    if found is None:
        found, name = usual, "config.json"
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(
            f"{path / name}: eos_token_id is {found!r}. It must be a token id, or a list of them. Correct the file."
        )
    return tuple(dict.fromkeys(ids))


def suggested_sampling(path: Path) -> dict[str, float]:
    """The sampling options that generation_config.json suggests, without those that change nothing in dpllm.

    A model whose file says `do_sample: false` suggests greedy decoding: then only the repetition penalty counts.
    """
    given = read_generation_config(path)
    names = ["repetition_penalty"] if given.get("do_sample") is False else list(SAMPLING)
    numbers = {
        n: given[n] for n in names if isinstance(given.get(n), int | float) and not isinstance(given[n], bool)
    }
    return {n: v for n, v in numbers.items() if math.isfinite(v) and v != SAMPLING[n]}
