"""Policies that do not look at the input: fixed widths, and random widths as a control."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dpllm.model.decoder import Group


class StaticPolicy:
    """One width per group, the same for every token. The uniform policy is the case of equal widths."""

    extra_bytes = 0

    def __init__(self, bits: list[int], name: str = "static"):
        self.bits, self.name = bits, name

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """The group's width, T times."""
        return torch.full((len(x),), self.bits[group.index], dtype=torch.int32, device=x.device)


class RandomPolicy:
    """Each token and group draws one of the two widths around the target: the control that spends the
    same bits without looking."""

    extra_bytes = 0
    name = "random"

    def __init__(self, target_bits: float, groups: int, seed: int = 0):
        self.low = int(np.floor(target_bits))
        self.share = target_bits - self.low
        # One stream per group: the n-th draw belongs to the n-th position, however positions are batched.
        self.streams = [np.random.default_rng([seed, g]) for g in range(groups)]

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """floor(target) or one more, with the odds that give the target on average."""
        upper = self.streams[group.index].random(len(x)) < self.share
        drawn = np.minimum(self.low + upper, group.resident_bits)
        return torch.as_tensor(drawn, dtype=torch.int32, device=x.device)
