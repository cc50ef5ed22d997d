"""Records queries while a context is read, by wrapping the cache that the decoder writes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dpllm.kvzip_bridge.attention import SINKS, AttentionKernels, rotate
from dpllm.kvzip_bridge.cache import KVCache

if TYPE_CHECKING:
    from dpllm.kvzip_bridge.model_view import ModelView

Watch = Callable[[int, Tensor, int], None]  # (layer, rotated queries [T, H, D], position of the first)


class WatchedCache:
    """A cache that passes the queries of every attention to `watch` and every call to the cache that it wraps."""

    def __init__(self, cache: KVCache, watch: Watch):
        self._cache, self._watch = cache, watch

    def __getattr__(self, name: str):
        return getattr(self._cache, name)

    def attend(
        self, layer: int, q: Tensor, scale: float, window: int | None, kernels: AttentionKernels
    ) -> Tensor:
        """Computes the attention of the T tokens just written. q: [T, H, D]. Returns [T, H, D]."""
        self._watch(layer, q, self._cache.length)
        return self._cache.attend(layer, q, scale, window, kernels)


def watched(cache: KVCache, watch: Watch) -> KVCache:
    """Wraps a cache in a WatchedCache, typed as KVCache: type checkers do not see that it passes every call on."""
    return cast(KVCache, WatchedCache(cache, watch))


@dataclass(frozen=True)
class QueriesWanted:
    """The queries that a policy needs.

    last: the number of latest queries to record, after rotation. statistics: whether to record the mean and
    covariance of all queries before rotation."""

    last: int = 0
    statistics: bool = False


class Queries:
    """Records the queries of a model's pruned layers. `watch` is called for every piece of the text, in order.

    Where no query is wanted, a call costs one look-up in an empty set.
    """

    def __init__(self, wanted: QueriesWanted, model: ModelView):
        self._wanted, self._inv_freq, self._rotates = wanted, model.inv_freq, model.rotates
        self._layers = frozenset(model.layers) if wanted != QueriesWanted() else frozenset()
        self._latest: dict[int, Tensor] = {}
        self._moments: dict[int, _Moments] = {}

    def watch(self, layer: int, q: Tensor, position: int) -> None:
        """Records the rotated queries [T, H, D] of one layer. position: the position of the first query."""
        if layer not in self._layers:
            return
        if self._wanted.last:
            new = q[-self._wanted.last :].detach().float()
            old = self._latest.get(layer, new[:0])
            self._latest[layer] = torch.cat([old, new])[-self._wanted.last :]
        if self._wanted.statistics:
            if layer not in self._moments:
                self._moments[layer] = _Moments(q.shape[1], q.shape[2], q.device)
            skip = min(len(q), max(0, SINKS - position))
            self._moments[layer].add(self._unrotated(layer, q[skip:].detach().float(), position + skip))

    def latest(self, layer: int) -> Tensor:
        """Returns the last rotated queries of a layer, float32 [<= last, H, D], in order of position."""
        return self._latest[layer]

    def count(self, layer: int) -> int:
        """Returns the number of queries in the statistics. The queries of the text's first tokens are left out."""
        return self._moments[layer].count

    def mean(self, layer: int) -> Tensor:
        """Returns the mean of the queries before rotation, float32 [H, D]; zeros where there were none."""
        return self._moments[layer].mean.float()

    def covariance(self, layer: int) -> Tensor:
        """Returns the covariance of the queries before rotation, divided by their count: float32 [H, D, D]."""
        moments = self._moments[layer]
        return (moments.products / max(1, moments.count)).float()

    def _unrotated(self, layer: int, q: Tensor, position: int) -> Tensor:
        if not self._rotates[layer]:
            return q
        cos, sin = angles(self._inv_freq, position, position + len(q))
        return rotate(q, cos[:, None], -sin[:, None])


class _Moments:
    """Running mean and products of deviations of rows [H, D] (Welford's recurrence over pieces, Chan et al., 1979).

    Products are computed in float32, which is accurate enough because deviations from a piece's own mean are small.
    Sums over pieces are float64.
    """

    def __init__(self, heads: int, dim: int, device: torch.device):
        self.count = 0
        self.mean = torch.zeros(heads, dim, dtype=torch.float64, device=device)
        self.products = torch.zeros(heads, dim, dim, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Adds more rows, float32 [T, H, D]."""
        if not len(x):
            return
        mean = x.mean(0, dtype=torch.float64)
        apart = (x - mean.float()).transpose(0, 1)  # [H, T, D]
        total = self.count + len(x)
        shift = mean - self.mean
        self.products += (apart.mT @ apart).double()
        self.products += shift[:, :, None] * shift[:, None, :] * (self.count * len(x) / total)
        self.mean += shift * (len(x) / total)
        self.count = total


def angles(inv_freq: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, float32 [last - first, D / 2], of the rotary embedding at positions first .. last - 1."""
    position = torch.arange(first, last, dtype=torch.float32, device=inv_freq.device)
    angle = position[:, None] * inv_freq
    return angle.cos(), angle.sin()
