"""SnapKV's scores, with a budget that heads compete for (AdaKV, arXiv:2407.11550)."""

from __future__ import annotations

from dpllm.kvzip_bridge.budget import with_safeguard
from dpllm.kvzip_bridge.policies.snapkv import SnapKV


class AdaKV(SnapKV):
    """Scores pairs as SnapKV does; the heads of a layer compete for four fifths of its budget."""

    name = "adakv"
    allocate = staticmethod(with_safeguard)
