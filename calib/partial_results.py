"""Finished parts of a calibration, kept in a folder beside the future profile until the profile is on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dpllm.base.files import write_tensors
from dpllm.base.places import check_space
from dpllm.base.unfinished import UnfinishedWork

Arrays = Mapping[str, np.ndarray]


class PartialResults:
    """Named arrays of finished stages. A killed calibration takes them from here instead of computing them again.

    place: the future profile, beside which the folder `PROFILE.partial` lies; None keeps nothing on disk. The caller
    holds the lock of the place.
    """

    def __init__(self, place: Path | None = None):
        self._work = None if place is None else UnfinishedWork(place)

    def begin(self, job: Mapping[str, Any], needed: int, *, restart: bool = False) -> None:
        """Continues what an earlier run with the same job (a JSON object) stored, or begins.

        needed: bytes that all parts will take. restart: delete the work of any other job. Raises InputError where the
        work of another job is there, and where the disk is too small.
        """
        if self._work is not None:
            check_space(self._work.folder.parent, needed, self._work.held_bytes())
            self._work.begin(job, restart=restart)

    def keep(self, stage: str, of: Any, compute: Callable[[], Arrays]) -> Arrays:
        """The stored arrays of a part, or those that `compute` returns now, which are stored.

        stage: its name. of: a JSON value that tells the parts of a stage apart, and names all that the arrays depend
        on beside the job.
        """
        if self._work is None:
            return compute()
        digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
        path = self._work.folder / f"{stage}-{digest}.safetensors"
        try:
            return load_file(path)
        except (FileNotFoundError, SafetensorError):  # not computed yet, or damaged
            found = compute()
        write_tensors(path, {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in found.items()})
        return found

    def remove(self) -> None:
        """Deletes the folder, after the profile is on disk."""
        if self._work is not None:
            self._work.remove()
