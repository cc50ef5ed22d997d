"""The largest key or value that an overlay can make, so that the cache gets a type that holds it.

A normalised input has a known length: |h| <= sqrt(K) for RMSNorm without weights. With norm weights w, a key or value
before its rotation is the product of that input with a row W_n times w, plus a bias. So it is at most
sqrt(K) |W_n w| + |b_n|, for any text whatsoever, and a rotation adds a factor of at most sqrt(2). No text and no pass
is needed, and no check while text is generated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpllm.kernels.reference import dequantize
from dpllm.kernels.weight import QuantizedWeight
from dpllm.model.config import ModelConfig
from dpllm.quant.overlay import Overlay

if TYPE_CHECKING:
    from dpllm.model.decoder import Layer

HALF_MOST = 0.9 * torch.finfo(torch.float16).max  # int8 activations may be a little longer than their input
KEY, VALUE = "self_attn.k_proj", "self_attn.v_proj"


class PairRange:
    """Collects, while an overlay is read, the largest weight of each row that makes keys or values."""

    def __init__(self, overlay: Overlay, config: ModelConfig):
        self.overlay, self.config = overlay, config
        self._largest: dict[str, Tensor] = {}  # float32 [N] of each matrix

    def add(self, parts: Sequence[str], rows: Sequence[int], weight: QuantizedWeight) -> None:
        """Takes in a matrix that was read. parts, rows: its stacked matrices, and the rows of each."""
        if any(p.endswith((KEY, VALUE)) for p in parts):
            self._largest |= dict(zip(parts, largest_weights(weight).split(list(rows)), strict=True))

    def exceeds(self, layer: Layer, resident_bits: int | None) -> bool:
        """Whether some text could make a key or value of this layer that float16 cannot hold."""
        c = self.config
        turned = math.sqrt(2) * c.rope_scale if c.uses_rope[layer.index] else 1.0
        if layer.k_norm is not None:
            key = turned * math.sqrt(c.head_dim) * float(layer.k_norm.float().abs().max())
            if key > HALF_MOST:
                return True
        factors = {KEY: 0.0 if layer.k_norm is not None else turned, VALUE: 1.0}
        return any(
            factor
            and self._exceeds(f"model.layers.{layer.index}.{part}", layer.input_norm, factor, resident_bits)
            for part, factor in factors.items()
        )

    def _exceeds(self, name: str, norm: Tensor, factor: float, resident_bits: int | None) -> bool:
        """Tries the coarse bound first, which takes every weight of a row to be as large as the largest one."""
        norm = norm.float().cpu()
        bias = self.overlay.read(f"{name}.bias").float().abs() if self.overlay.has(f"{name}.bias") else 0.0
        limit, reach = HALF_MOST / factor, math.sqrt(len(norm))
        if not bool((reach * norm.norm() * self._largest[name] + bias > limit).any()):
            return False
        weight = self.overlay.linear(name, resident_bits)
        widths = range(weight.seed_bits, weight.resident_bits + 1)
        return any(
            bool((reach * (dequantize(weight, b) * norm).norm(dim=1) + bias > limit).any()) for b in widths
        )


def largest_weights(weight: QuantizedWeight) -> Tensor:
    """The largest absolute weight of each row at any resident width, float32 [N]. Reads the tables alone."""
    widths = range(weight.seed_bits, weight.resident_bits + 1)
    peak = torch.stack([weight.table(b).float().abs().amax(1) for b in widths]).amax(0)
    rows = peak.repeat_interleave(weight.rows_per_table)
    return rows if weight.scale is None else rows * weight.scale.float().abs()
