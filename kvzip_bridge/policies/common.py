"""Helpers for policies: default attributes, protected positions, and reading keys and values in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dpllm.kvzip_bridge.interfaces import ScoringInput
from dpllm.kvzip_bridge.query_recording import QueriesWanted

COLUMNS = 2048  # keys in a block, which bounds the memory that scoring takes


class Policy:
    """Defaults of a policy: it needs no recorded queries, and no room after the context."""

    wants = QueriesWanted()
    scratch = 0  # tokens that scoring writes after the context and removes again


def by_layer(context: ScoringInput, score: Callable[[ScoringInput, int], Tensor]) -> Tensor:
    """Scores every pruned layer by `score` -> [KVH, tokens], and protects positions. Returns [P, KVH, tokens]."""
    return protect(torch.stack([score(context, layer) for layer in context.model.layers]), context)


def protect(scores: Tensor, context: ScoringInput) -> Tensor:
    """Sets the protected positions of scores [P, KVH, tokens] to +inf, in place, and returns the scores."""
    scores[..., : max(0, context.protected - context.first)] = math.inf
    return scores


def blocks(context: ScoringInput, layer: int, skip: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (first position, k, v), where k and v are [KVH, <= COLUMNS, D], of the pairs that every head holds.

    These are the protected pairs before `context.first` and the pairs to be scored. skip: number of leading positions
    to leave out. No block lies on both sides of `context.first`."""
    before = (skip, min(context.first, context.protected))
    scored = (max(context.first, skip), len(context.ids))
    for begin, end in (before, scored):
        for first in range(begin, end, COLUMNS):
            k, v = context.cache.pairs(layer, first, min(first + COLUMNS, end))
            yield first, k, v
