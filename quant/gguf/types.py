"""The types of tensors in GGUF files. The `gguf` package defines and dequantises the types."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch

from dpllm.base.errors import InputError


@functools.cache
def gguf_package() -> Any:
    """The `gguf` package. Raises InputError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise InputError(
            "GGUF files are read with the package 'gguf', which is missing. Run: pip install gguf"
        ) from None
    return gguf


def type_name(kind: int) -> str:
    """The name of a GGML type, such as 'Q4_K', or its number where the package does not know the type."""
    types = gguf_package().GGMLQuantizationType
    return str(types(kind).name) if kind in types._value2member_map_ else f"number {kind}"


def stored_bytes(shape: tuple[int, ...], kind: int) -> int | None:
    """Bytes of a tensor. 0 where its rows do not consist of whole blocks, None where the type cannot be read."""
    if not _readable(kind):
        return None
    block, size = _block(kind)
    return 0 if shape[-1] % block else math.prod(shape) // block * size


def bits_per_weight(kind: int) -> float:
    """Bits that a weight of this type takes, with its share of the block's scales."""
    block, size = _block(kind)
    return 8 * size / block


def dequantized(raw: np.ndarray, shape: tuple[int, ...], kind: int) -> torch.Tensor:
    """The values of a tensor: float16 or bfloat16 where it is stored so, else float32.

    raw: uint8, all bytes of the tensor.
    """
    types = gguf_package().GGMLQuantizationType
    plain = {types.F32: torch.float32, types.F16: torch.float16, types.BF16: torch.bfloat16}.get(types(kind))
    if plain is not None:
        return torch.from_numpy(raw.copy()).view(plain).reshape(shape)
    rows = raw.reshape(*shape[:-1], -1)
    return torch.from_numpy(gguf_package().dequantize(rows, types(kind))).reshape(shape)


def is_quantized(kind: int) -> bool:
    """Tells whether the type holds fewer than 16 bits a weight."""
    return bits_per_weight(kind) < 16


def dense_dtype(kind: int) -> str:
    """The dtype that `dequantized` gives, as safetensors spells it."""
    name = type_name(kind)
    return name if name in ("F16", "BF16") else "F32"


def _block(kind: int) -> tuple[int, int]:
    """The weights and the bytes of one block."""
    gguf = gguf_package()
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]


@functools.cache
def _readable(kind: int) -> bool:
    """Tells whether the package knows the type and turns it into numbers."""
    gguf = gguf_package()
    if kind not in gguf.GGMLQuantizationType._value2member_map_:
        return False
    with np.errstate(all="ignore"):
        try:
            gguf.dequantize(np.zeros((1, _block(kind)[1]), np.uint8), gguf.GGMLQuantizationType(kind))
        except (NotImplementedError, KeyError):
            return False
    return True
