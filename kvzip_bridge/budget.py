"""How many pairs a budget allows, and which: allocations turn scores into a keep mask of exactly so many pairs.

Every allocation takes the best scores of some set of heads. Among equal scores the smaller position comes first, then
the lower layer, then the lower head: the result does not depend on the device. Where a number of pairs does not divide
evenly, the first heads (or layers) get one more.
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
    """How much of a cache to keep, said in one of three ways. Protected pairs count.

    keep_ratio: share of all pairs. tokens: pairs a head, on average. nbytes: of the pruned layers' keys and values.
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
                f"a share of {self.keep_ratio:g} of the pairs cannot be kept. Choose a ratio above 0, up to 1."
            )
        if not 0 < given[0] < math.inf:
            raise InputError(f"a KV budget of {given[0]:g} holds nothing. Choose a number above 0.")

    def pairs(self, layers: int, kv_heads: int, length: int, protected: int, pair_bytes: int) -> int:
        """Pairs to keep of layers * kv_heads * length, the protected ones included.

        protected: leading positions that every head keeps. pair_bytes: of one key and its value. Raises InputError
        where the protected pairs alone are more than the budget.
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
                f"a KV budget of {self} keeps {pairs:,} pairs, but {needed:,} are the least: {protected} leading "
                f"tokens stay in each of {heads} heads. Give {self._least(needed, heads, length, pair_bytes)} or more."
            )
        return min(pairs, heads * length)

    def _least(self, needed: int, heads: int, length: int, pair_bytes: int) -> Budget:
        """The smallest budget of the same kind that holds the needed pairs."""
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
    """The best pairs of all layers and heads together (KVzip, arXiv:2505.23416)."""
    _check(scores, pairs)
    return _best(scores.flatten(0, 1), pairs).view(scores.shape)


def per_layer(scores: Tensor, pairs: int) -> Tensor:
    """Equally many pairs a layer, the best of its heads together."""
    _check(scores, pairs)
    counts = _split(pairs, len(scores))
    return torch.stack([_best(s, count) for s, count in zip(scores, counts, strict=True)])


def per_head(scores: Tensor, pairs: int) -> Tensor:
    """Equally many pairs a head."""
    _check(scores, pairs)
    return _best_rows(scores, _split(pairs, scores.shape[0] * scores.shape[1]))


def with_safeguard(scores: Tensor, pairs: int, share: float = 0.2) -> Tensor:
    """Equally many pairs a layer, of which each head first gets a share of its even part; the best get the rest (AdaKV,
    arXiv:2407.11550)."""
    _check(scores, pairs)
    own = int(share * pairs / (scores.shape[0] * scores.shape[1]))
    first = _best_rows(scores, [own] * (scores.shape[0] * scores.shape[1]))
    return per_layer(scores.masked_fill(first, math.inf), pairs)


def pyramid(scores: Tensor, pairs: int, forced: int = 0, steep: int = 20) -> Tensor:
    """Fewer pairs the higher the layer, falling linearly; equally many for the heads of a layer (PyramidKV,
    arXiv:2406.02069).

    Beyond what every head must hold (scores of +inf and `forced` more), the highest layer's heads get a `steep`-th of
    the mean and the lowest one's as much above it as that is below. Equal for all layers where the lowest has too few
    pairs for that.
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
    """Scores float32 [P, KVH, length] from one a head [P, KVH]: with `over_all` whole heads survive or vanish, all but
    the one where the budget ends (and its equals)."""
    return profile.float()[..., None].repeat(1, 1, length)


def _best_rows(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """The best counts[i] pairs of each head i of [P, KVH, n]."""
    rows = zip(scores.flatten(0, 1), counts, strict=True)
    return torch.stack([_best(row[None], count)[0] for row, count in rows]).view(scores.shape)


def _best(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` best of scores [heads, n]; of equal ones those of smaller position, then of lower head."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Finding the least score kept is linear in time, where sorting 8 million scores takes seconds.
    least = scores.flatten().kthvalue(scores.numel() - count + 1).values
    keep = scores > least
    position, head = (scores == least).T.nonzero()[: count - int(keep.sum())].unbind(1)
    keep[head, position] = True
    return keep


def _split(total: int, parts: int) -> list[int]:
    """Evenly, one more for the first ones."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _check(scores: Tensor, pairs: int) -> None:
    if scores.isnan().any():
        raise ValueError("scores of pairs must be numbers, but some are NaN.")
    if not 0 <= pairs <= scores.numel():
        raise ValueError(f"{pairs} pairs cannot be kept of {scores.numel()}.")
