"""Times real decode steps under a policy, as `Engine.generate` times them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from dpllm.engine import Engine
from dpllm.evaluation.forced_steps import forced_steps
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.policies.base import PrecisionPolicy

Key = TypeVar("Key")

BLOCK = 8  # steps in a turn of one policy; policies take turns because machines change speed from second to second
LEAST_ROUNDS, LONGEST_S = 3, 40.0  # fewest turns; seconds after which no further turn starts


@dataclass(frozen=True)
class ForcedStep:
    """One decode step of a given text: its time in ms, and the widths it read, int32 [G]."""

    ms: float
    bits: Tensor


def timed_steps(
    engine: Engine,
    policy: PrecisionPolicy,
    cache: KVCache,
    tokens: Sequence[int],
    logits: Tensor | None = None,
) -> Iterator[ForcedStep]:
    """Decodes given tokens one by one after the cache, as a separate text, and yields the time of each step.

    logits: [1, V] of the step before the first token, or None. The cache grows by the tokens.
    """
    began = time.perf_counter()
    for stepped in forced_steps(engine.new_step(), policy, cache, tokens, logits):
        assert stepped.bits is not None
        yield ForcedStep((time.perf_counter() - began) * 1e3, stepped.bits[0].clone())
        began = time.perf_counter()


def interleaved_ms(
    engine: Engine, policies: Mapping[Key, PrecisionPolicy], cache: KVCache, tokens: Sequence[int], rounds: int,
    progress: Callable[[int, int], None],
) -> dict[Key, list[float]]:  # fmt: skip
    """Returns the times, in ms, of rounds * BLOCK steps of each policy. Policies take turns.

    The first step of a turn is left out. The cache is restored. After LEAST_ROUNDS rounds, the measurement stops once
    it has taken LONGEST_S seconds.
    """
    base = cache.length
    times: dict[Key, list[float]] = {key: [] for key in policies}
    began = time.perf_counter()
    for r in range(rounds):
        own = [tokens[(r * BLOCK + i) % len(tokens)] for i in range(BLOCK + 1)]
        for key, policy in policies.items():
            steps = [s.ms for s in timed_steps(engine, policy, cache, own)]
            cache.rewind(base)
            times[key] += steps[1:]
        progress(r + 1, rounds)
        if r + 1 >= LEAST_ROUNDS and time.perf_counter() - began > LONGEST_S:
            break
    return times
