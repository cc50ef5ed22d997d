"""The sampling options that a model suggests in its generation_config.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dpllm.quant.source import read_json

GENERATION_CONFIG = "generation_config.json"
# Sampling options that the file may suggest, and the value of each that changes nothing in dpllm.
SAMPLING: dict[str, float] = {
    "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
}  # fmt: skip


def read_generation_config(path: Path) -> dict[str, Any]:
    """The object in path/generation_config.json; an empty one without that file. Raises InputError for other JSON."""
    return read_json(path / GENERATION_CONFIG) if (path / GENERATION_CONFIG).is_file() else {}


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
