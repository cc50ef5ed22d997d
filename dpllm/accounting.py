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


@dataclass(frozen=True)
class Text:
    """A text to generate. policy: instead of the engine's policy and controller, for measurements."""

    ids: list[int]
    options: GenerateOptions
    context: KVContext | None = None
    keep: bool = False
    clock: Callable[[], float] = time.perf_counter
    policy: PrecisionPolicy | None = None


def accounted_steps(
    text: Text,
    continuation: Continuation,
    pilot: Pilot,
    generation: Generation,
    *,
    limit: int,
    tokenizer: Any,
) -> Generator[Step, None, None]:
    """Yields the step of each token, up to `limit` of them, and tells the controller what the token took.

    Every step is added to the generation's. In the end a context is as before, unless it is to keep the turn.
    """
    options, clock, context = text.options, text.clock, text.context
    decoder, cache = continuation.decoder, continuation.cache
    ends = () if options.ignore_eos else decoder.config.eos_ids
    stream = TextStream(tokenizer, options.stop_strings)
    widest = 0.0 if decoder.groups[0].dense else resident_mean(decoder)
    read = cache.length
    if context is not None:
        context.begin_turn()
    try:
        began, left = clock(), limit
        for token, stepped, shared_ms in continuation.tokens(text.ids, pilot.choose, limit):
            left -= 1
            ended = token in ends
            last = ended or left == 0
            final = stream.push(None if ended else token, last)
            weight_bytes: float = stepped.weight_bytes
            if last or stream.stopped:
                generation.stopped_by = end_reason(
                    end_token=ended, stop_string=stream.stopped, cut=limit < options.max_new_tokens
                )
                unused_ms, unused_bytes = continuation.unused()
                shared_ms, weight_bytes = shared_ms + unused_ms, weight_bytes + unused_bytes
            ms, bits = (clock() - began) * 1e3 + shared_ms, stepped.bits
            first = left == limit - 1
            step = Step(
                token, final, widest if bits is None else stepped.effective_bits, None if first else ms,
                round(weight_bytes), cache.nbytes, () if bits is None else bits[0].tolist(),
                ms if first else None,
            )  # fmt: skip
            generation.steps.append(step)
            yield step
            if pilot.controller is not None:
                pilot.record(ms, step.bits)
            if last or stream.stopped:
                return
            began = clock()
    finally:
        continuation.drop()
        if context is not None:
            context.end_turn(text.ids, [s.token for s in generation.steps], read, text.keep)
