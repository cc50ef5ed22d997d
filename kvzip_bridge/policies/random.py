"""Pairs at random: what any policy has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from dpllm.kvzip_bridge.budget import per_head
from dpllm.kvzip_bridge.interfaces import Context
from dpllm.kvzip_bridge.policies.common import Policy, protect


class Random(Policy):
    """Every head keeps pairs drawn without replacement.

    A position's draws depend on the seed alone, not on how the text was divided, nor on the device.
    """

    name = "random"
    allocate = staticmethod(per_head)

    def __init__(self, seed: int = 0):
        self.seed = seed

    def score(self, context: Context) -> Tensor:
        """float32 [P, KVH, tokens], uniform in [0, 1)."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = len(context.model.layers), context.model.kv_heads
        drawn = torch.rand(len(context.ids), *heads, generator=generator)[context.first :]
        return protect(drawn.permute(1, 2, 0).contiguous().to(context.ids.device), context)
