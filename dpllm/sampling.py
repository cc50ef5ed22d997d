"""Turning logits into a token."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """One token id from logits [vocab]; greedy at temperature 0.

    top_p keeps the smallest set of tokens whose probability reaches top_p (always at least one).
    """
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.double()  # and from the maximum down: no temperature is too small to divide by
    p = ((logits - logits.max()) / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = p.sort(descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        p = torch.zeros_like(p).scatter_(0, order, ranked)
    return int(torch.multinomial(p.cpu(), 1, generator=generator))
