"""What several policies share: defaults, protected positions, the keys and values that can be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dpllm.kvzip_bridge.interfaces import Context
from dpllm.kvzip_bridge.query_recording import QueriesWanted

COLUMNS = 2048  # keys looked at together: bounds the memory that scoring takes


class Policy:
    """A policy that needs nothing recorded and no room behind the context, unless it says otherwise."""

    wants = QueriesWanted()
    scratch = 0  # tokens that scoring writes behind the context for a while


def by_layer(context: Context, score: Callable[[Context, int], Tensor]) -> Tensor:
    """Scores [P, KVH, tokens] from those of each pruned layer [KVH, tokens], with the protected positions."""
    return protect(torch.stack([score(context, layer) for layer in context.model.layers]), context)


def protect(scores: Tensor, context: Context) -> Tensor:
    """Puts +inf at the protected positions of scores [P, KVH, tokens], in place."""
    scores[..., : max(0, context.protected - context.first)] = math.inf
    return scores


def blocks(context: Context, layer: int, skip: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first position, k, v), both [KVH, <= COLUMNS, D], of the pairs every head holds: the protected ones before those
    to be scored, and these. skip: leading positions left out. No block lies on both sides of `context.first`."""
    before = (skip, min(context.first, context.protected))
    scored = (max(context.first, skip), len(context.ids))
    for begin, end in (before, scored):
        for first in range(begin, end, COLUMNS):
            k, v = context.cache.pairs(layer, first, min(first + COLUMNS, end))
            yield first, k, v
