"""Keeps whole heads that were chosen once for a model, as KVzip's context-independent variant (arXiv:2505.23416)."""

from __future__ import annotations

from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.kvzip_bridge.budget import head_level, over_all
from dpllm.kvzip_bridge.interfaces import ScoringInput
from dpllm.kvzip_bridge.policies.common import Policy, protect


class WholeHeads(Policy):
    """Keeps or drops whole heads, ranked by a calibrated head score.

    profile: float [P, KVH], the score of each head, for instance its largest KVzip score over a text.
    """

    name = "whole-heads"
    allocate = staticmethod(over_all)

    def __init__(self, profile: Tensor | None = None):
        if profile is None:
            raise InputError(
                "KV policy 'whole-heads' needs a profile of the model's heads. Give profile=[P, KVH]."
            )
        self.profile = profile

    def score(self, context: ScoringInput) -> Tensor:
        """Returns the profile, repeated for every position, float32 [P, KVH, tokens]."""
        expected = (len(context.model.layers), context.model.kv_heads)
        if tuple(self.profile.shape) != expected:
            raise InputError(
                f"the profile of heads is {list(self.profile.shape)}, but this model prunes {list(expected)} (layers, "
                "KV heads). Use the profile of this model."
            )
        return protect(head_level(self.profile.to(context.ids.device), context.tokens), context)
