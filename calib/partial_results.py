"""Unfinished calibrations: arrays in one file beside the profile to be, so that a killed run goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from dpllm.base.files import write_tensors


class Partial:
    """A growing set of named arrays on disk, bound to the options of one calibration.

    path None keeps everything in memory. A file that is damaged, or of other options, is started anew.
    """

    def __init__(self, path: Path | None):
        self.path, self.key = path, ""
        self.arrays: dict[str, np.ndarray] = {}

    def open(self, key: Any) -> None:
        """Takes up what an earlier run of the same key left."""
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.arrays = {}
        if self.path is None or not self.path.is_file():
            return
        with contextlib.suppress(SafetensorError, OSError), safe_open(self.path, framework="np") as f:
            if (f.metadata() or {}).get("key") == self.key:
                self.arrays = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (no iterator)

    def has(self, names: list[str]) -> bool:
        """Whether all of these were kept."""
        return all(n in self.arrays for n in names)

    def __getitem__(self, name: str) -> np.ndarray:
        """A kept array."""
        return self.arrays[name]

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Keeps these too, atomically."""
        self.arrays |= arrays
        if self.path is not None:
            tensors = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in self.arrays.items()}
            write_tensors(self.path, tensors, {"key": self.key})

    def remove(self) -> None:
        """The calibration is done: deletes the file."""
        self.arrays = {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)
