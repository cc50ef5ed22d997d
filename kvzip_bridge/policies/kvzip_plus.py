"""KVzip with attention weighed by what it changes (KVzip+, arXiv:2601.07891)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpllm.kvzip_bridge.interfaces import Context
from dpllm.kvzip_bridge.policies.kvzip import ChunkScorer, KVzip
from dpllm.kvzip_bridge.repetition import Repetition


class KVzipPlus(KVzip):
    """Attention times the norm of what the value adds to the residual stream, over the norm of the layer's input."""

    name = "kvzip+"

    def _scorer(self, context: Context, repetition: Repetition) -> ChunkScorer:
        return PlusScorer(context, repetition)


class PlusScorer(ChunkScorer):
    """Adds log ||W_O v|| - log ||h|| to log-attention. W_O: the query head's columns; h [hidden]: its token's input."""

    def __init__(self, context: Context, repetition: Repetition):
        super().__init__(context, repetition)
        self._input = torch.empty(0)  # log ||h|| of the layer and piece at hand, [T]
        self._values: dict[int, Tensor] = {}  # by layer: log ||W_O v||, [KVH, G, chunk]

    def hidden(self, layer: int, x: Tensor) -> None:
        """Takes in the attention input [T, hidden] of a layer."""
        if layer in self.row:
            norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
            self._input = norm.log().masked_fill_(norm == 0, math.inf)  # an empty token (padding) has no say

    def of_query(self) -> Tensor:
        """What is taken off the log-attention of the queries at hand, [T]."""
        return self._input

    def of_value(self, layer: int) -> Tensor:
        """What is added to the log-attention to the chunk's pairs, [KVH, G, chunk]."""
        if layer not in self._values:
            self._values[layer] = self._value_norms(layer).log()
        return self._values[layer]

    def _value_norms(self, layer: int) -> Tensor:
        """||W_O v|| of the chunk's values, [KVH, G, chunk]: v.(W_O^T W_O).v keeps vectors as short as v."""
        model, r = self.context.model, self.repetition
        _, v = self.context.cache.pairs(layer, r.start, r.end)
        norms = []
        weights = (
            model.output_weight(layer).unflatten(1, (model.heads, -1)).permute(1, 0, 2)
        )  # [H, hidden, D]
        for w, own in zip(
            weights, v.repeat_interleave(model.heads // model.kv_heads, 0).float(), strict=True
        ):
            norms.append(((own @ (w.T @ w)) * own).sum(-1).clamp_(min=0).sqrt_())
        return torch.stack(norms).unflatten(0, (model.kv_heads, -1))
