"""Self-speculation: the overlay holds a cheap draft of itself.

A round drafts some tokens at a low width, or looks them up in the text so far, decodes all of them in one pass at the
widths that were asked for, and keeps those that decoding a token at a time would have given. Keys and values of the
draft are overwritten by those of the pass.

What is accepted is decided by drawing: from each row of the pass the next token is drawn as ever, with the numbers that
plain decoding would draw with, and the round goes on while that is the token that was drafted. So a text is what plain
decoding makes of it, greedy or sampled, whatever the draft and however long. A draft at a temperature draws with the
same numbers from its own logits: a draw is a race of exponential clocks, one a token (dpllm/decode/sampling.py), and
two similar distributions that share the clocks mostly agree (Daliri, Musco and Suresh 2024, arXiv:2408.07978). The rule
of Leviathan et al. 2023 (arXiv:2211.17192) accepts slightly more, 1 - d at a total variation d where this is at least
(1 - d) / (1 + d); but there the text depends on how much was drafted, here on how long things took.

Exact means: with the native step, whose rows are bit for bit those of single steps. Elsewhere a pass over several
tokens may round otherwise than single ones; tokens then differ where two are level to the last digits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dpllm.decode.continuation import Choose, Clock, Continuation, Decoded, read_prompt
from dpllm.decode.cpu_step import NativeStep
from dpllm.decode.sampling import Sampler, SamplerState
from dpllm.decode.speculation.draft_length import DraftLengths
from dpllm.decode.speculation.drafts import LAG, Draft
from dpllm.decode.speculation.tally import Tally
from dpllm.decode.step import DecoderStep, Stepped, TokenStep
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.model.decoder import Decoder
from dpllm.policies.base import TextPolicy, WidthSums


class SpeculativeContinuation(Continuation):
    """One text, decoded in passes over several tokens where drafts allow it.

    A rate-distortion policy is delayed (RateDistortionText.delay) by as many tokens as a pass can have, so that the
    widths of a position do not depend on how tokens were grouped: the text is that of plain decoding with the delayed
    policy, and under fixed widths that of plain decoding.
    """

    def __init__(
        self, decoder: Decoder, step: TokenStep, cache: KVCache, sampler: Sampler, *,
        drafts: Sequence[Draft], lengths: DraftLengths, clock: Clock, before: Sequence[int] = (),
    ):  # fmt: skip
        """before: the tokens that the cache holds. lengths: may be shared with texts that have taught it."""
        super().__init__(decoder, step, cache, sampler, clock)
        self.drafts, self.lengths = drafts, lengths
        self.tally = Tally()
        self.ids = list(before)  # all that the cache has read, and the last token
        self._by_torch = DecoderStep(decoder)
        self._sums = WidthSums(decoder.groups)
        self._ready: deque[tuple[Decoded, SamplerState]] = (
            deque()
        )  # of the last pass, with states before the draws

    def tokens(self, prompt: Sequence[int], choose: Choose, limit: int) -> Iterator[Decoded]:
        """See Continuation."""
        self.cache.runs(len(prompt) + limit)
        self.ids += prompt
        stepped = read_prompt(self.decoder, prompt, self.cache)
        token = self.sampler(stepped.logits[-1])
        yield Decoded(token, stepped)

        text: TextPolicy | None = None
        for room in range(limit - 1, 0, -1):
            self.step.learn(text, stepped, token)
            chosen = choose(text)
            if chosen is not text:
                self.drop()
                if chosen is not None:
                    if not chosen.passes_limited_to_one():
                        chosen.delay(LAG)
                    chosen.learn(stepped.logits, torch.tensor([token]))
                text = chosen
            self.ids.append(token)
            if not self._ready:
                self._round(room, text)
            decoded, _ = self._ready.popleft()
            token, stepped = decoded.token, decoded.stepped
            yield decoded

    def drop(self) -> None:
        """Forgets tokens that were accepted but not yielded, as if they had not been decoded."""
        if self._ready:
            self.cache.rewind(self.cache.length - len(self._ready))
            self.sampler.go_back(self._ready[0][1])
            self._ready.clear()

    def unused(self) -> tuple[float, float]:
        """(ms, bytes) spent on tokens that were accepted but not yielded: the last token of a text takes them over."""
        waiting = [decoded for decoded, _ in self._ready]
        return sum(d.ms for d in waiting), sum(d.stepped.weight_bytes for d in waiting)

    def _round(self, room: int, text: TextPolicy | None) -> None:
        start = self.cache.length
        try:
            self._fill(start, room, text)
        except BaseException:  # interrupted: what a draft has written is not part of the text
            self.cache.rewind(start)
            raise

    def _fill(self, start: int, room: int, text: TextPolicy | None) -> None:
        """Drafts, checks, accepts; the tokens of the pass wait in `_ready`."""
        began = self.clock()
        source, drafted = self._draft(room - 1, text)
        self.cache.rewind(start)
        checking = self.clock()
        logits, bits, read = self._check([self.ids[-1], *drafted], text)
        checked = self.clock()
        draws = self._accept(logits, drafted)
        sampled = self.clock() - checked
        ended, accepted = self.clock(), len(draws) - 1
        self.cache.rewind(start + len(draws))
        draft_ms, check_ms = (checking - began) * 1e3, (ended - checking) * 1e3
        self.lengths.record(source, len(drafted), accepted, draft_ms, check_ms)
        self.tally.add(len(drafted), accepted)
        share, sampling_ms = (draft_ms + check_ms) / len(draws), sampled * 1e3 / len(draws)
        drafts = len(drafted) * self.drafts[source].nbytes if drafted else 0
        weight_bytes = round((read + drafts) / len(draws))
        effective = None if bits is None else self._sums.effective_bits(bits).tolist()
        for i, (token, state) in enumerate(draws):
            stepped = Stepped(
                logits[i : i + 1],
                None if bits is None else bits[i : i + 1],
                -1,
                0.0 if effective is None else effective[i],
                weight_bytes,
            )
            extra = share if i else share - draft_ms - check_ms
            self._ready.append((Decoded(token, stepped, extra, share - sampling_ms, sampling_ms), state))

    def _draft(self, room: int, text: TextPolicy | None) -> tuple[int, list[int]]:
        """(number of the source, tokens drafted); no tokens where no draft is worth its time, or none is found."""
        if text is None or not text.passes_limited_to_one():
            for source, count in self.lengths.plans(room):
                drafted = self.drafts[source].propose(self.ids, count, self.cache, self.sampler.twin())
                if drafted:
                    return source, drafted
        return 0, []

    def _check(self, tokens: list[int], text: TextPolicy | None) -> tuple[Tensor, Tensor | None, int]:
        """(logits [T, V], bits int32 [T, G], bytes of weights read) of a pass over all the tokens."""
        if isinstance(self.step, NativeStep) and text is not None:
            logits, bits, read = self.step.several(tokens, self.cache, text, text.corrections(len(tokens)))
            # Texts that learn from logits do so when a token is yielded, after a draft has used the step again.
            return logits.clone() if text.stepwise else logits, bits.clone(), read
        if text is not None and text.bits_correction is not None and len(tokens) > 1:
            text.correction = torch.tensor(text.corrections(len(tokens)), device=self.decoder.device)
        logits, found = self._by_torch.several(tokens, self.cache, text)
        if found is None or text is None:
            return logits, None, self.decoder.head_bytes()
        return logits, found, self._sums.read_together(found) + self.decoder.head_bytes() + text.extra_bytes

    def _accept(self, logits: Tensor, drafted: Sequence[int]) -> list[tuple[int, SamplerState]]:
        """(token, state before the token was drawn) of each row, up to the first that is not what was drafted."""
        draws: list[tuple[int, SamplerState]] = []
        for row, guess in zip(logits, [*drafted, None], strict=True):
            state = self.sampler.state()
            draws.append((self.sampler(row), state))
            if draws[-1][0] != guess:
                break
        return draws
