"""What the model needs to repeat its context (KVzip, arXiv:2505.23416)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpllm.kvzip_bridge.budget import over_all
from dpllm.kvzip_bridge.policies.common import Policy, protect
from dpllm.kvzip_bridge.policy import Context, Hidden
from dpllm.kvzip_bridge.repeat import Repetition, repeat, repetitions


class KVzip(Policy):
    """A pair is worth the most attention that any query pays to it while the model repeats the chunk it is in.

    chunk: tokens repeated at a time. Memory is that of the attention of one KV head's queries of a piece to the
    protected prefix, the chunk and the repetition.
    """

    name = "kvzip"
    allocate = staticmethod(over_all)

    def __init__(self, chunk: int = 2048):
        self.chunk = chunk
        self.scratch = chunk + 256  # and the request; caches make more room where that is longer

    def score(self, context: Context) -> Tensor:
        """float32 [P, KVH, tokens], in [0, 1]. Raises InputError where the model has too few positions."""
        model = context.model
        scores = torch.zeros(len(model.layers), model.kv_heads, context.tokens, device=context.ids.device)
        for repetition in repetitions(context, self.chunk):
            start, end = repetition.start - context.first, repetition.end - context.first
            scores[..., start:end] = self._scorer(context, repetition).run()
        return protect(scores, context)

    def _scorer(self, context: Context, repetition: Repetition) -> ChunkScorer:
        return ChunkScorer(context, repetition)


class ChunkScorer:
    """Scores one chunk while it is repeated.

    Keys are a subset of the cache's: the protected prefix, the chunk, and the repetition so far. Logarithms are
    compared, for the softmax's denominator is then all that has to be computed of the other columns.
    """

    hidden: Hidden | None = None  # sees each layer's input before its queries are scored

    def __init__(self, context: Context, repetition: Repetition):
        self.context, self.repetition = context, repetition
        self.row = {layer: row for row, layer in enumerate(context.model.layers)}
        shape = (len(self.row), context.model.kv_heads, repetition.end - repetition.start)
        self.best = torch.full(shape, -math.inf, device=context.ids.device)

    def run(self) -> Tensor:
        """The chunk's scores, float32 [P, KVH, chunk]."""
        repeat(self.context, self.repetition.ids, self.watch, self.hidden)
        return self.best.exp()

    def watch(self, layer: int, q: Tensor, position: int) -> None:
        """Takes in the rotated queries [T, H, D] of one layer, whose keys have been written."""
        if layer not in self.row:
            return
        best = self.best[self.row[layer]]
        queries = (
            (q.float() * self.context.model.scale).transpose(0, 1).chunk(len(best))
        )  # KVH times [G, T, D]
        parts = self._keys(layer, position + len(q))
        for h, own in enumerate(queries):
            attention = self.log_attention(own, [k[h].float() for k in parts])
            self.weigh(attention, layer, h)
            torch.maximum(best[h], attention.amax((0, 1)), out=best[h])

    def weigh(self, attention: Tensor, layer: int, head: int) -> None:
        """Changes log-attention [G, T, chunk] in place before the maximum is taken."""

    def _keys(self, layer: int, end: int) -> list[Tensor]:
        """Keys [KVH, ., D] of the protected prefix, the chunk, and the repetition up to a position."""
        n, r = len(self.context.ids), self.repetition
        ranges = [(0, self.context.protected), (r.start, r.end), (n, end)]
        return [self.context.cache.pairs(layer, a, b)[0] for a, b in ranges if a < b]

    @staticmethod
    def log_attention(q: Tensor, keys: list[Tensor]) -> Tensor:
        """log softmax of q [G, T, D] over keys [., D], of the chunk's columns: [G, T, chunk]. keys: a prefix or none,
        then the chunk, then the repetition, whose last T keys are the queries' own."""
        logits = q @ torch.cat(keys).T
        tokens, total = logits.shape[1:]
        column = torch.arange(total - tokens, total, device=q.device)
        later = column[None] > column[:, None]
        logits[..., -tokens:].masked_fill_(later, -math.inf)
        begin = total - len(keys[-1]) - len(keys[-2])
        return logits[..., begin : begin + len(keys[-2])] - logits.logsumexp(-1, keepdim=True)
