"""Keeps the whole cache, without pruning."""

from __future__ import annotations

import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.kvzip_bridge.interfaces import ScoringInput
from dpllm.kvzip_bridge.policies.common import Policy, protect


class KeepAll(Policy):
    """Keeps every pair."""

    name = "keep-all"

    def score(self, context: ScoringInput) -> Tensor:
        """Returns the same score for every pair, float32 [P, KVH, tokens]."""
        model = context.model
        shape = (len(model.layers), model.kv_heads, context.tokens)
        return protect(torch.zeros(shape, device=context.ids.device), context)

    def allocate(self, scores: Tensor, pairs: int) -> Tensor:
        """Returns a mask of every pair. Raises InputError for a budget that does not hold every pair."""
        if pairs != scores.numel():
            raise InputError(
                f"KV policy 'keep-all' keeps all {scores.numel():,} pairs, but the budget holds {pairs:,}. Choose "
                "another policy, or a keep_ratio of 1."
            )
        return torch.ones_like(scores, dtype=torch.bool)
