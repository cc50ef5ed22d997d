"""The dpllm command run in the process of the tests, what a refusal looks like, and files to damage."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from dpllm.quant.source import INDEX

# Options that keep quantising and calibrating short.
FAST = ("--fisher", "none", "--jobs", "1")
SMALL = ("--samples", "2", "--sequence-length", "32")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out.splitlines()[-1])


def complaint(result: Result, alone: bool) -> str:
    """The one line of a refusal; with `alone`, nothing else was said before it."""
    lines = result.err.splitlines()
    assert result.code == 2, result
    assert result.out == ""
    assert lines[-1].startswith("dpllm: ") and len(lines[-1]) > 20
    assert [line for line in lines if "dpllm: " in line] == lines[-1:]
    assert "Traceback" not in result.err
    assert len(lines) == 1 or not alone, lines
    return lines[-1]


def contents(folder: Path) -> dict[str, str]:
    """Every file below with the hash of its bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard_of(overlay: Path, tensor: str) -> tuple[Path, int]:
    """(file, offset of the tensor's first byte)."""
    path = overlay / json.loads((overlay / INDEX).read_text())["weight_map"][tensor]
    with path.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        return path, 8 + size + json.loads(f.read(size))[tensor]["data_offsets"][0]


def flip(overlay: Path, tensor: str) -> None:
    path, at = shard_of(overlay, tensor)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
