"""Keeps the pairs that future queries are expected to attend to (Expected Attention, arXiv:2510.00636)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpllm.kvzip_bridge.attention import SINKS, rotate
from dpllm.kvzip_bridge.budget import with_safeguard
from dpllm.kvzip_bridge.interfaces import ScoringInput
from dpllm.kvzip_bridge.policies.common import Policy, blocks, by_layer
from dpllm.kvzip_bridge.query_recording import QueriesWanted, angles


class ExpectedAttention(Policy):
    """Keeps the pairs with the highest expected attention of future queries, modelled as Gaussian.

    Future queries have the mean m and covariance C of the queries that read the context, taken before rotation and
    then rotated by the mean rotation of the next `future` positions. The expectation of exp(q.k scale) is then
    exp(k.m scale + k.C.k scale^2 / 2). It is normalised over the keys and averaged over the query heads of a KV head.
    A score is this expected attention plus `floor`, times the norm of the value: `floor` lets the value count where
    little attention is expected. The first four tokens are always kept, and are left out of the normalisation. Heads
    compete as in AdaKV.
    """

    name = "expected-attention"
    wants = QueriesWanted(statistics=True)
    allocate = staticmethod(with_safeguard)

    def __init__(self, future: int = 512, floor: float = 0.01):
        self.future, self.floor = future, floor

    def score(self, context: ScoringInput) -> Tensor:
        """Returns (expected attention + floor) * ||v||, float32 [P, KVH, tokens]."""
        return by_layer(context, self._layer)

    def _layer(self, context: ScoringInput, layer: int) -> Tensor:
        heads, scored = context.model.kv_heads, len(context.ids) - max(context.first, SINKS)
        sinks = max(0, context.tokens - max(0, scored))
        mean, covariance = (t.unflatten(0, (heads, -1)) for t in self._future_queries(context, layer))
        scale = context.model.scale
        mean, covariance = mean * scale, covariance * (scale * scale / 2)
        logits, norms = [mean.new_empty(*mean.shape[:2], 0)], [mean.new_empty(heads, 0)]
        for _, k, v in blocks(context, layer, skip=SINKS):
            of_heads = [
                expected_logits(*m, k[h].float()) for h, m in enumerate(zip(mean, covariance, strict=True))
            ]
            logits.append(torch.stack(of_heads))
            norms.append(torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32))
        attention = torch.cat(logits, -1).softmax(-1).mean(1)  # [KVH, keys]
        scores = (attention + self.floor) * torch.cat(norms, -1)
        return F.pad(scores[:, scores.shape[1] - max(0, scored) :], (sinks, 0), value=math.inf)

    def _future_queries(self, context: ScoringInput, layer: int) -> tuple[Tensor, Tensor]:
        """Returns the mean [H, D] and the covariance [H, D, D] of the rotated queries after the context."""
        mean, covariance = context.queries.mean(layer), context.queries.covariance(layer)
        if not context.model.rotates[layer]:
            return mean, covariance
        tokens = len(context.ids)
        cos, sin = (t.mean(0) for t in angles(context.model.inv_freq, tokens, tokens + self.future))
        return rotate(mean, cos, sin), rotate(rotate(covariance, cos, sin).mT, cos, sin).mT


def expected_logits(mean: Tensor, covariance: Tensor, k: Tensor) -> Tensor:
    """Returns k.m + k.C.k, [G, n], of mean m [G, D], covariance C [G, D, D] and keys float32 [n, D]."""
    return mean @ k.T + ((k @ covariance) * k).sum(-1)
