"""Tokens, policies and loops of the tests that decode a token at a time."""

from __future__ import annotations

import torch
from tiny_models import COMMON

from dpllm.decode.step import decode_one
from dpllm.policies.fixed import StaticPolicy

IDS = torch.randint(0, COMMON["vocab_size"], (20,), generator=torch.Generator().manual_seed(1)).tolist()


def varied(decoder, turn: int = 0) -> StaticPolicy:
    """Another width at every group."""
    return StaticPolicy([2 + (g.index + turn) % 5 for g in decoder.groups])


class Thresholds:
    """A threshold rule made from what a first pass over the text saw, so that every width occurs."""

    name, extra_bytes = "thresholds", 0

    def __init__(self, decoder, ids):
        rng = torch.Generator().manual_seed(2)
        self.select = decoder.backend.select
        self.diagonals = [torch.rand(g.weight.in_features, generator=rng).half() for g in decoder.groups]
        seen: list[list[float]] = [[] for _ in decoder.groups]

        def watch(group, x):
            seen[group.index] += ((x.double() ** 2) @ self.diagonals[group.index].double()).tolist()
            return torch.full((len(x),), 4, dtype=torch.int32)

        with torch.no_grad():
            decoder.forward(torch.tensor(ids), select=watch)
        shares = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
        self.thresholds = (
            torch.tensor(seen, dtype=torch.float64).quantile(shares, dim=1).T.float().contiguous()
        )

    def __call__(self, group, x):
        return self.select(x, self.diagonals[group.index], self.thresholds[group.index], group.seed_bits)


def by_operations(decoder, policy, ids, cache=None):
    """(logits [T, V], bits [T, G]) a token at a time, by the decoder."""
    return step_by_step(decoder, None, policy, ids, cache)


def step_by_step(decoder, step, policy, ids, cache=None):
    """The same by a step that decodes whole tokens; None: by the decoder."""
    cache = cache or decoder.new_cache(len(ids))
    pairs = [tuple(t.clone() for t in decode_one(decoder, step, i, cache, policy)) for i in ids]
    logits, bits = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(bits)
