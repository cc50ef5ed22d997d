"""How long work reports what it has done so far."""

from __future__ import annotations

from collections.abc import Callable

# Called with (stage, done, total): the name of the stage, and how many of its parts are finished.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Ignores the report: the default where nobody watches."""
