"""Reads values of a GGUF file's metadata, each checked for its type and its range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpllm.base.errors import InputError


@dataclass(frozen=True)
class Metadata:
    """The metadata of a file. Every method raises InputError for a value of another type or outside its range.

    A method's `default` is returned where the key is missing; without a default, a missing key is an error.
    """

    path: Path
    values: Mapping[str, Any]

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        return self._get(key, default, lambda v: isinstance(v, str), "a text")

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        return self._get(key, default, lambda v: isinstance(v, bool), "true or false")

    def whole(self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number from `least` to `most`. A list of equal numbers, one for each layer, counts as one number."""
        value = self.values.get(key)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        elif isinstance(value, list):
            self._refuse(key, "one number for all layers")
        found = default if value is None else value
        return self._check(
            key,
            found,
            lambda v: type(v) is int and least <= v <= most,
            f"a whole number from {least} to {most}",
        )

    def real(self, key: str, default: float | None = None) -> float:
        """A positive finite number, as the shortest decimal that gives the stored float32."""
        ok = lambda v: type(v) in (int, float) and math.isfinite(v) and v > 0  # noqa: E731
        return float(str(np.float32(self._get(key, default, ok, "a positive finite number"))))

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        return self._get(key, None, _list_of(str), "a list of texts")

    def numbers(self, key: str, default: list[Any] | None = None) -> list[Any]:
        """A list of numbers."""
        return self._get(key, default, _list_of(int, float), "a list of numbers")

    def _get(self, key: str, default: Any, ok: Any, what: str) -> Any:
        return self._check(key, self.values.get(key, default), ok, what)

    def _check(self, key: str, value: Any, ok: Any, what: str) -> Any:
        if value is None:
            raise InputError(f"{self.path} has no metadata '{key}', which it needs. Get another conversion.")
        if not ok(value):
            self._refuse(key, what)
        return value

    def _refuse(self, key: str, what: str) -> None:
        shown = repr(self.values.get(key))
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise InputError(f"{self.path}: metadata '{key}' is {shown}, not {what}. Get another conversion.")


def _list_of(*kinds: type) -> Any:
    return lambda value: isinstance(value, list) and all(type(v) in kinds for v in value)
