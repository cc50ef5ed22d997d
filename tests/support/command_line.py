"""The dpllm command run in the process of the tests, and what a refusal looks like."""

from __future__ import annotations

import json
from dataclasses import dataclass


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
