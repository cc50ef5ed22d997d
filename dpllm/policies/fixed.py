"""Policies that do not look at the input: fixed widths, and random widths as a control."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from dpllm.model.decoder import Group
from dpllm.policies.base import PrecisionPolicy, TextPolicy


class StaticPolicy(PrecisionPolicy, TextPolicy):
    """One width for each group, the same for every token. It remembers nothing, so all texts share the object.

    The uniform policy is the case of equal widths.
    """

    def __init__(self, bits: Sequence[int], name: str = "static"):
        self.fixed_bits: list[int] = list(bits)
        self.name = name

    def begin_text(self) -> TextPolicy:
        """Returns the policy itself."""
        return self

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """Returns the group's width for each row of x [T, K], int32 [T]."""
        return torch.full((len(x),), self.fixed_bits[group.index], dtype=torch.int32, device=x.device)

    def passes_limited_to_one(self) -> str | None:
        """Returns None: widths do not depend on how tokens are grouped into passes."""
        return None


class RandomPolicy(PrecisionPolicy):
    """Each token and group draws one of the two widths around the target: a control that spends the same bits without
    looking at the input. Every text of a policy draws other numbers; the n-th text of the same seed repeats them."""

    name = "random"

    def __init__(self, target_bits: float, groups: int, seed: int = 0):
        self.low = int(np.floor(target_bits))
        self.share = target_bits - self.low
        self.groups, self.seed = groups, seed
        self._texts = count()

    def begin_text(self) -> TextPolicy:
        """A text with random numbers of its own."""
        return RandomText(self, next(self._texts))


class RandomText(TextPolicy):
    """The random widths of one text."""

    name = RandomPolicy.name

    def __init__(self, policy: RandomPolicy, number: int):
        self.low, self.share = policy.low, policy.share
        # One stream per group: the n-th draw belongs to the n-th position, however positions are batched.
        seeds = [[policy.seed, g] if number == 0 else [policy.seed, g, number] for g in range(policy.groups)]
        self.streams = [np.random.default_rng(s) for s in seeds]

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """Draws floor(target) or one more for each row of x [T, K], with the odds that give the target on average."""
        upper = self.streams[group.index].random(len(x)) < self.share
        drawn = np.minimum(self.low + upper, group.resident_bits)
        return torch.as_tensor(drawn, dtype=torch.int32, device=x.device)
