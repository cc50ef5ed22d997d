"""One decode step: a token in, logits out. `TokenStep` is the interface, `DecoderStep` its definition in torch.

The native step for CPUs (cpu_step.py) and the captured step for GPUs (gpu_step.py) compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpllm.kvzip_bridge.cache import KVCache
from dpllm.model.decoder import Decoder
from dpllm.policies.base import Recorder, TextPolicy, WidthSums


class Stepped(NamedTuple):
    """What a step found after one token.

    logits: float32 [1, vocab], valid until the next call of the same step. bits: int32 [1, G] on the CPU, the width
    that each group read; None where nothing chooses. greedy: the token of the largest logit. effective_bits: mean of
    `bits`, weighted by matrix size; 0 without bits. weight_bytes: read from memory: planes, tables, scales, head and
    the policy's own.
    """

    logits: Tensor
    bits: Tensor | None
    greedy: int
    effective_bits: float
    weight_bytes: int


class TokenStep:
    """Decodes the tokens of one text, one at a time. Texts that are decoded side by side need a step each."""

    def __call__(self, token: int, cache: KVCache, text: TextPolicy | None) -> Stepped:
        """Decodes one more token, whose pair joins the cache. text: chooses the widths; None for a model that is not
        quantised. Raises what the policy raises."""
        raise NotImplementedError

    def learn(self, text: TextPolicy | None, stepped: Stepped, token: int) -> None:
        """Lets the text's policy learn from a step and from the token that follows."""
        if text is not None and text.stepwise:
            text.learn(stepped.logits, torch.tensor([token]), stepped.effective_bits)


class DecoderStep(TokenStep):
    """The step as torch operations: what every other step is compared with. Runs on every device."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.sums = WidthSums(decoder.groups)

    @torch.no_grad()
    def __call__(self, token: int, cache: KVCache, text: TextPolicy | None) -> Stepped:
        """See TokenStep."""
        logits, bits = self.several([token], cache, text)
        return accounted(self.decoder, self.sums, text, logits, bits)

    @torch.no_grad()
    def several(
        self, tokens: Sequence[int], cache: KVCache, text: TextPolicy | None
    ) -> tuple[Tensor, Tensor | None]:
        """(logits [T, vocab], bits int32 [T, G] on the CPU) of T more tokens in one pass."""
        recorder = None if text is None else Recorder(text, self.decoder.groups)
        ids = torch.tensor(list(tokens), device=self.decoder.device)
        logits = self.decoder.forward(ids, cache, recorder)
        return logits, None if recorder is None else recorder.bits()


def accounted(
    decoder: Decoder, sums: WidthSums, text: TextPolicy | None, logits: Tensor, bits: Tensor | None,
    greedy: int | None = None,
) -> Stepped:  # fmt: skip
    """A step's result with its sums. bits: int32 [1, G] on the CPU."""
    greedy = int(logits[-1].argmax()) if greedy is None else greedy
    if bits is None or text is None:
        return Stepped(logits, None, greedy, 0.0, decoder.head_bytes())
    read = sums.read_together(bits) + decoder.head_bytes() + text.extra_bytes
    return Stepped(logits, bits, greedy, float(sums.effective_bits(bits)[0]), read)
