"""Self-speculation: the overlay holds a cheap draft of itself.

A round drafts some tokens at a low width, or looks them up in the text so far, reads all of them in one pass at the
widths that were asked for, and keeps those that decoding a token at a time would have given. Keys and values of the
draft are overwritten by those of the pass.

What is accepted is decided by drawing: from each row of the pass the next token is drawn as ever, with the numbers that
plain decoding would draw with, and the round goes on while that is the token that was drafted. So a text is what plain
decoding makes of it, greedy or sampled, whatever the draft and however long. A draft at a temperature draws with the
same numbers from its own logits: torch's `multinomial` is a race of exponential clocks, one a token, and two similar
distributions that share the clocks mostly agree (Daliri, Musco and Suresh 2024, arXiv:2408.07978). The rule of
Leviathan et al. 2023 (arXiv:2211.17192) accepts slightly more, 1 - d at a total variation d where this is at least
(1 - d) / (1 + d); but there the text depends on how much was drafted, here on how long things took.

Exact means: with the native step, whose rows are bit for bit those of single steps. Elsewhere a pass over several
tokens may round otherwise than single ones; tokens then differ where two are level to the last digits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpllm.decode.cpu_step import NativeStep
from dpllm.decode.gpu_step import GpuStep
from dpllm.decode.sampling import Sampler
from dpllm.decode.speculation.draft_length import Pacer
from dpllm.decode.speculation.drafts import LAG, Draft
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.model.decoder import Decoder
from dpllm.policies.base import PrecisionPolicy, Recorder
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.rate_distortion import RateDistortionPolicy
from dpllm.policies.thresholds import own_inputs

Clock = Callable[[], float]


@dataclass
class Tally:
    """What became of drafts. rejected: checks that ended with a token that was not the drafted one."""

    checks: int = 0
    plain: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0

    def add(self, drafted: int, accepted: int) -> None:
        """One more round; without a draft it is a plain step."""
        self.plain += not drafted
        self.checks += bool(drafted)
        self.drafted += drafted
        self.accepted += accepted
        self.rejected += accepted < drafted

    def summary(self) -> dict[str, float | int | None]:
        """acceptance_rate: of the drafted tokens whose predecessors were accepted; k: drafted a check."""
        looked_at, passes = self.accepted + self.rejected, self.checks + self.plain
        return {
            "checks": self.checks,
            "plain_steps": self.plain,
            "acceptance_rate": round(self.accepted / looked_at, 4) if looked_at else None,
            "accepted_per_check": round(self.accepted / self.checks, 4) if self.checks else None,
            "k": round(self.drafted / self.checks, 4) if self.checks else None,
            "tokens_per_pass": round(1 + self.accepted / passes, 4) if passes else None,
        }


@dataclass(frozen=True)
class Passed:
    """A token drawn behind another one. logits [1, vocab] it was drawn from; bits: int32 [1, G] that were read for
    them, None where nothing was chosen. ms: to add to the time it took, so that the tokens of a round share its time.
    nbytes: its share of the weights that the round has read."""

    token: int
    logits: Tensor
    bits: Tensor | None = None
    ms: float = 0.0
    nbytes: float = 0.0


def obstacle(policy: PrecisionPolicy | None, native: NativeStep | None) -> str | None:
    """Why several tokens cannot be read in one pass under this policy; None if they can."""
    if policy is None or isinstance(policy, StaticPolicy):
        return None
    if not isinstance(policy, RateDistortionPolicy):
        return f"policy '{policy.name}' decides one token at a time"
    if native is not None and not own_inputs(policy):
        return "this profile's asynchronous estimates are made one token at a time"
    return None


class Continuation:
    """One text decoded behind what its cache holds, in passes over several tokens where drafts allow it.

    Without drafts it is plain decoding. With them a rate-distortion policy is delayed (RateDistortionPolicy.delay) by
    as many tokens as a pass can have, so that the widths of a position do not depend on how tokens were grouped: the
    text is that of plain decoding with the delayed policy, and under fixed widths that of plain decoding.
    """

    def __init__(
        self, decoder: Decoder, step: NativeStep | GpuStep | None, cache: KVCache, draw: Sampler, clock: Clock
    ):
        self.decoder, self.step, self.cache, self.draw, self.clock = decoder, step, cache, draw, clock
        self.native = step if isinstance(step, NativeStep) else None
        self.policy: PrecisionPolicy | None = None
        self.drafts: Sequence[Draft] = ()
        self.pacer = Pacer([])
        self.tally = Tally()
        self.text: list[int] = []  # all that the cache has read, and the last token
        self._ready: deque[tuple[Passed, Tensor | None]] = (
            deque()
        )  # what the last pass gave, and states before draws

    def speculate(self, text: Sequence[int], drafts: Sequence[Draft], pacer: Pacer) -> None:
        """Drafts from now on. text: what the cache will have read when decoding begins. The pacer may be one that
        other texts have taught."""
        self.text, self.drafts, self.pacer = list(text), drafts, pacer

    def follow(self, policy: PrecisionPolicy | None) -> None:
        """Another policy (of this text alone: begin_text) decides from the next token on."""
        self.drop()
        self.policy = policy
        if self.drafts and isinstance(policy, RateDistortionPolicy) and not obstacle(policy, self.native):
            policy.delay(LAG)

    def next(self, token: int, room: int) -> Passed:
        """What is drawn behind one more token. room: tokens that will be asked for at most, this one included."""
        self.text.append(token)
        if not self._ready:
            self._round(room)
        passed, _ = self._ready.popleft()
        policy = self.policy
        if isinstance(policy, RateDistortionPolicy) and policy.deferred is None and passed.bits is not None:
            policy.record(passed.bits)
        return passed

    def drop(self) -> None:
        """Forgets tokens that were accepted but not handed out yet, as if they had not been looked at."""
        if self._ready:
            self.cache.rewind(self.cache.length - len(self._ready))
            self.draw.go_back(self._ready[0][1])
            self._ready.clear()

    def rest(self) -> tuple[float, float]:
        """(ms, bytes) that tokens accepted but not handed out stand for: what the last one adds when a text ends."""
        waiting = [passed for passed, _ in self._ready]
        return sum(p.ms for p in waiting), sum(p.nbytes for p in waiting)

    def _round(self, room: int) -> None:
        start = self.cache.length
        try:
            self._fill(start, room)
        except BaseException:  # interrupted: what a draft has written is not part of the text
            self.cache.rewind(start)
            raise

    def _on_gpu(self, step: GpuStep) -> None:
        """One token; the only wait is for the token itself, with which the widths come."""
        state, policy = self.draw.state(), self.policy
        logits, _ = step(self.text[-1], self.cache, policy)
        if self.draw.temperature == 0:
            token, bits = step.finished()
        else:
            token = self.draw(logits[-1])
            _, bits = step.finished()
        own = None if policy is None else bits
        self._ready.append((Passed(token, logits, own, 0.0, self._bytes(own)), state))

    def _fill(self, start: int, room: int) -> None:
        if isinstance(self.step, GpuStep) and not self.drafts:
            return self._on_gpu(self.step)
        now = self.clock if self.drafts else float  # plain decoding has nothing to weigh
        began = now()
        source, drafted = self._draft(room - 1)
        self.cache.rewind(start)
        checking = now()
        logits, bits = self._check([self.text[-1], *drafted])
        draws = self._accept(logits, drafted)
        ended, accepted = now(), len(draws) - 1
        self.cache.rewind(start + len(draws))
        draft_ms, check_ms = (checking - began) * 1e3, (ended - checking) * 1e3
        self.pacer.record(source, len(drafted), accepted, draft_ms, check_ms)
        self.tally.add(len(drafted), accepted)
        share = (draft_ms + check_ms) / len(draws)
        drafts = len(drafted) * self.drafts[source].nbytes if drafted else 0
        nbytes = (self._bytes(bits) + drafts) / len(draws)
        for i, (token, state) in enumerate(draws):
            ms = share if i else share - draft_ms - check_ms
            own = None if bits is None else bits[i : i + 1]
            self._ready.append((Passed(token, logits[i : i + 1], own, ms, nbytes), state))

    def _draft(self, room: int) -> tuple[int, list[int]]:
        """(number of the source, tokens drafted); none where nothing is worth it, or found."""
        if self.drafts and not obstacle(self.policy, self.native):
            for source, count in self.pacer.plans(room):
                drafted = self.drafts[source].propose(self.text, count, self.cache, self.draw.twin())
                if drafted:
                    return source, drafted
        return 0, []

    def _check(self, tokens: list[int]) -> tuple[Tensor, Tensor | None]:
        """Logits [T, V] and bits int32 [T, G] of a pass over all of them."""
        policy = self.policy
        corrections = policy.corrections(len(tokens)) if isinstance(policy, RateDistortionPolicy) else None
        if self.native is not None and policy is not None:
            logits, bits = self.native.several(tokens, self.cache, policy, corrections)
            waits = getattr(
                policy, "stepwise", False
            )  # for the token drawn: another text may use the step before
            return logits.clone() if waits else logits, bits.clone()
        if isinstance(policy, RateDistortionPolicy) and policy.lag:
            policy.correction = torch.tensor(corrections, device=self.decoder.device)
        recorder = None if policy is None else Recorder(policy, self.decoder.groups)
        with torch.no_grad():
            ids = torch.tensor(tokens, device=self.decoder.device)
            logits = self.decoder.forward(ids, self.cache, recorder)
        return logits, None if recorder is None else recorder.bits()

    def _accept(self, logits: Tensor, drafted: Sequence[int]) -> list[tuple[int, Tensor | None]]:
        """(token, state before it was drawn) of each row, to the first that is not what was drafted."""
        draws: list[tuple[int, Tensor | None]] = []
        for row, guess in zip(logits, [*drafted, None], strict=True):
            state = self.draw.state()
            draws.append((self.draw(row), state))
            if draws[-1][0] != guess:
                break
        return draws

    def _bytes(self, bits: Tensor | None) -> float:
        """Of weights that a pass reads: each group once, as wide as any of its rows, what choosing reads, the head."""
        head = self.decoder.head_bytes()
        if bits is None or self.policy is None:
            return head
        widest = (bits[0] if len(bits) == 1 else bits.amax(0)).tolist()
        read = sum(g.bytes_at[b - g.seed_bits] for b, g in zip(widest, self.decoder.groups, strict=True))
        return read + head + self.policy.extra_bytes
