"""Whole heads, chosen once for a model: the context-independent variant of KVzip (arXiv:2505.23416)."""

from __future__ import annotations

from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.kvzip_bridge.budget import head_level, over_all
from dpllm.kvzip_bridge.interfaces import Context
from dpllm.kvzip_bridge.policies.common import Policy, protect


class Heads(Policy):
    """Every pair is worth what its head is.

    profile: float [P, KVH], for instance the largest KVzip score of each head over a text.
    """

    name = "heads"
    allocate = staticmethod(over_all)

    def __init__(self, profile: Tensor | None = None):
        if profile is None:
            raise InputError("KV policy 'heads' needs a profile of the model's heads. Give profile=[P, KVH].")
        self.profile = profile

    def score(self, context: Context) -> Tensor:
        """float32 [P, KVH, tokens]: the profile, all along the text."""
        expected = (len(context.model.layers), context.model.kv_heads)
        if tuple(self.profile.shape) != expected:
            raise InputError(
                f"the profile of heads is {list(self.profile.shape)}, but this model prunes {list(expected)} (layers, "
                "KV heads). Use the profile of this model."
            )
        return protect(head_level(self.profile.to(context.ids.device), context.tokens), context)
