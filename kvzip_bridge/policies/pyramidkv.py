"""SnapKV's scores, with more pairs for lower layers (PyramidKV, arXiv:2406.02069)."""

from __future__ import annotations

from torch import Tensor

from dpllm.kvzip_bridge.budget import pyramid
from dpllm.kvzip_bridge.policies.snapkv import SnapKV


class PyramidKV(SnapKV):
    """Every head keeps the window; what is left of the budget falls linearly over the layers."""

    name = "pyramidkv"

    def allocate(self, scores: Tensor, pairs: int) -> Tensor:
        """The mask bool [P, KVH, tokens] of exactly `pairs` pairs."""
        return pyramid(scores, pairs, forced=self.window)
