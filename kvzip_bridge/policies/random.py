"""Keeps random pairs, as the baseline that any policy has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from dpllm.kvzip_bridge.budget import per_head
from dpllm.kvzip_bridge.interfaces import ScoringInput
from dpllm.kvzip_bridge.policies.common import Policy, protect


class Random(Policy):
    """Keeps random pairs in every head, drawn without replacement.

    The numbers drawn for a position depend only on the seed, not on the blocks of the text or on the device.
    """

    name = "random"
    allocate = staticmethod(per_head)

    def __init__(self, seed: int = 0):
        self.seed = seed

    def score(self, context: ScoringInput) -> Tensor:
        """Returns scores uniform in [0, 1), float32 [P, KVH, tokens]."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = len(context.model.layers), context.model.kv_heads
        drawn = torch.rand(len(context.ids), *heads, generator=generator)[context.first :]
        return protect(drawn.permute(1, 2, 0).contiguous().to(context.ids.device), context)
