"""What is recorded of the queries while a context is read, by standing between the decoder and its cache."""

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
    """A cache that shows the queries of every attention to `watch` and does everything else like the one behind it."""

    def __init__(self, cache: KVCache, watch: Watch):
        self._cache, self._watch = cache, watch

    def __getattr__(self, name: str):
        return getattr(self._cache, name)

    def attend(
        self, layer: int, q: Tensor, scale: float, window: int | None, kernels: AttentionKernels
    ) -> Tensor:
        """Attention of the T tokens just written. q: [T, H, D]. Returns [T, H, D]."""
        self._watch(layer, q, self._cache.length)
        return self._cache.attend(layer, q, scale, window, kernels)


def watched(cache: KVCache, watch: Watch) -> KVCache:
    """The cache, watched. Type checkers do not see that WatchedCache passes everything on."""
    return cast(KVCache, WatchedCache(cache, watch))


@dataclass(frozen=True)
class QueriesWanted:
    """What a policy needs recorded. last: so many of the latest queries, as they met the keys (rotated). statistics:
    mean and covariance of all queries before they were rotated."""

    last: int = 0
    statistics: bool = False


class Queries:
    """Records the queries of a model's pruned layers; `watch` is called for every piece of the text, in order.

    Where nothing is wanted, a call costs one look into an empty set.
    """

    def __init__(self, wanted: QueriesWanted, model: ModelView):
        self._wanted, self._inv_freq, self._rotates = wanted, model.inv_freq, model.rotates
        self._layers = frozenset(model.layers) if wanted != QueriesWanted() else frozenset()
        self._latest: dict[int, Tensor] = {}
        self._moments: dict[int, _Moments] = {}

    def watch(self, layer: int, q: Tensor, position: int) -> None:
        """Takes in the rotated queries [T, H, D] of one layer, the first of which stands at `position`."""
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
            self._moments[layer].add(self._turned_back(layer, q[skip:].detach().float(), position + skip))

    def latest(self, layer: int) -> Tensor:
        """The last rotated queries, float32 [<= last, H, D] in order of position."""
        return self._latest[layer]

    def count(self, layer: int) -> int:
        """How many queries the statistics are of: all but those of the text's first tokens."""
        return self._moments[layer].count

    def mean(self, layer: int) -> Tensor:
        """Of the queries before they were rotated, float32 [H, D]; zeros where there were none."""
        return self._moments[layer].mean.float()

    def covariance(self, layer: int) -> Tensor:
        """Of the queries before they were rotated, divided by their count: float32 [H, D, D]."""
        moments = self._moments[layer]
        return (moments.products / max(1, moments.count)).float()

    def _turned_back(self, layer: int, q: Tensor, position: int) -> Tensor:
        if not self._rotates[layer]:
            return q
        cos, sin = angles(self._inv_freq, position, position + len(q))
        return rotate(q, cos[:, None], -sin[:, None])


class _Moments:
    """Running mean and products of deviations of x [T, H, D]: Welford's recurrence over pieces (Chan et al., 1979).

    Deviations from a piece's own mean are small, so that float32 products lose nothing that matters; sums over pieces
    are float64.
    """

    def __init__(self, heads: int, dim: int, device: torch.device):
        self.count = 0
        self.mean = torch.zeros(heads, dim, dtype=torch.float64, device=device)
        self.products = torch.zeros(heads, dim, dim, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Takes in more rows, float32."""
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
    """cos and sin, float32 [last - first, D / 2], of the rotary embedding at positions first .. last - 1."""
    position = torch.arange(first, last, dtype=torch.float32, device=inv_freq.device)
    angle = position[:, None] * inv_freq
    return angle.cos(), angle.sin()
