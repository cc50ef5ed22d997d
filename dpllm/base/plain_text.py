"""Plain text as users hand it over. Imports nothing heavy, so that commands can use it before they load a model."""

from __future__ import annotations


def without_byte_order_mark(text: str) -> str:
    """A text without the mark that some editors put at the start of a UTF-8 file; it is not a part of the text."""
    return text.removeprefix("\ufeff")
