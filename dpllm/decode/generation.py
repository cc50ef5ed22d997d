"""What a generation gives: a step per token, the text, and figures over all steps."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dpllm.base import forking
from dpllm.base.processes import StaysInProcess
from dpllm.decode.speculation.tally import Tally
from dpllm.policies.token_time import Shortfall


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token.

    text: the text that became final with this token. The text may lag behind the token, at the start of a stop string
    or within a character that spans tokens. ttft_ms: for the first token, the time to read the prompt and draw the
    token; else None. tpot_ms: for every other token, the time that it took; None for the first one. bits: the width
    that each group read; empty where the prompt was read. effective_bits: mean of the widths, weighted by matrix size.
    weight_bytes: bytes of weights read for the token. kv_bytes: bytes of the cache after it.

    Tokens that one pass has checked share its time and its `weight_bytes`, those of drafting included; `bits` are those
    of the check.

    sampling_ms, text_ms, other_ms: parts of `ms` that no width changes: drawing the token, turning it into text, and
    other work around the step. `ms` does not contain what the consumer of the steps does between two of them.
    """

    token: int
    text: str
    effective_bits: float
    tpot_ms: float | None
    weight_bytes: int
    kv_bytes: int
    bits: Sequence[int] = field(default=(), repr=False)
    ttft_ms: float | None = None
    sampling_ms: float = 0.0
    text_ms: float = 0.0
    other_ms: float = 0.0

    @property
    def step_ms(self) -> float:
        """The time of the decode step: reading weights and cache, and computing with them."""
        return self.ms - self.sampling_ms - self.text_ms - self.other_ms

    @property
    def ms(self) -> float:
        """The time that this token took, whether it was the first one or not."""
        return (self.ttft_ms if self.tpot_ms is None else self.tpot_ms) or 0.0


@dataclass(frozen=True)
class GenerationStats:
    """Figures of a generation so far. The first token counts only as `ttft_ms`: it comes from reading the prompt.

    tpot_ms: {"p50": ..., "p95": ...} over the other tokens, or None without any. time_ms: medians of the parts of that
    time, "step", "sampling", "text" and "other" (see Step), or None. effective_bits and weight_bytes_per_token: means
    over the same tokens; None for a model that is not quantised. stopped_by: "end token", "stop token",
    "stop string", "max_new_tokens", "positions" (the model has no more), or None while the text goes on. speculation:
    what became of drafts. shortfall: why the time per token to hold was out of reach at any width; None where it was
    not.
    """

    new_tokens: int
    ttft_ms: float | None
    tpot_ms: dict[str, float] | None
    time_ms: dict[str, float] | None
    effective_bits: float | None
    weight_bytes_per_token: int | None
    kv_bytes: int
    stopped_by: str | None
    speculation: dict[str, float | int | None]
    shortfall: Shortfall | None


class Generation(StaysInProcess):
    """A text that is generated while it is iterated over: each iteration gives the Step of one token.

    `text` and `str()` generate what is left first. `steps` and `stats` hold what has been generated so far. Threads may
    share a generation: each token goes to one of them.
    """

    def __init__(self, *, quantized: bool, tally: Tally):
        """quantized: whether widths are chosen. tally: what becomes of drafts."""
        self.steps: list[Step] = []
        self.tally = tally
        self.stopped_by: str | None = None
        self.missed: Shortfall | None = None  # the last time that a target was out of reach
        self._running: Generator[Step, None, None] = _no_steps()
        self._quantized = quantized
        self._lock = forking.lock()  # held while a token is generated

    def begin(self, steps: Generator[Step, None, None]) -> None:
        """Hands over the generator of the steps, which adds each one to `steps`. Called once, by the engine."""
        self._running = steps

    def __iter__(self) -> Iterator[Step]:
        """The steps that have not been generated yet."""
        return self

    def __next__(self) -> Step:
        """Generates the next token."""
        with self._lock:
            return next(self._running)

    def close(self) -> None:
        """Ends the generation here, after a token that another thread may be generating.

        A context becomes free for the next question."""
        with self._lock:
            self._running.close()

    @property
    def text(self) -> str:
        """The whole generated text."""
        for _ in self:
            pass
        return "".join(s.text for s in self.steps)

    def __str__(self) -> str:
        return self.text

    @property
    def shortfall(self) -> Shortfall | None:
        """Why the time per token to hold was out of reach at any width; None where most tokens were in time."""
        if self.missed is None or np.median([s.ms for s in self.steps[1:]]) <= self.missed.target_ms:
            return None
        return self.missed

    @property
    def stats(self) -> GenerationStats:
        """Figures of the steps so far."""
        every = list(self.steps)  # another thread may add to them
        decoded = every[1:]
        times = [s.ms for s in decoded]
        dynamic = self._quantized and bool(decoded)
        tally = self.tally
        if not tally.checks and not tally.plain:  # plain decoding does not count its steps
            tally = replace(tally, plain=len(decoded))
        return GenerationStats(
            new_tokens=len(every),
            ttft_ms=round(every[0].ms, 3) if every else None,
            tpot_ms={f"p{p}": round(float(np.percentile(times, p)), 3) for p in (50, 95)} if times else None,
            time_ms=_parts(decoded) if decoded else None,
            effective_bits=round(float(np.mean([s.effective_bits for s in decoded])), 4) if dynamic else None,
            weight_bytes_per_token=round(float(np.mean([s.weight_bytes for s in decoded])))
            if dynamic
            else None,
            kv_bytes=every[-1].kv_bytes if every else 0,
            stopped_by=self.stopped_by,
            speculation=tally.summary(),
            shortfall=self.shortfall,
        )


def _parts(steps: Sequence[Step]) -> dict[str, float]:
    names = ("step", "sampling", "text", "other")
    return {n: round(float(np.median([getattr(s, f"{n}_ms") for s in steps])), 3) for n in names}


def _no_steps() -> Generator[Step, None, None]:
    yield from ()


def end_reason(*, end_token: bool, stop_token: bool, stop_string: bool, cut: bool) -> str:
    """The reason why a text ended (GenerationStats.stopped_by). cut: the model has fewer positions than tokens were
    asked for."""
    if end_token:
        return "end token"
    if stop_token:
        return "stop token"
    return "stop string" if stop_string else "positions" if cut else "max_new_tokens"
