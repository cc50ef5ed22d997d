"""KVzip with attention weighted by its effect on the residual stream (KVzip+, arXiv:2601.07891)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpllm.kvzip_bridge.interfaces import ScoringInput
from dpllm.kvzip_bridge.policies.kvzip import ChunkScorer, KVzip
from dpllm.kvzip_bridge.repetition import Repetition


class KVzipPlus(KVzip):
    """Scores pairs as KVzip does, with attention times the norm of the value's output over the norm of the input."""

    name = "kvzip+"

    def _scorer(self, context: ScoringInput, repetition: Repetition) -> ChunkScorer:
        return PlusScorer(context, repetition)


class PlusScorer(ChunkScorer):
    """Adds log ||W_O v|| - log ||h|| to the log-attention.

    W_O: the query head's columns of the output projection. h [hidden]: the input of the layer at the query's
    token."""

    def __init__(self, context: ScoringInput, repetition: Repetition):
        super().__init__(context, repetition)
        self._input = torch.empty(0)  # log ||h|| of the current layer and piece, [T]
        self._values: dict[int, Tensor] = {}  # for each layer: log ||W_O v||, [KVH, G, chunk]

    def hidden(self, layer: int, x: Tensor) -> None:
        """Records the norms of the attention input [T, hidden] of a layer."""
        if layer in self.row:
            norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
            self._input = norm.log().masked_fill_(
                norm == 0, math.inf
            )  # a token of zeros (padding) does not count

    def query_offset(self) -> Tensor:
        """Returns what to subtract from the log-attention of the current queries, [T]."""
        return self._input

    def value_offset(self, layer: int) -> Tensor:
        """Returns what to add to the log-attention to the chunk's pairs, [KVH, G, chunk]."""
        if layer not in self._values:
            self._values[layer] = self._value_norms(layer).log()
        return self._values[layer]

    def _value_norms(self, layer: int) -> Tensor:
        """Returns ||W_O v|| of the chunk's values, [KVH, G, chunk].

        It is computed as sqrt(v.(W_O^T W_O).v), which needs no vector longer than v."""
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
