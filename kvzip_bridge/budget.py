"""Budgets say how many pairs to keep; allocations turn scores into a keep mask of exactly that many pairs.

Every allocation takes the best scores of some set of heads. Among equal scores, the smaller position comes first,
then the lower layer, then the lower head, so the result does not depend on the device. Where a number of pairs does
not divide evenly, the first heads (or layers) get one more pair each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from dpllm.base.errors import InputError

Allocation = Callable[[Tensor, int], Tensor]  # (scores float32 [P, KVH, n], pairs) -> bool [P, KVH, n]


@dataclass(frozen=True)
class Budget:
    """The part of a cache to keep, given in exactly one of three units. Protected pairs count.

    keep_ratio: share of all pairs. tokens: average number of pairs of a head. nbytes: bytes of the pruned layers'
    keys and values. Raises InputError where not exactly one of them is given, or where it is out of range.
    """

    keep_ratio: float | None = None
    tokens: float | None = None
    nbytes: int | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.keep_ratio, self.tokens, self.nbytes) if v is not None]
        if len(given) != 1:
            raise InputError("a KV budget is one of keep_ratio, tokens and nbytes. Give exactly one of them.")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise InputError(
                f"keep_ratio is {self.keep_ratio:g}, which is not a share. Choose a ratio above 0, up to 1."
            )
        if not 0 < given[0] < math.inf:
            raise InputError(f"a KV budget of {given[0]:g} holds nothing. Choose a number above 0.")

    def pair_count(self, layers: int, kv_heads: int, length: int, protected: int, pair_bytes: int) -> int:
        """Returns how many of the layers * kv_heads * length pairs to keep, the protected pairs included.

        protected: number of leading positions that every head keeps. pair_bytes: bytes of one key and its value.
        Raises InputError where the protected pairs alone exceed the budget.
        """
        heads = layers * kv_heads
        if self.keep_ratio is not None:
            pairs = round(self.keep_ratio * heads * length)
        elif self.tokens is not None:
            pairs = int(self.tokens * heads)
        else:
            pairs = int(self.nbytes or 0) // pair_bytes
        needed = max(1, heads * min(protected, length))
        if pairs < needed:
            raise InputError(
                f"a KV budget of {self} keeps {pairs:,} pairs, but at least {needed:,} are needed: {protected} leading "
                f"tokens stay in each of {heads} heads. Give {self._least(needed, heads, length, pair_bytes)} or more."
            )
        return min(pairs, heads * length)

    def _least(self, needed: int, heads: int, length: int, pair_bytes: int) -> Budget:
        """Returns the smallest budget in the same unit that holds the needed pairs."""
        if self.keep_ratio is not None:
            return Budget(keep_ratio=math.ceil(needed / (heads * length) * 1e4) / 1e4)
        if self.tokens is not None:
            return Budget(tokens=math.ceil(needed / heads))
        return Budget(nbytes=needed * pair_bytes)

    def __str__(self) -> str:
        if self.keep_ratio is not None:
            return f"keep_ratio {self.keep_ratio:g}"
        return f"{self.tokens:g} tokens" if self.tokens is not None else f"{self.nbytes} bytes"


# -- allocations: scores float32 [P, KVH, n] and a number of pairs -> mask bool [P, KVH, n] -------------------


def over_all(scores: Tensor, pairs: int) -> Tensor:
    """Keeps the best pairs of all layers and heads together (KVzip, arXiv:2505.23416)."""
    _check(scores, pairs)
    return _best(scores.flatten(0, 1), pairs).view(scores.shape)


def per_layer(scores: Tensor, pairs: int) -> Tensor:
    """Gives every layer equally many pairs, and keeps the best of all its heads together."""
    _check(scores, pairs)
    counts = _split(pairs, len(scores))
    return torch.stack([_best(s, count) for s, count in zip(scores, counts, strict=True)])


def per_head(scores: Tensor, pairs: int) -> Tensor:
    """Gives every head equally many pairs, and keeps its best."""
    _check(scores, pairs)
    return _best_rows(scores, _split(pairs, scores.shape[0] * scores.shape[1]))


def with_safeguard(scores: Tensor, pairs: int, share: float = 0.2) -> Tensor:
    """Gives every layer equally many pairs, of which each head is guaranteed a part (AdaKV, arXiv:2407.11550).

    share: the guaranteed part, relative to an even split over the heads. The layer's best other pairs get the
    rest."""
    _check(scores, pairs)
    own = int(share * pairs / (scores.shape[0] * scores.shape[1]))
    first = _best_rows(scores, [own] * (scores.shape[0] * scores.shape[1]))
    return per_layer(scores.masked_fill(first, math.inf), pairs)


def pyramid(scores: Tensor, pairs: int, forced: int = 0, steep: int = 20) -> Tensor:
    """Gives higher layers fewer pairs, falling linearly, and the heads of a layer equally many (PyramidKV).

    The paper is arXiv:2406.02069. Every head holds its scores of +inf and `forced` more pairs. Of the other pairs,
    the highest layer's heads get the mean over all heads divided by `steep`, and the lowest layer's heads exceed the
    mean by as much as the highest layer's fall short of it. All layers get equally many pairs where the lowest layer
    has too few pairs for its part.
    """
    _check(scores, pairs)
    layers, heads, length = scores.shape
    held = int(scores.isposinf().sum(-1).max()) + forced
    mean = Fraction(pairs, layers * heads) - held
    top, bottom = mean / steep, mean * 2 - mean / steep
    if layers == 1 or mean < 0 or held + bottom > length:
        return per_head(scores, pairs)
    fall = (bottom - top) / (layers - 1)
    ends = [Fraction(0), *(heads * (held + bottom - fall * Fraction(i, 2)) * (i + 1) for i in range(layers))]
    counts = [round(b) - round(a) for a, b in pairwise(ends)]
    return _best_rows(scores, [part for count in counts for part in _split(count, heads)])


ALLOCATIONS: dict[str, Allocation] = {
    "over-all": over_all,
    "per-layer": per_layer,
    "per-head": per_head,
    "safeguard": with_safeguard,
    "pyramid": pyramid,
}


def head_level(profile: Tensor, length: int) -> Tensor:
    """Repeats one score per head, [P, KVH], along a text: float32 [P, KVH, length].

    With `over_all`, whole heads are kept or dropped, except the heads with the score at which the budget ends."""
    return profile.float()[..., None].repeat(1, 1, length)


def _best_rows(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns the mask of the best counts[i] pairs of each head i of scores [P, KVH, n]."""
    rows = zip(scores.flatten(0, 1), counts, strict=True)
    return torch.stack([_best(row[None], count)[0] for row, count in rows]).view(scores.shape)


def _best(scores: Tensor, count: int) -> Tensor:
    """Returns the mask of the `count` best scores of [heads, n]. Ties go to the smaller position, then head."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Finding the least score that is kept takes linear time; sorting 8 million scores would take seconds.
    least = scores.flatten().kthvalue(scores.numel() - count + 1).values
    keep = scores > least
    position, head = (scores == least).T.nonzero()[: count - int(keep.sum())].unbind(1)
    keep[head, position] = True
    return keep


def _split(total: int, parts: int) -> list[int]:
    """Splits a total evenly into parts; the first parts get one more where it does not divide."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _check(scores: Tensor, pairs: int) -> None:
    if scores.isnan().any():
        raise ValueError("scores of pairs must be numbers, but some are NaN.")
    if not 0 <= pairs <= scores.numel():
        raise ValueError(f"{pairs} pairs cannot be kept of {scores.numel()}.")
