"""Service levels: how effective bits and latency spread over queries, as DP-LLM (arXiv:2508.06041) asks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpllm.base.progress import Progress
from dpllm.engine import Engine
from dpllm.policies.rate_distortion import RateDistortionPolicy
from dpllm.report.data import Service, ServiceLevel
from dpllm.report.decoding import forced_steps, read

PROMPT, NEW = 16, 64  # tokens of a query: read, decoded
SHORTEST = 8  # decoded tokens below which a piece of text is no query
HELD, FIXED = "held on target", "lambda fixed"


def measure_service(
    engine: Engine, target_bits: float, queries: Sequence[Sequence[int]], progress: Progress
) -> Service:
    """Decodes every query twice, modes taking turns: with the correction that holds the target, and at the one lambda
    that calibration gives it. queries: token ids, PROMPT of them to be read, the others decoded."""
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
        logits = read(engine, query[:PROMPT], cache)
        for mode, policy in modes.items():
            steps = list(forced_steps(engine, policy, cache, query[PROMPT:], logits))
            cache.rewind(PROMPT)
            if number:
                widths = np.mean([s.bits.numpy() for s in steps], axis=0)
                bits[mode].append(round(float(widths @ weights / weights.sum()), 4))
                ms[mode].append(round(float(np.mean([s.ms for s in steps])), 4))
        progress("queries", number, len(queries))
    levels = tuple(ServiceLevel(m, tuple(bits[m]), tuple(ms[m])) for m in modes)
    return Service(levels, PROMPT, max(map(len, queries)) - PROMPT)
