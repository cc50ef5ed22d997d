"""From logits to a token: temperature, top-k, top-p, min-p and repetition penalty, in the order of transformers.

The order is penalty, temperature, top-k, top-p, min-p, each with the numbers of transformers' LogitsProcessor of the
same name (tests/unit/test_sampling.py compares them).

A token is the winner of a race. Each token has a clock that rings after an exponential time of mean 1 / probability,
and the first to ring is drawn. Clocks depend on the seed, the number of the draw and the token alone. So two similar
distributions that share the clocks mostly agree, which drafts rely on (dpllm/decode/speculation/continuation.py).
The functions of this file define what the native library computes (kernels/cpu/src/draw.h).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.kernels.cpu.kernels import CpuKernels
from dpllm.kernels.cpu.library import Draw


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
    """What the next draw depends on: the number of draws so far, the count of penalised tokens."""

    draws: int
    seen: int


class Sampler:
    """Draws the tokens of one text. On a GPU nothing but the token leaves the device."""

    def __init__(self, options: SamplingOptions = SamplingOptions(), kernels: CpuKernels | None = None):
        """kernels: draw from logits on a CPU. Without them, torch does."""
        self.options, self.kernels = options, kernels
        # Without a seed, torch.manual_seed still decides what is drawn.
        seed = int(torch.randint(2**62, ())) if options.seed is None else options.seed
        self._draw = Draw(
            temperature=options.temperature, top_p=options.top_p, min_p=options.min_p,
            penalty=options.repetition_penalty, seed=seed % 2**64, top_k=min(options.top_k, 2**31 - 1),
        )  # fmt: skip
        self._known: set[int] = set()
        self._seen = array("q")  # the same tokens in their order: penalised, and cut back by `go_back`

    def read(self, tokens: Iterable[int]) -> None:
        """Takes in tokens of the text that were not drawn here: the prompt."""
        if self.options.repetition_penalty == 1:
            return
        for token in tokens:
            if token not in self._known:
                self._known.add(token)
                self._seen.append(token)

    def __call__(self, logits: Tensor) -> int:
        """One token id from logits [vocab]."""
        options, how = self.options, self._draw
        if self.kernels is not None and logits.device.type == "cpu":
            how.seen, how.seen_count = self._seen.buffer_info()
            token = self.kernels.draw(logits, how)
        else:
            if self._seen:
                logits = penalised(logits, self._seen.tolist(), options.repetition_penalty)
            if options.temperature == 0:
                token = int(logits.argmax())
            elif logits.device.type == "cpu":
                token = first_to_ring(probabilities(logits, options), how.seed, how.number)
            else:
                u = uniform(np.asarray([NO_TOKEN], np.uint32), how.seed, how.number)
                token = int(drawn(logits, options, float(u[0])))
        how.number += 1
        if options.repetition_penalty != 1 and token not in self._known:
            self._known.add(token)
            self._seen.append(token)
        return token

    def state(self) -> SamplerState:
        """What the next draw depends on."""
        return SamplerState(self._draw.number, len(self._seen))

    def go_back(self, state: SamplerState) -> None:
        """Makes the next draws those that followed `state`."""
        self._draw.number = state.draws
        while len(self._seen) > state.seen:
            self._known.remove(self._seen.pop())

    def twin(self) -> Sampler:
        """Another sampler that will draw with the same clocks, without using this one's up."""
        twin = Sampler(self.options, self.kernels)
        twin._draw = Draw.from_buffer_copy(self._draw)
        twin._known, twin._seen = set(self._known), array("q", self._seen)
        return twin


NO_TOKEN = 2**32 - 1  # the clock that drives a draw with a single random number
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)


def uniform(tokens: np.ndarray, seed: int, number: int) -> np.ndarray:
    """float64 [n]: random numbers in (0, 1) of tokens uint32 [n] in the draw of this number.

    Threefry-2x32 with 13 rounds (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """
    keys = [np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32)]
    keys.append(np.uint32(0x1BD11BDA) ^ keys[0] ^ keys[1])
    a, b = tokens + keys[0], np.full_like(tokens, number % 2**32) + keys[1]
    for i in range(13):
        left, right = np.uint32(ROTATIONS[i % 8]), np.uint32(32 - ROTATIONS[i % 8])
        a = a + b
        b = (b << left | b >> right) ^ a
        if i % 4 == 3:
            turn = i // 4 + 1
            a, b = a + keys[turn % 3], b + keys[(turn + 1) % 3] + np.uint32(turn)
    words = a.astype(np.uint64) << np.uint64(32) | b.astype(np.uint64)
    return (words.astype(np.float64) + 0.5) * 2.0**-64


def first_to_ring(p: Tensor, seed: int, number: int) -> int:
    """The token of the first clock to ring. p: float64 [vocab], probabilities up to a factor."""
    kept = p.nonzero()[:, 0]
    if not len(kept):
        return 0
    with np.errstate(divide="ignore"):  # a clock may never ring
        clocks = -np.log1p(-uniform(kept.numpy().astype(np.uint32), seed, number))
    return int(kept[(p[kept] / torch.from_numpy(clocks)).argmax()])


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
        # Of equally likely tokens the later one counts as likelier, as with transformers.
        order = scores.argsort(stable=True).flip(0)
        ranked = p[order]
        ranked[ranked.cumsum(-1) - ranked >= options.top_p] = 0
        p = torch.zeros_like(p).scatter_(0, order, ranked)
    if options.min_p > 0:
        p = p.masked_fill(p < options.min_p * p.max(), 0)
    return p


def drawn(logits: Tensor, options: SamplingOptions, u: float) -> Tensor:
    """int64 [1]: the token at u in [0, 1) of the distribution function, likeliest tokens first. logits: [vocab].

    `first_to_ring` draws other tokens from the same distribution.
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
