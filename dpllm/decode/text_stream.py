"""From tokens to text, as soon as it is final."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Tokens that are decoded together: what a token reads depends on its neighbours, but not on all of a long text.
LEAD, WINDOW = 8, 32
UNFINISHED = "\ufffd"  # stands for bytes that are not a character, or not yet
BYTES = [f"<0x{b:02X}>" for b in range(256)]  # tokens of one byte, as SentencePiece writes them
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # a token of one byte, as SentencePiece writes it
# What transformers' cleaning of spaces may still change: it joins " ." or " n't" to the word before.
JOINING = " 'nvr"
JOINABLE = re.compile(f" [{JOINING}]*\\Z")


class TextStream:
    """Text that is decoded but not final: an unfinished character, or the start of a stop string.

    The pieces that `push` returns add up to the decoded whole (prompt and tokens), without the characters of the
    decoded prompt.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], before: Sequence[int] = ()):
        """before: the tokens of the text that is continued. A decoder may treat the beginning of a text otherwise:
        SentencePiece's drops a space there."""
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        bytes_of = tokenizer.convert_tokens_to_ids(BYTES)
        self._has_bytes = any(i not in (None, tokenizer.unk_token_id) for i in bytes_of)
        self._plain = not (stop or self._cleans)
        self._special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._in_bytes = (
            False  # the last token is a byte: the next one may make the whole run of bytes invalid
        )
        self._tokens, self._sent = self._lead(list(before))  # the last tokens; their characters that are out

    def push(self, token: int | None, last: bool) -> str:
        """Adds a token (None: end of text) and returns what became final."""
        if token is not None:
            self._tokens.append(token)
            if self._has_bytes and (is_byte := self._is_byte(token)) is not None:
                self._in_bytes = is_byte
        if self._in_bytes and not last and not self.stop:
            return ""
        full: str = self.tokenizer.decode(self._tokens, skip_special_tokens=True)
        if self._plain and not (self._in_bytes or last):  # most tokens: only an unfinished character waits
            end = max(self._sent, len(full.rstrip(UNFINISHED)))
        else:
            end = self._end(full, last)
        text, self._sent = full[self._sent : end], end
        if end == len(full) and len(self._tokens) >= WINDOW:
            self._tokens, self._sent = self._lead(self._tokens)
        return text

    def _end(self, full: str, last: bool) -> int:
        """Where the final text ends: before a stop string, what may begin one, or what a further token may change."""
        # Nothing that was handed out began a stop string.
        cut = min((i for s in self.stop if (i := full.find(s, self._sent)) >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            return cut
        if self._in_bytes and not last:
            return self._sent
        return max(self._sent, len(full) if last else self._final(full))

    def _final(self, full: str) -> int:
        """The number of characters that no further token can change, and that do not begin a stop string."""
        whole = full.rstrip(UNFINISHED)  # after it, a character whose bytes are not all there yet
        joinable = JOINABLE.search(whole) if self._cleans else None
        fixed = whole[: joinable.start()] if joinable else whole
        begun = [
            len(text) - n
            for s in self.stop
            for text in {whole, fixed}
            for n in range(1, min(len(s), len(text) + 1))
            if text.endswith(s[:n])
        ]
        return min([len(fixed), *begun])

    def _lead(self, tokens: list[int]) -> tuple[list[int], int]:
        """The last few tokens, from where a character and its bytes begin, and the number of their characters."""
        n = LEAD
        while n < len(tokens):
            kept = tokens[-n:]
            text = self._decode(kept)
            settled = text.rstrip(JOINING) if self._cleans else text
            first = next((b for t in kept if (b := self._is_byte(t)) is not None), True)
            if settled and not text.startswith(UNFINISHED) and not first:
                return kept, len(text)
            n *= 2
        return tokens, len(self._decode(tokens))

    def _is_byte(self, token: int) -> bool | None:
        """Tells whether a token is one byte of a character. None: a token that is not text at all."""
        if token in self._special:
            return None
        name = self.tokenizer.convert_ids_to_tokens(token)
        return None if name is None else BYTE.fullmatch(name) is not None

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
