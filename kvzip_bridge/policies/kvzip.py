"""Keeps the pairs that the model needs to repeat its context (KVzip, arXiv:2505.23416)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpllm.kvzip_bridge.budget import over_all
from dpllm.kvzip_bridge.interfaces import ScoringInput
from dpllm.kvzip_bridge.model_view import Hidden
from dpllm.kvzip_bridge.policies.common import Policy, protect
from dpllm.kvzip_bridge.repetition import Repetition, repeat, repetitions


class KVzip(Policy):
    """Keeps the pairs that draw the most attention while the model repeats its context.

    A pair's score is the largest attention that any query pays to it while the model repeats the pair's chunk. chunk:
    the number of tokens repeated at a time. Scoring takes memory for the keys of one layer's protected prefix, chunk
    and repetition, and for the attention of a few queries to these keys.
    """

    name = "kvzip"
    allocate = staticmethod(over_all)

    def __init__(self, chunk: int = 2048):
        self.chunk = chunk
        self.scratch = (
            chunk + 256
        )  # the request is usually shorter than 256; otherwise the cache makes more room

    def score(self, context: ScoringInput) -> Tensor:
        """Returns float32 [P, KVH, tokens] in [0, 1]. Raises InputError where the model has too few positions."""
        model = context.model
        scores = torch.zeros(len(model.layers), model.kv_heads, context.tokens, device=context.ids.device)
        for repetition in repetitions(context, self.chunk):
            start, end = repetition.start - context.first, repetition.end - context.first
            scores[..., start:end] = self._scorer(context, repetition).run()
        return protect(scores, context)

    def _scorer(self, context: ScoringInput, repetition: Repetition) -> ChunkScorer:
        return ChunkScorer(context, repetition)


class ChunkScorer:
    """Scores one chunk while it is repeated (section 3.2 of the paper).

    Queries attend to a subset of the cache's keys: the protected prefix, the chunk, and the repetition so far.
    Logarithms of attention are compared, because they still differ where attention is near zero."""

    hidden: Hidden | None = None  # called with each layer's input before its queries are scored

    def __init__(self, context: ScoringInput, repetition: Repetition):
        self.context, self.repetition = context, repetition
        self.row = {layer: row for row, layer in enumerate(context.model.layers)}
        shape = (len(self.row), context.model.kv_heads, repetition.end - repetition.start)
        self.best = torch.full(shape, -math.inf, device=context.ids.device)

    def run(self) -> Tensor:
        """Repeats the chunk and returns its scores, float32 [P, KVH, chunk]."""
        repeat(self.context, self.repetition.ids, self.watch, self.hidden)
        return self.best.exp()

    def watch(self, layer: int, q: Tensor, position: int) -> None:
        """Updates the scores with the rotated queries [T, H, D] of one layer, whose keys have been written."""
        if layer not in self.row:
            return
        best = self.best[self.row[layer]]
        keys = self._keys(layer, position + len(q))
        end = self.context.protected + best.shape[1]
        columns = slice(self.context.protected, end)
        kernels, scale = self.context.model.kernels, self.context.model.scale
        most = kernels.attention_peaks(q, keys, columns, scale, self.query_offset())  # [KVH, G, chunk]
        torch.maximum(best, (most + self.value_offset(layer)).amax(1), out=best)

    def query_offset(self) -> Tensor | None:
        """Returns what to subtract from the log-attention of the current queries, [T]; None: nothing."""
        return None

    def value_offset(self, layer: int) -> Tensor | float:
        """Returns what to add to the log-attention to the chunk's pairs, [KVH, G, chunk]."""
        return 0.0

    def _keys(self, layer: int, end: int) -> Tensor:
        """Returns keys [KVH, ., D] of the protected prefix, the chunk, and the repetition before position `end`."""
        n, r = len(self.context.ids), self.repetition
        ranges = [(0, self.context.protected), (r.start, r.end), (n, end)]
        return torch.cat([self.context.cache.pairs(layer, a, b)[0] for a, b in ranges if a < b], dim=1)
