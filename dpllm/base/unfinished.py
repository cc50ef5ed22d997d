"""Folders that keep the finished parts of a long job, so that the job continues after a kill.

Such a folder belongs to one job: what `.job/job.json` in it describes. Another job never deletes it without being told
to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpllm.base.errors import InputError
from dpllm.base.files import write_text
from dpllm.base.places import LEFT_OVER

Job = Mapping[str, Any]  # a JSON object whose values are JSON


class UnfinishedWork:
    """The folder `NAME.partial` beside a place, and the job that it belongs to. The caller holds the place's lock.

    folder: where finished parts go. state: a folder in it for files that only the unfinished job needs.
    """

    def __init__(self, place: Path):
        self.folder = place.parent / (place.name + ".partial")
        self.state = self.folder / ".job"
        self._job = self.state / "job.json"

    def begin(self, job: Job, *, restart: bool = False) -> None:
        """Makes the folder, or continues the one of the same job.

        restart: delete the work of any other job. Raises InputError where the folder holds the work of another job,
        and where something that is not unfinished work has its name.
        """
        job = json.loads(json.dumps(job))
        self._check_ours()
        finished = any(self.folder.rglob("*.safetensors"))  # without one, nothing is lost
        if self._job.exists() and finished and not restart:
            self._check_same(job)
            for leftover in self.folder.rglob("*" + LEFT_OVER):
                leftover.unlink()
            return
        self.remove()
        self.state.mkdir(parents=True)
        write_text(self._job, json.dumps(job))

    def held_bytes(self) -> int:
        """Bytes of all files in the folder."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())

    def remove(self) -> None:
        """Deletes the folder: first the job's description, so that a kill on the way leaves no job with holes."""
        if not self.folder.exists():
            return
        self._job.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir() and path != self.state:
                shutil.rmtree(path)
            elif not path.is_dir():
                path.unlink()
        shutil.rmtree(self.state, ignore_errors=True)
        self.folder.rmdir()

    def _check_ours(self) -> None:
        """Raises InputError for a file, a link, or a folder with other things in it."""
        ours = self.state.is_dir() or (self.folder.is_dir() and not any(self.folder.iterdir()))
        if self.folder.is_symlink() or (self.folder.exists() and not ours):
            raise InputError(
                f"{self.folder} is in the way: unfinished work would go there, and it is something else. "
                "Move it, or choose another place."
            )

    def _check_same(self, job: Job) -> None:
        try:
            found = json.loads(self._job.read_text("utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it is not an object")
        except (OSError, ValueError) as e:
            raise InputError(
                f"{self.folder} holds unfinished work whose description is damaged ({self._job}: {e}). "
                "Give --restart to delete this work and begin again, or choose another place."
            ) from None
        if found != job:
            raise InputError(
                f"{self.folder} holds the unfinished work of another job: {_difference(found, job)}. Give the old "
                "options to continue it, --restart to delete it and begin again, or another place."
            )


def _difference(old: Job, new: Job) -> str:
    """The values that differ, as people read them: 'samples was 64 and is 32'."""
    parts: list[str] = []
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict) and key == "options":
            parts.append(_difference(was, now))
        elif all(
            v is None or (isinstance(v, (str, int, float, list)) and len(str(v)) < 24) for v in (was, now)
        ):
            parts.append(f"{key.replace('_', ' ')} was {_value(was)} and is {_value(now)}")
        else:
            parts.append(f"{key.replace('_', ' ')} {'differ' if key.endswith('s') else 'differs'}")
    return ", ".join(parts)


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)
