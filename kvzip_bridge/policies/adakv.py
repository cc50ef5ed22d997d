"""SnapKV's scores, with more pairs for the heads that need them (AdaKV, arXiv:2407.11550)."""

from __future__ import annotations

from dpllm.kvzip_bridge.budget import with_safeguard
from dpllm.kvzip_bridge.policies.snapkv import SnapKV


class AdaKV(SnapKV):
    """The heads of a layer compete for four fifths of its budget."""

    name = "adakv"
    allocate = staticmethod(with_safeguard)
