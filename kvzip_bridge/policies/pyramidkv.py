"""SnapKV's scores, with more pairs for lower layers (PyramidKV, arXiv:2406.02069)."""

from __future__ import annotations

from torch import Tensor

from dpllm.kvzip_bridge.budget import pyramid
from dpllm.kvzip_bridge.policies.snapkv import SnapKV


class PyramidKV(SnapKV):
    """Scores pairs as SnapKV does; beyond the window, the budget falls linearly from layer to layer."""

    name = "pyramidkv"

    def allocate(self, scores: Tensor, pairs: int) -> Tensor:
        """Returns the mask bool [P, KVH, tokens] of exactly `pairs` pairs."""
        return pyramid(scores, pairs, forced=self.window)
