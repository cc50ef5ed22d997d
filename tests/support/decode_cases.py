"""Tokens, policies and loops of the tests that decode a token at a time."""

from __future__ import annotations

import torch
from tiny_models import COMMON

from dpllm.calib.runtime.threshold_rule import ThresholdRule
from dpllm.decode.step import DecoderStep
from dpllm.policies.base import PrecisionPolicy, TextPolicy
from dpllm.policies.fixed import StaticPolicy

IDS = torch.randint(0, COMMON["vocab_size"], (20,), generator=torch.Generator().manual_seed(1)).tolist()


def varied(decoder, turn: int = 0) -> StaticPolicy:
    """Another width at every group."""
    return StaticPolicy([2 + (g.index + turn) % 5 for g in decoder.groups])


class Thresholds(PrecisionPolicy, TextPolicy):
    """A threshold rule made from what a first pass over the text saw, so that every width occurs."""

    name = "thresholds"

    def __init__(self, decoder, ids):
        rng = torch.Generator().manual_seed(2)
        self.select = decoder.backend.select
        diagonals = [torch.rand(g.weight.in_features, generator=rng).half() for g in decoder.groups]
        seen: list[list[float]] = [[] for _ in decoder.groups]

        def watch(group, x):
            seen[group.index] += ((x.double() ** 2) @ diagonals[group.index].double()).tolist()
            return torch.full((len(x),), 4, dtype=torch.int32)

        with torch.no_grad():
            decoder.forward(torch.tensor(ids), select=watch)
        shares = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
        self.thresholds = (
            torch.tensor(seen, dtype=torch.float64).quantile(shares, dim=1).T.float().contiguous()
        )
        self.rule = ThresholdRule(diagonals, list(range(len(diagonals))))

    def begin_text(self):
        return self

    def __call__(self, group, x):
        return self.select(x, self.rule.diagonals[group.index], self.thresholds[group.index], group.seed_bits)


def by_operations(decoder, policy, ids, cache=None):
    """(logits [T, V], bits [T, G]) a token at a time, by the decoder."""
    return step_by_step(decoder, DecoderStep(decoder), policy, ids, cache)


def step_by_step(decoder, step, policy, ids, cache=None):
    """The same by any step. policy: None for what is resident; a text's own policy is taken as it is."""
    cache = cache or decoder.new_cache(len(ids))
    text = policy.begin_text() if isinstance(policy, PrecisionPolicy) else policy
    found = [copied(step(i, cache, text)) for i in ids]
    bits = [b for _, b in found if b is not None]
    return torch.cat([logits for logits, _ in found]), torch.cat(bits) if bits else None


def copied(stepped):
    """(logits, bits) of a step, which the next step does not overwrite."""
    return stepped.logits.clone(), None if stepped.bits is None else stepped.bits.clone()
