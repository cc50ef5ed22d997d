"""What a single token may cost, and how one that is worth more than that is held to it.

Prices say what each width of each group costs beyond the seed width: bytes, or nanoseconds of this machine. A token
whose allowance is used up reads seed widths from there on; so that it does not come to that, what is left paces the
rest of the token: its multiplier m (calib/runtime/token_sensitivity.py) is kept to

    m <= (left / rest) ** gain

where rest is what the groups still to come cost on average at m = 1, and gain the inverse of how fast that grows with
m. So the planes that are given up are those of least worth among all groups, not all those of the last layers.
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
class Prices:
    """seed: of a token that reads seed widths. extra: int64 [G, B - 1], of each width of each group beyond that."""

    seed_bits: int
    seed: int
    extra: Tensor

    def of(self, bits: Sequence[int]) -> int:
        """What a token costs that reads these widths. bits: [G], held by their groups; the seed width is the first."""
        step = np.asarray(bits) - self.seed_bits
        return self.seed + int(
            np.where(step > 0, self.extra.numpy()[np.arange(len(step)), step - 1], 0).sum()
        )

    @classmethod
    def in_bytes(cls, groups: Sequence[Group]) -> Prices:
        """Planes, tables and scales."""
        return cls(
            groups[0].seed_bits,
            sum(g.bytes_at[0] for g in groups),
            _table(groups, [g.bytes_at for g in groups]),
        )

    @classmethod
    def in_nanoseconds(cls, groups: Sequence[Group], seed_ms: float, plane_ms: Sequence[float]) -> Prices:
        """seed_ms: of a step at seed widths. plane_ms: what each further plane adds where every group reads it; a group
        takes the share of its weights."""
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
class Allowance:
    """most: what a token may cost, the seed widths included; these are read in any case."""

    most: int
    prices: Prices

    @property
    def spare(self) -> int:
        """Beyond the seed widths."""
        return max(0, self.most - self.prices.seed)


@dataclass(frozen=True)
class Pace:
    """rest: float32 [G], what this group and those behind it cost on average beyond the seed width, at m = 1."""

    rest: Tensor
    gain: float

    @classmethod
    def of(cls, prices: Prices, profile: CalibrationProfile, thresholds: np.ndarray) -> Pace:
        """For a rule with these thresholds, float32 [G, steps]."""
        extra = prices.extra.numpy()
        marginal = np.diff(np.where(extra == NEVER, 0, extra), axis=1, prepend=0)

        def cost(log_m: float) -> np.ndarray:  # [G]
            return np.asarray((profile.exceeded(thresholds * math.exp(-log_m)) * marginal).sum(1))

        rest = cost(0.0)[::-1].cumsum()[::-1]
        low, high = (cost(s).sum() for s in (-STEP, STEP))
        grows = math.log(high / low) / (2 * STEP) if high > low > 0 else 0.0
        gain = min(max(1 / grows, GAINS[0]), GAINS[1]) if grows else GAINS[1]
        return cls(torch.from_numpy(rest.astype(np.float32)), gain)

    def limit(self, left: Tensor, group: int) -> Tensor:
        """What m is kept to at a group, float32 of left's shape."""
        return (left / self.rest[group].clamp(min=1e-30)).pow(self.gain)
