"""Writes JSON that every reader accepts: JSON has no NaN and no infinity, so such a number is written as null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def strict_json(value: Any, **options: Any) -> str:
    """Returns a value as JSON text (RFC 8259), with null for every number that is not finite.

    options: of `json.dumps`. Where null has to be told from a missing value, the caller adds a field that says why.
    Raises TypeError for a value that JSON cannot express.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
