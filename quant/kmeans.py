"""Nested weighted 1-D k-means: a seed clustering, whose clusters are split in two for every further bit.

Rows are sorted once. In sorted order a cluster is an interval, and its centroid a difference of prefix sums. The best
split of a cluster is found exactly, by scoring every cut (Any-Precision LLM, arXiv:2402.10517). The seed is
SqueezeLLM's sensitivity-weighted k-means (arXiv:2306.07629). The definition runs on one block of rows at a time, in
flat float64 arrays, so numpy does the work and the block stays in cache. Native kernels compute the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dpllm.kernels.cpu.quantising import QuantiserKernels
from dpllm.kernels.weight import MAX_TABLE_BITS, derived_table

LLOYD_ITERATIONS = 50
BLOCK_WEIGHTS = 1 << 16  # float64 work arrays of one block stay within a core's L2 cache


@dataclass
class _Sorted:
    """A block of rows in ascending order with prefix sums; flat index = row * (n + 1) + position."""

    values: np.ndarray  # [R, n] float64
    order: np.ndarray  # [R, n] int64
    weight: np.ndarray  # [R, n + 1] prefix sums of the weights
    moment: np.ndarray  # [R, n + 1] prefix sums of weight * value

    @classmethod
    def of(cls, w: np.ndarray, f: np.ndarray) -> _Sorted:
        order = np.argsort(w, axis=1, kind="stable")
        values = np.take_along_axis(w, order, 1).astype(np.float64)
        weights = np.take_along_axis(f, order, 1).astype(np.float64)
        zero = np.zeros((len(w), 1))
        return cls(
            values,
            order,
            np.concatenate([zero, weights.cumsum(1)], 1),
            np.concatenate([zero, (weights * values).cumsum(1)], 1),
        )

    def centroids(self, bounds: np.ndarray, parent: np.ndarray | None = None) -> np.ndarray:
        """Weighted means [R, C] of the intervals bounds [R, C+1].

        An empty interval takes its parent's mean (parent: [R, C/2]), or a neighbouring value without parents.
        """
        mass = np.diff(np.take_along_axis(self.weight, bounds, 1), axis=1)
        moment = np.diff(np.take_along_axis(self.moment, bounds, 1), axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = moment / mass
        empty = bounds[:, 1:] == bounds[:, :-1]
        if parent is not None:
            mean = np.where(empty, np.repeat(parent, 2, axis=1), mean)
        elif empty.any():
            edge = np.minimum(bounds[:, :-1], self.values.shape[1] - 1)
            mean = np.where(empty, np.take_along_axis(self.values, edge, 1), mean)
        # Rounding in the prefix sums must not take a mean out of its interval, nor out of order.
        low = np.take_along_axis(self.values, np.minimum(bounds[:, :-1], self.values.shape[1] - 1), 1)
        high = np.take_along_axis(self.values, np.maximum(bounds[:, 1:] - 1, 0), 1)
        return np.where(empty, mean, np.clip(mean, low, high))

    def split(self, bounds: np.ndarray) -> np.ndarray:
        """Cuts each interval where two weighted means fit it best: bounds [R, C+1] -> [R, 2C+1]."""
        rows, n = self.values.shape
        sizes = np.diff(bounds, axis=1)

        # Scores of all cuts: position i puts [a, i) left and [i, b) right; larger is better.
        def spread(edge: np.ndarray, sums: np.ndarray) -> np.ndarray:
            return np.repeat(np.take_along_axis(sums, edge, 1).ravel(), sizes.ravel()).reshape(rows, n)

        begin, end = bounds[:, :-1], bounds[:, 1:]
        score = np.zeros((rows, n))
        for edge, sign in ((begin, 1.0), (end, -1.0)):
            mass = (self.weight[:, :n] - spread(edge, self.weight)) * sign
            moment = (self.moment[:, :n] - spread(edge, self.moment)) * sign
            np.square(moment, out=moment)
            # An empty or weightless side adds nothing to the score.
            score += np.divide(moment, mass, out=np.zeros_like(moment), where=mass > 0)
        flat = (begin + np.arange(rows)[:, None] * n).ravel()
        full = sizes.ravel() > 0
        starts = flat[full]
        best = np.maximum.reduceat(score.ravel(), starts)
        hits = np.flatnonzero(score.ravel() == np.repeat(best, sizes.ravel()[full]))
        cuts = flat.copy()
        cuts[full] = hits[np.searchsorted(hits, starts)]
        middle = cuts.reshape(begin.shape) - np.arange(rows)[:, None] * n
        middle = np.where(sizes > 0, middle, begin)
        out = np.empty((rows, 2 * begin.shape[1] + 1), bounds.dtype)
        out[:, 0::2] = bounds
        out[:, 1::2] = middle
        return out

    def lloyd(self, bounds: np.ndarray) -> np.ndarray:
        """Runs weighted k-means from these intervals, until no value changes its cluster. Returns bounds [R, C+1]."""
        bounds = bounds.copy()
        active = np.arange(len(bounds))
        for _ in range(LLOYD_ITERATIONS):
            centres = self.centroids(bounds)
            middle = (centres[:, 1:] + centres[:, :-1]) / 2
            moved = [r for r in active if self._reassign(int(r), middle[r], bounds)]
            if not moved:
                break
            active = np.asarray(moved)
        return bounds

    def _reassign(self, row: int, middle: np.ndarray, bounds: np.ndarray) -> bool:
        new = np.searchsorted(self.values[row], middle)
        if np.array_equal(new, bounds[row, 1:-1]):
            return False
        bounds[row, 1:-1] = new
        return True


def nested_codes(
    w: np.ndarray,
    f: np.ndarray,
    seed_bits: int,
    parent_bits: int,
    kernels: QuantiserKernels | None = None,
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Computes nested codes and tables of each row.

    w: float32 [R, n] values; f: float32 [R, n] non-negative weights (a row of zeros counts as uniform). kernels: the
    native ones; None: numpy.
    Returns (codes uint8 [R, n] of parent_bits, {bits: float16 [R, 2^bits]} for widths up to 6).
    Tables are ascending; code c of width b covers codes 2c and 2c+1 of width b+1.
    """
    if kernels is not None:
        return _native_codes(w, _usable_weights(f), seed_bits, parent_bits, kernels)
    codes = np.empty(w.shape, np.uint8)
    free = range(seed_bits, min(parent_bits, MAX_TABLE_BITS) + 1)
    tables = {b: np.empty((len(w), 2**b), np.float16) for b in free}
    step = max(1, BLOCK_WEIGHTS // w.shape[1])
    for first in range(0, len(w), step):
        block = slice(first, first + step)
        codes[block], block_tables = _nested_block(
            w[block], _usable_weights(f[block]), seed_bits, parent_bits
        )
        for b, table in block_tables.items():
            tables[b][block] = table
    return codes, tables


def _native_codes(
    w: np.ndarray, f: np.ndarray, seed_bits: int, parent_bits: int, kernels: QuantiserKernels
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    free = min(parent_bits, MAX_TABLE_BITS)
    values, weights = (torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (w, f))
    found, centres = kernels.nested_codes(values, weights, seed_bits, free, LLOYD_ITERATIONS)
    tables = {
        b: centres[:, i, : 2**b].numpy().astype(np.float16) for i, b in enumerate(range(seed_bits, free + 1))
    }
    codes = found.numpy()
    for b in range(free + 1, parent_bits + 1):
        codes = _derived_split(w.astype(np.float64), codes, tables[MAX_TABLE_BITS], b)
    return codes, tables


def _usable_weights(f: np.ndarray) -> np.ndarray:
    """Weights with a small floor, so that every value counts. Rows of zeros become uniform."""
    mean = f.mean(1, keepdims=True, dtype=np.float64)
    return np.where(mean > 0, f / np.where(mean > 0, mean, 1), 1.0) + 1e-6


def _nested_block(w: np.ndarray, f: np.ndarray, seed_bits: int, parent_bits: int):
    rows, n = w.shape
    data = _Sorted.of(w, f)
    bounds = np.tile(np.asarray([0, n]), (rows, 1))
    for _ in range(seed_bits):
        bounds = data.split(bounds)
    bounds = data.lloyd(bounds)
    centres = data.centroids(bounds)
    tables = {seed_bits: centres.astype(np.float16)}
    for b in range(seed_bits + 1, min(parent_bits, MAX_TABLE_BITS) + 1):
        bounds = data.split(bounds)
        centres = data.centroids(bounds, parent=centres)
        tables[b] = centres.astype(np.float16)
    width = min(parent_bits, MAX_TABLE_BITS)
    labels = np.tile(np.arange(2**width, dtype=np.uint8), rows)
    ranked = np.repeat(labels, np.diff(bounds, axis=1).ravel()).reshape(rows, n)
    for b in range(MAX_TABLE_BITS + 1, parent_bits + 1):
        ranked = _derived_split(data.values, ranked, tables[MAX_TABLE_BITS], b)
    codes = np.empty((rows, n), np.uint8)
    np.put_along_axis(codes, data.order, ranked, 1)
    return codes, tables


def _derived_split(values: np.ndarray, codes: np.ndarray, centres: np.ndarray, bits: int) -> np.ndarray:
    """Adds one bit for a width without its own table: the nearer of the two derived values."""
    table = derived_table(torch.from_numpy(centres), bits).numpy().astype(np.float64)
    middle = (table[:, 0::2] + table[:, 1::2]) / 2
    upper = values > np.take_along_axis(middle, codes.astype(np.int64), 1)
    return (codes * 2 + upper).astype(np.uint8)
