"""Unfinished calibrations: one file next to the future profile, from which a killed run continues."""

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

    path: the file; None keeps everything in memory. A file that is damaged, or has other options, is ignored and
    then overwritten.
    """

    def __init__(self, path: Path | None):
        self.path, self.key = path, ""
        self.arrays: dict[str, np.ndarray] = {}

    def open(self, key: Any) -> None:
        """Loads what an earlier run with the same key (a JSON value) stored."""
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.arrays = {}
        if self.path is None or not self.path.is_file():
            return
        with contextlib.suppress(SafetensorError, OSError), safe_open(self.path, framework="np") as f:
            if (f.metadata() or {}).get("key") == self.key:
                self.arrays = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (no iterator)

    def has(self, names: list[str]) -> bool:
        """Whether all of these arrays are stored."""
        return all(n in self.arrays for n in names)

    def __getitem__(self, name: str) -> np.ndarray:
        """A stored array. Raises KeyError for an unknown name."""
        return self.arrays[name]

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Stores more arrays; the file is replaced atomically."""
        self.arrays |= arrays
        if self.path is not None:
            tensors = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in self.arrays.items()}
            write_tensors(self.path, tensors, {"key": self.key})

    def remove(self) -> None:
        """Deletes the file, after the calibration has finished."""
        self.arrays = {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)
