"""A view of a decoder whose matrices are dequantised once, to evaluate and calibrate small models quickly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dpllm.calib.decoder_protocol import CalibrationDecoder
from dpllm.kernels.backend import Backend
from dpllm.kernels.weight import Int8Weight

CACHE_BYTES = 2**30

AnyDecoder = TypeVar("AnyDecoder", bound=CalibrationDecoder)


def dequantised_view(decoder: AnyDecoder, *, limit: int = CACHE_BYTES, products: bool = True) -> AnyDecoder:
    """The decoder with every width's matrix kept dense in float32, where all of them fit into `limit` bytes.

    products: also multiply by these matrices; otherwise only `dequantize` is faster, and the backend's own kernels
    multiply. The products and their rounding equal the backend's own: rows are gathered by width.

    A matrix is dequantised when it is first used, and freed with the view that is returned. The decoder itself
    does not change. A view keeps its activations for the backward pass. A decoder of a larger model, or one that
    does not compute in float32, is returned itself.
    """
    groups = [g for g in decoder.groups if not g.dense]
    need = sum(4 * g.weights * (g.resident_bits - g.seed_bits + 1) for g in groups)
    if not groups or need > limit or decoder.dtype != torch.float32:
        return decoder
    matrices = _Matrices(decoder.backend, [g.weight for g in groups])
    backend = replace(decoder.backend, dequantize=matrices.dequantize)
    if products:
        backend = replace(backend, gemv=matrices.gemv, int8_linear=_float_head(decoder))
    return decoder.with_backend(backend, recompute=False)


class _Matrices:
    """The backend's `dequantize` and `gemv` over matrices that are kept. Other weights go to the backend."""

    def __init__(self, backend: Backend, weights: list[Any]):
        self.backend = backend
        self._kept = {id(w) for w in weights}
        self._store: dict[tuple[int, int], Tensor] = {}

    def _matrix(self, w: Any, bits: int) -> Tensor:
        if (id(w), bits) not in self._store:
            self._store[id(w), bits] = self.backend.dequantize(w, bits)
        return self._store[id(w), bits]

    def dequantize(self, w: Any, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] at this width. The caller must not write to it."""
        if id(w) not in self._kept:
            return self.backend.dequantize(w, bits, dtype)
        return self._matrix(w, bits).to(dtype)

    def gemv(self, x: Tensor, w: Any, bits: Tensor, out: Tensor | None = None) -> Tensor:
        """y [T, N] of x [T, K], each row at its own width of bits int32 [T]."""
        if id(w) not in self._kept:
            return self.backend.gemv(x, w, bits, out)
        widths = bits.unique().tolist()
        if len(widths) == 1:
            y = x @ self._matrix(w, widths[0]).T
            return y if out is None else out.copy_(y)
        y = x.new_empty(len(x), len(self._matrix(w, widths[0]))) if out is None else out
        for width in widths:
            rows = (bits == width).nonzero()[:, 0]
            y[rows] = x[rows] @ self._matrix(w, width).T
        return y


def _float_head(decoder: CalibrationDecoder) -> Callable[..., Tensor]:
    """The backend's `int8_linear`, where the decoder's own int8 head is kept in float32."""
    backend, own = decoder.backend, decoder.head
    if not isinstance(own, Int8Weight):
        return backend.int8_linear
    head = own.values.float() * own.scale.float()[:, None]

    def int8_linear(x: Tensor, w: Int8Weight) -> Tensor:
        return x @ head.T if w is own else backend.int8_linear(x, w)

    return int8_linear
