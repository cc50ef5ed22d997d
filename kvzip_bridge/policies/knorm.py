"""Keeps keys of small norm, because they draw attention (arXiv:2406.11430)."""

from __future__ import annotations

import torch
from torch import Tensor

from dpllm.kvzip_bridge.budget import per_head
from dpllm.kvzip_bridge.interfaces import ScoringInput
from dpllm.kvzip_bridge.policies.common import Policy, by_layer


class Knorm(Policy):
    """Keeps the keys of smallest L2 norm in every head."""

    name = "knorm"
    allocate = staticmethod(per_head)

    def score(self, context: ScoringInput) -> Tensor:
        """Returns -||k||, float32 [P, KVH, tokens]."""
        return by_layer(context, self._layer)

    def _layer(self, context: ScoringInput, layer: int) -> Tensor:
        k, _ = context.cache.pairs(layer, context.first, len(context.ids))
        return -torch.linalg.vector_norm(k, dim=-1, dtype=torch.float32)
