"""Accounts for each token of a text: what the token says, how long it took, and what it read."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from dpllm.context.kv_context import KVContext
from dpllm.control.pilot import Pilot
from dpllm.decode.continuation import Continuation
from dpllm.decode.generation import Generation, Step, end_reason
from dpllm.decode.options import GenerateOptions
from dpllm.decode.text_stream import TextStream
from dpllm.policies.base import PrecisionPolicy
from dpllm.policies.make import resident_mean
from dpllm.policies.token_time import Rest


@dataclass(frozen=True)
class Text:
    """A text to generate.

    policy: instead of the engine's policy and controller, for measurements. read: tokens that the context had read when
    the question was put.
    """

    ids: list[int]
    options: GenerateOptions
    context: KVContext | None = None
    keep: bool = False
    clock: Callable[[], float] = time.perf_counter
    policy: PrecisionPolicy | None = None
    read: int = 0


def accounted_steps(
    text: Text,
    continuation: Continuation,
    pilot: Pilot,
    generation: Generation,
    *,
    limit: int,
    tokenizer: Any,
    stops: frozenset[int] = frozenset(),
) -> Generator[Step, None, None]:
    """Yields the step of each token, up to `limit` of them, and tells the controller what the token took.

    stops: tokens that end the text besides the model's own. Every step is added to the generation's. In the end a
    context is as before, unless it is to keep the turn.
    """
    options, clock, context = text.options, text.clock, text.context
    decoder, cache = continuation.decoder, continuation.cache
    ends = () if options.ignore_eos else decoder.config.eos_ids
    before = [] if context is None else context.ids[: text.read]
    stream = TextStream(tokenizer, options.stop_strings, [*before, *text.ids])
    widest = 0.0 if decoder.groups[0].dense else resident_mean(decoder)
    if context is not None:
        cache = continuation.cache = context.begin_turn(text.read, len(text.ids) + limit, text.keep)
    try:
        began, left = clock(), limit
        for token, stepped, shared_ms, step_ms, sampling_ms in continuation.tokens(
            text.ids, pilot.choose, limit
        ):
            left -= 1
            last = token in ends or token in stops or left == 0
            decoding = clock()
            final = stream.push(None if token in ends or token in stops else token, last)
            text_ms = (clock() - decoding) * 1e3
            weight_bytes: float = stepped.weight_bytes
            if last or stream.stopped:
                generation.stopped_by = end_reason(
                    end_token=token in ends, stop_token=token in stops, stop_string=stream.stopped,
                    cut=limit < options.max_new_tokens,
                )  # fmt: skip
                unused_ms, unused_bytes = continuation.unused()
                shared_ms, step_ms = shared_ms + unused_ms, step_ms + unused_ms
                weight_bytes += unused_bytes
            ms, bits = (clock() - began) * 1e3 + shared_ms, stepped.bits
            first = left == limit - 1
            step = Step(
                token, final, widest if bits is None else stepped.effective_bits, None if first else ms,
                round(weight_bytes), cache.nbytes, () if bits is None else bits[0].tolist(),
                ms if first else None, sampling_ms, text_ms,
                0.0 if first else max(0.0, ms - step_ms - sampling_ms - text_ms),
            )  # fmt: skip
            generation.steps.append(step)
            yield step
            if pilot.controller is not None:
                missed = pilot.record(ms, step.bits, Rest(step.sampling_ms, step.text_ms, step.other_ms))
                generation.missed = missed or generation.missed
            if last or stream.stopped:
                return
            began = clock()
    finally:
        continuation.drop()
        if context is not None:
            context.end_turn(cache, text.ids, [s.token for s in generation.steps], text.keep)
