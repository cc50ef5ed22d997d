"""From tokens to text, as soon as it is final."""

from __future__ import annotations

from typing import Any

# Tokens that are decoded together: what a token reads depends on its neighbours, but not on all of a long text.
LEAD, WINDOW = 8, 64


class TextStream:
    """Text that is decoded but not final: an unfinished character, or the start of a stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._tokens: list[int] = []  # the last ones
        self._sent = 0  # characters of theirs that were handed out

    def push(self, token: int | None, last: bool) -> str:
        """Adds a token (None: end of text) and returns what became final."""
        if token is not None:
            self._tokens.append(token)
        full = str(self.tokenizer.decode(self._tokens, skip_special_tokens=True))
        held = self.stop or full.endswith("\ufffd")
        end = self._end(full, last) if held else max(self._sent, len(full))
        text, self._sent = full[self._sent : end], end
        if end == len(full) and len(self._tokens) >= WINDOW:
            self._forget()
        return text

    def _end(self, full: str, last: bool) -> int:
        """Where the final text ends: before a stop string, what may begin one, or an unfinished character."""
        # Nothing that was handed out began a stop string.
        cut = min((i for s in self.stop if (i := full.find(s, self._sent)) >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            return cut
        return max(self._sent, len(full) - (0 if last else self._held_back(full)))

    def _forget(self) -> None:
        """Keeps the last few tokens, from where a character begins."""
        for n in range(LEAD, len(self._tokens)):
            lead = self._decode(self._tokens[-n:])
            if lead and not lead.startswith("\ufffd"):
                self._tokens, self._sent = self._tokens[-n:], len(lead)
                return

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _held_back(self, full: str) -> int:
        whole = full.rstrip("\ufffd")  # what follows is a character whose bytes are not all there yet
        starts = (
            n for s in self.stop for n in range(min(len(s) - 1, len(whole)), 0, -1) if whole.endswith(s[:n])
        )
        return len(full) - len(whole) + max(starts, default=0)
