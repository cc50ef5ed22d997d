"""Measures how effective bits and latency spread over queries, as DP-LLM (arXiv:2508.06041) does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpllm.base.progress import Progress
from dpllm.decode.continuation import read_prompt
from dpllm.engine import Engine
from dpllm.policies.rate_distortion import RateDistortionPolicy
from dpllm.report.data import Service, ServiceLevel
from dpllm.report.timed_steps import timed_steps

PROMPT, NEW = 16, 64  # tokens of a query that are read, and that are decoded
SHORTEST = 8  # fewest tokens of a query that are decoded
HELD, FIXED = "held on target", "lambda fixed"


def measure_query_spread(
    engine: Engine, target_bits: float, queries: Sequence[Sequence[int]], progress: Progress
) -> Service:
    """Decodes every query in two modes, which take turns.

    One mode uses the correction that holds the target; the other uses the single lambda that calibration gives for the
    target. queries: token ids; the first PROMPT of each are read, the others decoded.
    """
    assert engine.profile is not None
    modes = {
        HELD: RateDistortionPolicy(engine.profile, engine.decoder, target_bits),
        FIXED: RateDistortionPolicy(engine.profile, engine.decoder, target_bits, corrected=False),
    }
    weights = np.asarray([g.weights for g in engine.decoder.groups], dtype=float)
    bits: dict[str, list[float]] = {m: [] for m in modes}
    ms: dict[str, list[float]] = {m: [] for m in modes}
    cache = engine.decoder.new_cache(max(map(len, queries)))
    for number, query in enumerate([queries[0], *queries]):  # the first one warms up
        cache.rewind(0)
        logits = read_prompt(engine.decoder, query[:PROMPT], cache).logits
        for mode, policy in modes.items():
            steps = list(timed_steps(engine, policy, cache, query[PROMPT:], logits))
            cache.rewind(PROMPT)
            if number:
                widths = np.mean([s.bits.numpy() for s in steps], axis=0)
                bits[mode].append(round(float(widths @ weights / weights.sum()), 4))
                ms[mode].append(round(float(np.mean([s.ms for s in steps])), 4))
        progress("queries", number, len(queries))
    levels = tuple(ServiceLevel(m, tuple(bits[m]), tuple(ms[m])) for m in modes)
    return Service(levels, PROMPT, max(map(len, queries)) - PROMPT)
