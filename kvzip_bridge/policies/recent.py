"""The first tokens and the most recent ones (StreamingLLM, arXiv:2309.17453)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpllm.kvzip_bridge.attention import SINKS
from dpllm.kvzip_bridge.budget import per_head
from dpllm.kvzip_bridge.interfaces import Context
from dpllm.kvzip_bridge.policies.common import Policy, protect


class Recent(Policy):
    """Every head keeps the text's first four tokens, on which attention rests, and then the latest."""

    name = "recent"
    allocate = staticmethod(per_head)

    def score(self, context: Context) -> Tensor:
        """float32 [P, KVH, tokens]: the position."""
        position = torch.arange(context.first, len(context.ids), device=context.ids.device)
        scores = position.float().masked_fill(position < SINKS, math.inf)
        return protect(scores.repeat(len(context.model.layers), context.model.kv_heads, 1), context)
