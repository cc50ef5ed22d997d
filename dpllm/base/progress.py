"""How long-running work reports what it has done."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (stage, steps done, steps in all)


def no_progress(stage: str, done: int, total: int) -> None:
    """Reports nothing: the default of functions that take a `Progress`."""
