"""The text that a model is quantised and calibrated with."""

from __future__ import annotations

from pathlib import Path

from dpllm import reference
from dpllm.base.text import read_documents


def calibration_documents(data: str | Path | None) -> list[str]:
    """The documents of a .txt file, a .jsonl file or a directory of both. None: the bundled Python code.

    Raises InputError where there is no text.
    """
    return read_documents(reference.calibration_text() if data is None else Path(data).expanduser())
