"""Keeps the first tokens and the most recent tokens (StreamingLLM, arXiv:2309.17453)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpllm.kvzip_bridge.attention import SINKS
from dpllm.kvzip_bridge.budget import per_head
from dpllm.kvzip_bridge.interfaces import ScoringInput
from dpllm.kvzip_bridge.policies.common import Policy, protect


class Recent(Policy):
    """Keeps the text's first four tokens, which draw much attention, and the latest tokens in every head."""

    name = "recent"
    allocate = staticmethod(per_head)

    def score(self, context: ScoringInput) -> Tensor:
        """Returns the position of each pair, float32 [P, KVH, tokens]."""
        position = torch.arange(context.first, len(context.ids), device=context.ids.device)
        scores = position.float().masked_fill(position < SINKS, math.inf)
        return protect(scores.repeat(len(context.model.layers), context.model.kv_heads, 1), context)
