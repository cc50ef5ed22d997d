"""Turning logits into a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """One token id from logits [vocab]; greedy at temperature 0.

    top_p keeps the smallest set of tokens whose probability reaches top_p (always at least one). On a GPU nothing but
    the token leaves it: the generator (on the CPU) gives one number, and the token is where the summed probabilities,
    largest first, exceed it; `multinomial` on the CPU draws other tokens from the same distribution.
    """
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.double()  # and from the maximum down: no temperature is too small to divide by
    if logits.device.type != "cpu":
        return int(drawn(logits, temperature, top_p, float(torch.rand((), generator=generator))))
    p = ((logits - logits.max()) / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = p.sort(descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        p = torch.zeros_like(p).scatter_(0, order, ranked)
    return int(torch.multinomial(p.cpu(), 1, generator=generator))


@dataclass(frozen=True)
class Sampler:
    """How a text's tokens are drawn, and what they are drawn with."""

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator = torch.default_generator

    def __call__(self, logits: Tensor) -> int:
        """One token id from logits [vocab]."""
        return sample(logits, self.temperature, self.top_p, self.generator)

    def state(self) -> Tensor | None:
        """What the next draw depends on; None where nothing is drawn."""
        return None if self.temperature == 0 else self.generator.get_state()

    def go_back(self, state: Tensor | None) -> None:
        """The next draws are those that followed `state`."""
        if state is not None:
            self.generator.set_state(state)

    def twin(self) -> Sampler:
        """Another that will draw with the same random numbers, without using this one's up."""
        if self.temperature == 0:
            return self
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        return Sampler(self.temperature, self.top_p, generator)


def drawn(logits: Tensor, temperature: float, top_p: float, u: float) -> Tensor:
    """int64 [1]: the token at u in [0, 1) of the distribution function, likeliest tokens first. logits: [vocab]."""
    p, order = ((logits.float() - logits.max()) / temperature).softmax(-1).sort(descending=True)
    up_to = p.double().cumsum(-1)
    kept = (up_to - p < top_p).sum().clamp(min=1)  # the first of them
    total = up_to.gather(0, (kept - 1)[None])
    at = torch.minimum((up_to <= u * total).sum()[None], kept - 1)
    return order.gather(0, at)
