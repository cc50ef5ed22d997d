"""Models the time of a decode step as a table of measured points."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpllm.base.errors import InputError
from dpllm.base.files import write_text
from dpllm.base.json_text import strict_json
from dpllm.base.places import check_readable

VERSION = 3


@dataclass(frozen=True)
class CostModel:
    """The time of a decode step, in milliseconds.

    device, overlay_hash, resident_bits: the device, overlay and mean resident width it was measured with. bits,
    weights_ms: the time of a step at these effective bits with an empty cache. pairs, attention_ms: the time that this
    number of pairs in the cache adds, over all layers and heads; both begin with 0. plane_ms: the time that each plane
    beyond the seed width adds if every matrix reads it. other_ms: the time of a token beside its step: drawing the
    likeliest token, text, and Python.
    """

    device: str
    overlay_hash: str
    resident_bits: float
    bits: tuple[float, ...]
    weights_ms: tuple[float, ...]
    pairs: tuple[float, ...]
    attention_ms: tuple[float, ...]
    plane_ms: tuple[float, ...]
    other_ms: float = 0.0

    def step_ms(self, bits: float, pairs: float = 0.0) -> float:
        """Returns the time of a step, in ms, at these effective bits with `pairs` pairs in the cache."""
        return float(np.interp(bits, self.bits, self.weights_ms)) + self.kv_ms(pairs)

    def token_ms(self, bits: float, pairs: float = 0.0) -> float:
        """Returns the time of a token, in ms: of its step, and of all that happens beside it."""
        return self.step_ms(bits, pairs) + self.other_ms

    def kv_ms(self, pairs: float) -> float:
        """Returns the time, in ms, that attention to `pairs` pairs adds.

        Beyond the largest measured cache, the last straight line is continued.
        """
        last, before = self.pairs[-1], self.pairs[-2]
        if pairs <= last:
            return float(np.interp(pairs, self.pairs, self.attention_ms))
        slope = (self.attention_ms[-1] - self.attention_ms[-2]) / (last - before)
        return self.attention_ms[-1] + slope * (pairs - last)

    def bits_for(self, ms: float, pairs: float = 0.0) -> float:
        """Returns the most effective bits whose step takes at most `ms`, or the fewest if every step takes longer."""
        left = ms - self.kv_ms(pairs)
        return float(np.interp(left, self.weights_ms, self.bits))

    def check(self, ms: float, pairs: float = 0.0, least_bits: float = 0.0) -> None:
        """Raises InputError if a token takes longer than `ms` even at the fewest bits, or at `least_bits`."""
        low = max(self.bits[0], least_bits)
        fastest = self.token_ms(low, pairs)
        if not ms >= fastest:
            bound = " at this quality" if least_bits else ""
            raise InputError(
                f"{ms:g} ms per token cannot be kept{bound}: the fastest here is {fastest:.3g} ms ({low:.2f} bits). "
                f"Ask for {fastest * 1.05:.3g} or more; dpllm plan lists other ways."
            )

    def save(self, path: Path) -> None:
        """Writes the model as JSON, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, strict_json({"cost_version": VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """Reads a stored model. Raises InputError if the file is not a cost profile."""
        check_readable(path)
        try:
            stored = json.loads(path.read_text())
            version = stored.pop("cost_version")
            if version != VERSION:
                raise ValueError(f"version {version}, this dpllm reads {VERSION}")
            lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
            found = cls(**lists)
            found._check()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise InputError(
                f"{path} is not a cost profile ({e}). Run: dpllm profile --overlay OVERLAY"
            ) from None
        return found

    def _check(self) -> None:
        for xs, ys in ((self.bits, self.weights_ms), (self.pairs, self.attention_ms)):
            if not (len(xs) == len(ys) >= 2 and all(map(np.isfinite, (*xs, *ys)))):
                raise ValueError("its tables are incomplete")
            if sorted(set(xs)) != list(xs) or sorted(ys) != list(ys):
                raise ValueError("its tables do not ascend")
        if not self.plane_ms or not all(np.isfinite(ms) and ms >= 0 for ms in self.plane_ms):
            raise ValueError("the times of its planes are missing or negative")
        if not (np.isfinite(self.other_ms) and self.other_ms >= 0):
            raise ValueError("the time beside the step is negative or not a number")
