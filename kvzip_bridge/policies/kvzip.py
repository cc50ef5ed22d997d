"""What the model needs to repeat its context (KVzip, arXiv:2505.23416)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dpllm.kvzip_bridge.budget import over_all
from dpllm.kvzip_bridge.policies.common import Policy, protect
from dpllm.kvzip_bridge.policy import Context, Hidden
from dpllm.kvzip_bridge.repeat import Repetition, repeat, repetitions

BLOCK = 1 << 18  # logits looked at together


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
    """Scores one chunk while it is repeated: section 3.2 of the paper.

    Keys are a subset of the cache's: the protected prefix, the chunk, and the repetition so far. Logarithms of
    attention are compared, because what is near zero still has an order there."""

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
        before, own = self._keys(layer, position + len(q))
        columns = slice(before.shape[1] - best.shape[1], before.shape[1])
        for h, queries in enumerate((q.float() * self.context.model.scale).chunk(len(best), dim=1)):
            keys = torch.cat([before[h], own[h]]).float()
            for rows, logits in causal_logits(queries, keys):
                less = logits.logsumexp(-1, keepdim=True) + self.of_query(rows)
                most = (logits[..., columns] - less).amax(0) + self.of_value(layer, h)  # [G, chunk]
                torch.maximum(best[h], most.amax(0), out=best[h])

    def of_query(self, rows: slice) -> Tensor | float:
        """What is taken off the log-attention of some of the queries at hand, [B, 1, 1]."""
        return 0.0

    def of_value(self, layer: int, head: int) -> Tensor | float:
        """What is added to the log-attention to the chunk's pairs, [G, chunk]."""
        return 0.0

    def _keys(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys [KVH, ., D] of the protected prefix and the chunk, and of the repetition up to a position."""
        n, r = len(self.context.ids), self.repetition
        ranges = [(0, self.context.protected), (r.start, r.end)]
        before = [self.context.cache.pairs(layer, a, b)[0] for a, b in ranges if a < b]
        return torch.cat(before, dim=1), self.context.cache.pairs(layer, n, end)[0]


def causal_logits(q: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, logits [B, G, .]) of queries [T, G, D] in blocks, over keys [S, D], the last T of them the queries' own.

    Keys behind a block are left out, those inside that come later are -inf. What follows takes several passes over the
    logits: a block of them stays in a core's cache.
    """
    tokens, group, total = q.shape[0], q.shape[1], len(keys)
    size = max(8, BLOCK // (group * total))
    for a in range(0, tokens, size):
        b = min(a + size, tokens)
        seen = keys[: total - tokens + b]
        logits = (q[a:b].flatten(0, 1) @ seen.T).unflatten(0, (b - a, group))
        column = torch.arange(b - a, device=q.device)
        logits[..., a - b :].masked_fill_((column > column[:, None])[:, None], -math.inf)
        yield slice(a, b), logits
