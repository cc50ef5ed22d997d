"""From tokens to text, as soon as it is final."""

from __future__ import annotations

from typing import Any


class TextStream:
    """Text that is decoded but not final: an unfinished character, or the start of a stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.sent = ""
        self.stopped = False

    def push(self, token: int | None, last: bool) -> str:
        """Adds a token (None: end of text) and returns what became final."""
        if token is not None:
            self.tokens.append(token)
        full = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        cut = min(
            (i for s in self.stop if (i := full.find(s, max(0, len(self.sent) - len(s)))) >= 0), default=-1
        )
        if cut >= 0:
            self.stopped = True
            full = full[:cut]
        elif not last:
            full = full[: len(full) - self._held_back(full)]
        text = full[len(self.sent) :]
        self.sent += text
        return text

    def _held_back(self, full: str) -> int:
        whole = full.rstrip("\ufffd")  # behind it, a character whose bytes are not all there yet
        starts = (
            n for s in self.stop for n in range(min(len(s) - 1, len(whole)), 0, -1) if whole.endswith(s[:n])
        )
        return len(full) - len(whole) + max(starts, default=0)
