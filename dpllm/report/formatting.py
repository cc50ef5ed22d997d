"""Formats figures and tokens for people."""

from __future__ import annotations

POLICY_NAMES = {
    "rate-distortion": "rate-distortion (ours)", "static": "static", "dp-llm": "DP-LLM", "uniform": "uniform",
    "random": "coin flip", "oracle-dp-llm": "DP-LLM, exact errors",
    "oracle-rate-distortion": "rate-distortion, exact errors",
}  # fmt: skip
_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍", " ": "␣"}


def size(nbytes: float) -> str:
    """Formats bytes with three significant digits: '3.75 MB'."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale * 0.9995:
            return f"{digits(nbytes / scale)} {unit}"
    return f"{nbytes:.0f} B"


def digits(value: float) -> str:
    """Formats a number with three significant digits and without an exponent."""
    if value == 0:
        return "0"
    magnitude = abs(value)
    return f"{value:.{0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2 if magnitude >= 0.9995 else 3}f}"


def milliseconds(value: float) -> str:
    """Formats milliseconds: '1.83 ms'."""
    return f"{digits(value)} ms"


def several(count: int, noun: str) -> str:
    """Formats a count with its noun: '1 thread', '2 threads'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def visible(token: str) -> str:
    """Returns a token's text with visible white space and with other control characters as codes: '␣def', '↵'."""
    shown = "".join(_SIGNS.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in token)
    return shown or "(nothing)"
