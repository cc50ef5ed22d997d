"""Commands that are printed for people, as a shell reads them."""

from __future__ import annotations

import shlex


def command_line(*words: object) -> str:
    """A `dpllm` command that a shell takes apart into these words; None is left out."""
    return shlex.join(["dpllm", *(str(w) for w in words if w is not None)])
