"""Keeps the pairs that the end of the context attends to (SnapKV, arXiv:2404.14469)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpllm.kvzip_bridge.budget import per_head
from dpllm.kvzip_bridge.interfaces import ScoringInput
from dpllm.kvzip_bridge.policies.common import Policy, blocks, by_layer
from dpllm.kvzip_bridge.query_recording import QueriesWanted


class SnapKV(Policy):
    """Keeps the last tokens (the window) and the pairs that the window's queries attend to most.

    window: the number of last tokens of the context whose queries score pairs. pool: the odd number of neighbouring
    pairs over which scores are averaged (zeros beyond the ends). Scores are averaged over the query heads of a KV
    head, because a pair is kept or dropped for all of them.
    """

    name = "snapkv"
    allocate = staticmethod(per_head)

    def __init__(self, window: int = 64, pool: int = 5):
        self.window, self.pool = window, pool
        self.wants = QueriesWanted(last=window)

    def score(self, context: ScoringInput) -> Tensor:
        """Returns float32 [P, KVH, tokens]: pooled attention, at most 1; in the window, 2 plus the token's index."""
        return by_layer(context, self._layer)

    def _layer(self, context: ScoringInput, layer: int) -> Tensor:
        queries = context.queries.latest(layer)[-min(self.window, context.tokens) :]
        mass = window_attention(context, layer, queries)
        mass[:, -len(queries) :] = 0  # the window scores only the pairs before it
        mass = F.avg_pool1d(mass, self.pool, stride=1, padding=self.pool // 2)
        mass[:, -len(queries) :] = 2 + torch.arange(len(queries), device=mass.device)
        return mass


def window_attention(context: ScoringInput, layer: int, queries: Tensor) -> Tensor:
    """Returns the attention of the last w tokens' queries [w, H, D] to the scored positions, float32 [KVH, tokens].

    The attention is the mean over the queries and over the query heads of each KV head. Blocks of keys are read
    twice, first for the softmax's denominators, so that no more than one block is held.
    """
    tokens, heads = len(context.ids), context.model.kv_heads
    position = torch.arange(tokens - len(queries), tokens, device=queries.device)
    # [KVH, G * w, D], and the position of each row
    rows = (queries * context.model.scale).unflatten(1, (heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    position = position.repeat(rows.shape[1] // len(queries))

    def logits(head: int, first: int, k: Tensor) -> Tensor:
        column = torch.arange(first, first + k.shape[1], device=k.device)
        return (rows[head] @ k[head].float().T).masked_fill_(column > position[:, None], -math.inf)

    total = rows.new_full(rows.shape[:2], -math.inf)
    for first, k, _ in blocks(context, layer):
        for h in range(heads):
            total[h] = torch.logaddexp(total[h], logits(h, first, k).logsumexp(-1))
    mass = rows.new_zeros(heads, context.tokens)
    for first, k, _ in blocks(context, layer):
        at = first - context.first
        for h in range(heads if at >= 0 else 0):
            mass[h, at : at + k.shape[1]] = (logits(h, first, k) - total[h][:, None]).exp_().mean(0)
    return mass
