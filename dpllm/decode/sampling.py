"""From logits to a token: temperature, top-k, top-p, min-p and repetition penalty, in the order of transformers.

The order is penalty, temperature, top-k, top-p, min-p, each with the numbers of transformers' LogitsProcessor of the
same name (tests/unit/test_sampling.py compares them).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpllm.base.errors import InputError


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn. Raises InputError for values outside their range.

    temperature: 0 takes the likeliest token. top_k: keep the k likeliest tokens; 0 keeps all. top_p: keep the smallest
    set of tokens whose probability reaches top_p. min_p: drop tokens less likely than min_p times the likeliest one.
    repetition_penalty: divide the positive logits of tokens that are in the text already by this number, and multiply
    the negative ones; 1 changes nothing. seed: of the random numbers; None draws other numbers every time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must lie in (0, 1].")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}; it must lie in [0, 1].")
        if not 0 < self.repetition_penalty < float("inf"):
            raise InputError(
                f"repetition_penalty is {self.repetition_penalty}; it must be more than 0 (1 changes nothing)."
            )

    @property
    def takes_largest(self) -> bool:
        """Whether the token is that of the largest logit, so that a decode step's own argmax serves."""
        return self.temperature == 0 and self.repetition_penalty == 1


class SamplerState(NamedTuple):
    """What the next draw depends on: state of the random numbers (None: none are used), count of penalised tokens."""

    random: Tensor | None
    seen: int


class Sampler:
    """Draws the tokens of one text. On a GPU nothing but the token leaves the device."""

    def __init__(
        self, options: SamplingOptions = SamplingOptions(), generator: torch.Generator | None = None
    ):
        self.options = options
        if generator is None:
            generator = torch.Generator()
            # Without a seed, torch.manual_seed still decides what is drawn.
            seed = int(torch.randint(2**62, ())) if options.seed is None else options.seed
            generator.manual_seed(seed)
        self.generator = generator
        self._penalised: dict[
            int, None
        ] = {}  # tokens of the text, in their order; a set that can be cut back

    def read(self, tokens: Iterable[int]) -> None:
        """Takes in tokens of the text that were not drawn here: the prompt."""
        if self.options.repetition_penalty != 1:
            self._penalised.update(dict.fromkeys(tokens))

    def __call__(self, logits: Tensor) -> int:
        """One token id from logits [vocab]."""
        options = self.options
        if options.repetition_penalty != 1 and self._penalised:
            logits = penalised(logits, list(self._penalised), options.repetition_penalty)
        if options.temperature == 0:
            token = int(logits.argmax())
        elif logits.device.type != "cpu":
            token = int(drawn(logits, options, float(torch.rand((), generator=self.generator))))
        else:
            token = int(torch.multinomial(probabilities(logits, options), 1, generator=self.generator))
        self.read((token,))
        return token

    def state(self) -> SamplerState:
        """What the next draw depends on."""
        random = None if self.options.temperature == 0 else self.generator.get_state()
        return SamplerState(random, len(self._penalised))

    def go_back(self, state: SamplerState) -> None:
        """Makes the next draws those that followed `state`."""
        if state.random is not None:
            self.generator.set_state(state.random)
        while len(self._penalised) > state.seen:
            self._penalised.popitem()

    def twin(self) -> Sampler:
        """Another sampler that will draw with the same random numbers, without using this one's up."""
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        twin = Sampler(self.options, generator)
        twin._penalised = dict(self._penalised)
        return twin


def penalised(logits: Tensor, tokens: list[int], penalty: float) -> Tensor:
    """Logits [vocab] with those of the given tokens made less likely (Keskar et al. 2019, arXiv:1909.05858)."""
    index = torch.tensor(tokens, device=logits.device)
    chosen = logits[index]
    return logits.index_copy(0, index, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def probabilities(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Probabilities float64 [vocab] of the tokens, those that are dropped at 0. logits: [vocab]; temperature > 0."""
    scores = logits.double()  # and from the maximum down: no temperature is too small to divide by
    scores = (scores - scores.max()) / options.temperature
    if 0 < options.top_k < len(scores):
        least = scores.topk(options.top_k).values[-1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    p = scores.softmax(-1)
    if options.top_p < 1:
        ranked, order = p.sort(descending=True)
        ranked[ranked.cumsum(-1) - ranked >= options.top_p] = 0
        p = torch.zeros_like(p).scatter_(0, order, ranked)
    if options.min_p > 0:
        p = p.masked_fill(p < options.min_p * p.max(), 0)
    return p


def drawn(logits: Tensor, options: SamplingOptions, u: float) -> Tensor:
    """int64 [1]: the token at u in [0, 1) of the distribution function, likeliest tokens first. logits: [vocab].

    `torch.multinomial` draws other tokens from the same distribution.
    """
    p, order = ((logits.float() - logits.max()) / options.temperature).softmax(-1).sort(descending=True)
    up_to = p.double().cumsum(-1)
    kept = torch.tensor(len(p), device=p.device)
    if 0 < options.top_k < len(p):  # tokens as likely as the last one stay
        kept = (p >= p[options.top_k - 1]).sum()
    among = up_to.gather(0, (kept - 1)[None])
    kept = torch.minimum(kept, (up_to - p < options.top_p * among).sum().clamp(min=1))
    if options.min_p > 0:
        kept = torch.minimum(kept, (p >= options.min_p * p[0]).sum().clamp(min=1))
    total = up_to.gather(0, (kept - 1)[None])
    at = torch.minimum((up_to <= u * total).sum()[None], kept - 1)
    return order.gather(0, at)
