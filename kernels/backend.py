"""One backend of plain functions, chosen once at load and reported with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpllm.kernels import reference
from dpllm.kernels.errors import InputError


@dataclass(frozen=True)
class Backend:
    """Functions of the signatures in kernels/reference.py; `reason` says why this one was chosen."""

    name: str
    reason: str
    prepare: Callable[..., Any]
    gemv: Callable[..., Any]
    dequantize: Callable[..., Any]
    int8_linear: Callable[..., Any]
    select: Callable[..., Any]
    decode_attention: Callable[..., Any]


def _reference(reason: str) -> Backend:
    return Backend(
        name="reference",
        reason=reason,
        prepare=reference.prepare,
        gemv=reference.gemv,
        dequantize=reference.dequantize,
        int8_linear=reference.int8_linear,
        select=reference.select,
        decode_attention=reference.decode_attention,
    )


BACKENDS: dict[str, Callable[[str], Backend]] = {"reference": _reference}


def choose_backend(name: str | None = None) -> Backend:
    """The named backend, or the best this machine has.

    Raises InputError for a name that does not exist.
    """
    if name is None:
        return _reference("torch operations; no faster backend is built into this version")
    if name not in BACKENDS:
        raise InputError(f"unknown kernel backend '{name}'. Choose one of: {', '.join(BACKENDS)}.")
    return BACKENDS[name]("asked for by name")
