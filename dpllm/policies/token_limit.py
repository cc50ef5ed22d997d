"""The limit on what a single token may cost, and the pace at which a token spends within the limit.

Costs are those of each width of each group beyond the seed width: bytes, or nanoseconds of this machine. A token that
has spent its limit reads seed widths in the remaining groups. So that this is rare, the budget that is left paces the
token: its multiplier m (calib/runtime/token_sensitivity.py) is kept to

    m <= (budget left / expected rest) ** gain

where the expected rest is what this group and all later ones cost on average at m = 1, and the gain is the inverse of
how fast that cost grows with m. The planes that are given up are then those of least worth in all groups, instead of
all planes of the last layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.kernels.gpu_step.tables import NEVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpllm.model.decoder import Group

STEP = 0.5  # of log m, up and down, over which the growth of cost is taken
GAINS = (1.0, 8.0)


@dataclass(frozen=True, eq=False)
class WidthCosts:
    """Costs of the widths of every group.

    seed_bits: the seed width. seed: cost of a token that reads seed widths everywhere. extra: int64 [G, B - 1], what
    each further width of each group costs more than the seed width; NEVER for a width that is not resident.
    """

    seed_bits: int
    seed: int
    extra: Tensor

    def of(self, bits: Sequence[int]) -> int:
        """Returns the cost of a token that reads these widths. bits: [G], each of them resident."""
        step = np.asarray(bits) - self.seed_bits
        return self.seed + int(
            np.where(step > 0, self.extra.numpy()[np.arange(len(step)), step - 1], 0).sum()
        )

    @classmethod
    def in_bytes(cls, groups: Sequence[Group]) -> WidthCosts:
        """Costs in bytes of planes, tables and scales."""
        return cls(
            groups[0].seed_bits,
            sum(g.bytes_at[0] for g in groups),
            _table(groups, [g.bytes_at for g in groups]),
        )

    @classmethod
    def in_nanoseconds(cls, groups: Sequence[Group], seed_ms: float, plane_ms: Sequence[float]) -> WidthCosts:
        """Costs in nanoseconds.

        seed_ms: time of a step at seed widths. plane_ms: time that each further plane adds where every group reads it.
        A group takes the share of its weights in that time.
        """
        total = sum(g.weights for g in groups)
        upto = np.cumsum([0.0, *plane_ms]) * 1e6
        rows = [[round(ns * g.weights / total) for ns in upto] for g in groups]
        return cls(groups[0].seed_bits, round(seed_ms * 1e6), _table(groups, rows))


def _table(groups: Sequence[Group], cost: Sequence[Sequence[int]]) -> Tensor:
    steps = max((len(g.bytes_at) for g in groups), default=1) - 1
    out = torch.full((len(groups), max(steps, 0)), NEVER, dtype=torch.int64)
    for row, g, of in zip(out, groups, cost, strict=True):
        held = len(g.bytes_at)
        row[: held - 1] = torch.tensor([c - of[0] for c in of[1:held]])
    return out


@dataclass(frozen=True)
class TokenLimit:
    """The most that a token may cost, the seed widths included. Seed widths are read in any case."""

    most: int
    width_costs: WidthCosts

    @property
    def beyond_seed(self) -> int:
        """What a token may spend beyond the seed widths."""
        return max(0, self.most - self.width_costs.seed)


@dataclass(frozen=True)
class SpendingPace:
    """The pace at which a token spends its limit, for one set of thresholds.

    expected_rest: float32 [G], what this group and all later ones cost on average beyond the seed width, at m = 1.
    gain: see the head of this file.
    """

    expected_rest: Tensor
    gain: float

    @classmethod
    def of(cls, width_costs: WidthCosts, profile: CalibrationProfile, thresholds: np.ndarray) -> SpendingPace:
        """Computes the pace from calibrated signals. thresholds: float32 [G, steps], those of the rule."""
        extra = width_costs.extra.numpy()
        marginal = np.diff(np.where(extra == NEVER, 0, extra), axis=1, prepend=0)

        def cost(log_m: float) -> np.ndarray:  # [G]
            return np.asarray((profile.exceeded(thresholds * math.exp(-log_m)) * marginal).sum(1))

        rest = cost(0.0)[::-1].cumsum()[::-1]
        low, high = (cost(s).sum() for s in (-STEP, STEP))
        grows = math.log(high / low) / (2 * STEP) if high > low > 0 else 0.0
        gain = min(max(1 / grows, GAINS[0]), GAINS[1]) if grows else GAINS[1]
        return cls(torch.from_numpy(rest.astype(np.float32)), gain)

    def largest_multiplier(self, budget_left: Tensor, group: int) -> Tensor:
        """The largest m that a group may use, float32 of the shape of budget_left."""
        return (budget_left / self.expected_rest[group].clamp(min=1e-30)).pow(self.gain)
