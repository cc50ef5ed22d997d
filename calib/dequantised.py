"""A decoder over matrices that were dequantised once: for evaluating and calibrating small models quickly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

CACHE_BYTES = 2**30


@contextmanager
def dense(decoder: Any, limit: int = CACHE_BYTES, products: bool = True) -> Iterator[Any]:
    """The decoder with every width's matrix kept dense in fp32, where they fit into `limit` bytes.

    products: also multiply by them; else only `dequantize` is quicker and the backend's own kernels multiply.

    Same products, same rounding as the backend's own: rows are gathered by width. Models this small also keep
    their activations for the backward pass. Larger models run as they are. The decoder is put back at the end.
    """
    groups = [g for g in decoder.groups if not g.dense]
    need = sum(4 * g.weights * (g.resident_bits - g.seed_bits + 1) for g in groups)
    if not groups or need > limit or decoder.dtype != torch.float32:
        yield decoder
        return
    backend = decoder.backend
    store: dict[tuple[int, int], Tensor] = {}
    planes = {id(g.weight) for g in groups}

    def matrix(w: Any, bits: int) -> Tensor:
        if (id(w), bits) not in store:
            store[id(w), bits] = backend.dequantize(w, bits)
        return store[id(w), bits]

    def dequantize(w: Any, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return matrix(w, bits).to(dtype) if id(w) in planes else backend.dequantize(w, bits, dtype)

    def gemv(x: Tensor, w: Any, bits: Tensor, out: Tensor | None = None) -> Tensor:
        if id(w) not in planes:
            return backend.gemv(x, w, bits, out)
        widths = bits.unique().tolist()
        if len(widths) == 1:
            y = x @ matrix(w, widths[0]).T
            return y if out is None else out.copy_(y)
        y = x.new_empty(len(x), len(matrix(w, widths[0]))) if out is None else out
        for width in widths:
            rows = (bits == width).nonzero()[:, 0]
            y[rows] = x[rows] @ matrix(w, width).T
        return y

    head = (
        decoder.head.values.float() * decoder.head.scale.float()[:, None]
        if hasattr(decoder.head, "values")
        else None
    )

    def int8_linear(x: Tensor, w: Any) -> Tensor:
        return x @ head.T if head is not None and w is decoder.head else backend.int8_linear(x, w)

    recompute, decoder.recompute = decoder.recompute, False
    own = {"gemv": gemv, "int8_linear": int8_linear} if products else {}
    decoder.backend = replace(backend, dequantize=dequantize, **own)
    try:
        yield decoder
    finally:
        decoder.backend, decoder.recompute = backend, recompute
