"""The loop of a text: read the prompt, then for each token choose, step, sample.

Without drafts this file is all there is to decoding. With drafts, several tokens are decoded in one pass
(dpllm/decode/speculation/continuation.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpllm.decode.sampling import Sampler
from dpllm.decode.step import Stepped, TokenStep
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.model.decoder import Decoder
from dpllm.policies.base import TextPolicy

PREFILL_CHUNK = 512  # tokens of a prompt that are read in one pass

# Gives the policy of a text before each token: the one it is given, which may have been steered, or another one.
Choose = Callable[["TextPolicy | None"], "TextPolicy | None"]
Clock = Callable[[], float]


class Decoded(NamedTuple):
    """One more token of a text. stepped: the step from whose logits the token was drawn; its `bits` are None where the
    prompt was read. ms: to be added to the time that the token took, where the tokens of one pass share its time.
    step_ms, sampling_ms: time of the step, and of drawing the token; 0 where the prompt was read."""

    token: int
    stepped: Stepped
    ms: float = 0.0
    step_ms: float = 0.0
    sampling_ms: float = 0.0


class Continuation:
    """One text, decoded a token at a time after what its cache holds."""

    def __init__(
        self,
        decoder: Decoder,
        step: TokenStep,
        cache: KVCache,
        sampler: Sampler,
        clock: Clock = time.perf_counter,
    ):
        """clock: gives the time in seconds."""
        self.decoder, self.step, self.cache, self.sampler, self.clock = decoder, step, cache, sampler, clock

    def tokens(self, prompt: Sequence[int], choose: Choose, limit: int) -> Iterator[Decoded]:
        """Yields up to `limit` tokens that follow the prompt."""
        self.cache.runs(len(prompt) + limit)  # room for all of it at once
        stepped = read_prompt(self.decoder, prompt, self.cache)
        token = self.sampler(stepped.logits[-1])
        yield Decoded(token, stepped)

        largest, clock = self.sampler.options.takes_largest, self.clock
        text: TextPolicy | None = None
        for _ in range(limit - 1):
            self.step.learn(
                text, stepped, token
            )  # before `choose` may steer: a miss counts against its own target
            chosen = choose(text)
            if chosen is not text and chosen is not None:  # it did not choose the widths of the last step
                chosen.learn(stepped.logits, torch.tensor([token]))
            text = chosen
            began = clock()
            stepped = self.step(token, self.cache, text)
            done = clock()
            token = stepped.greedy if largest else self.sampler(stepped.logits[-1])
            yield Decoded(token, stepped, 0.0, (done - began) * 1e3, (clock() - done) * 1e3)

    def unused(self) -> tuple[float, float]:
        """(ms, bytes) spent on tokens that were decoded but not yielded. Without drafts there are none."""
        return 0.0, 0.0

    def drop(self) -> None:
        """Takes tokens that were decoded but not yielded out of the cache again."""


@torch.no_grad()
def read_prompt(decoder: Decoder, ids: Sequence[int], cache: KVCache) -> Stepped:
    """Reads tokens into the cache at the resident maximum, in chunks. Returns the logits after the last one."""
    for chunk in torch.tensor(list(ids), device=decoder.device).split(PREFILL_CHUNK):
        logits: Tensor = decoder.forward(chunk, cache, last_only=True)
    read = sum(g.bytes_at[-1] for g in decoder.groups if g.bytes_at)
    return Stepped(logits, None, -1, 0.0, read + decoder.head_bytes())
