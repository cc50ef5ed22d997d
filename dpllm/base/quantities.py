"""Sizes, shares and counts as people write them ('4GB', '2%', '16k'), and perplexities of any size."""

from __future__ import annotations

import math
import re
import sys

from dpllm.base.errors import InputError

LARGEST_EXPONENT = math.log(sys.float_info.max)


def parse_size(size: str | float) -> int:
    """Bytes of a size such as '4GB', '600 MiB' or '1e9'; a number is a number of bytes.

    Raises InputError for anything that is not a finite size above 0.
    """
    found = re.fullmatch(r"\s*([\d.]+(?:e[+]?\d+)?)\s*([kmgt]?)(i?)b?\s*", str(size).lower())
    try:
        value = float(found[1]) if found else 0.0
    except ValueError:
        value = 0.0
    if found is None or not 0 < value < math.inf:
        raise InputError(f"'{size}' is not a size. Write, for example, 4GB or 600MiB.")
    return int(value * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


def parse_share(share: str | float) -> float:
    """A loss of quality as a fraction: '2%', '0.02' and 0.02 are all 0.02.

    Raises InputError for anything that is not a finite number of at least 0.
    """
    text = str(share).strip()
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"a quality loss of '{share}' is not a share. Write, for example, 2% or 0.02.")
    return value / 100 if text.endswith("%") else value


def parse_count(count: str | int) -> int:
    """A number of tokens: '16k' is 16384, '4096' and 4096 are 4096.

    Raises InputError for anything that is not a whole number of at least 0.
    """
    found = re.fullmatch(r"\s*(\d+)\s*(k?)\s*", str(count).lower())
    if not found:
        raise InputError(
            f"a context of '{count}' is not a number of tokens. Write, for example, 4096 or 16k."
        )
    return int(found[1]) * (1024 if found[2] else 1)


def perplexity(nats: float) -> float:
    """exp of a mean negative log probability in nats; infinite beyond the largest float."""
    return math.inf if nats > LARGEST_EXPONENT else math.exp(nats)


def rise(nats: float) -> float:
    """The rise of perplexity, as a fraction, that a rise of `nats` per token is; infinite beyond the largest float."""
    return math.inf if nats > LARGEST_EXPONENT else math.expm1(nats)


def figure(value: float, form: str = ".3f") -> str:
    """A number for people. form: its format; a number beyond the largest float is 'inf', with a word that says so."""
    return f"{value:{form}}" if math.isfinite(value) else f"{value} (beyond floats)"


def field(name: str, value: float) -> dict[str, float | str]:
    """A number as a field of a JSON object. An infinite one, which JSON writes as null, is said in a field NAME_is."""
    return {name: value} | ({f"{name}_is": "infinite: beyond floats"} if math.isinf(value) else {})


def duration(seconds: float) -> str:
    """A time for people, such as '40 s', '1 min 20 s' or '2 h 5 min'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
