"""Measures what bits and cache pruning cost in quality, by decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dpllm.base.errors import InputError
from dpllm.base.text import encode, read_documents
from dpllm.context.kv_context import KVContext
from dpllm.context.options import ContextOptions
from dpllm.context.pruner import Pruner
from dpllm.decode.step import decode_one
from dpllm.kvzip_bridge.query_recording import SINKS
from dpllm.policies.base import PrecisionPolicy, observe
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.make import make_policy

if TYPE_CHECKING:
    from dpllm.engine import Engine
    from dpllm.kvzip_bridge.cache import KVCache
from dpllm.planning.quality_model import Progress, QualityModel

KEEPS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)

STEPS = (0.0, 0.06, 0.12, 0.25, 0.375, 0.5, 0.75, 1.0)  # of the range of effective bits


@dataclass(frozen=True)
class QualityOptions:
    """documents: texts measured. skip: so many of those that are long enough first. context: tokens of each that are
    read and pruned. following: tokens decoded then."""

    documents: int = 12
    skip: int = 0
    context: int = 512
    following: int = 96


def measure(
    engine: Engine,
    text: Path,
    options: QualityOptions = QualityOptions(),
    progress: Progress = lambda *_: None,
) -> QualityModel:
    """Decodes at every number of bits over a cache pruned to every ratio. Raises InputError for a text that is too
    short, or a model without bits to choose."""
    profile = engine.calibration()
    documents = _documents(engine, text, options)
    low, high = profile.target_range(engine.planes)
    bits = [low + step * (high - low) for step in STEPS]
    policies = [make_policy("rate-distortion", b, engine.decoder, profile) for b in bits]
    most = StaticPolicy(engine.planes.tolist())
    sums = np.zeros((len(bits), len(KEEPS)))
    best = 0.0
    for number, ids in enumerate(documents):
        progress("quality", number, len(documents))
        pruner = _read(engine, ids[: options.context])
        scores, whole = pruner.policy.score(pruner.scoring_input()), pruner.context.cache
        for j, keep in enumerate(KEEPS):
            pruner.context.cache = cache = whole.fork(options.following + 8)
            pairs, every = pruner.pairs_to_keep(keep)
            pruner.drop(
                None if pairs == every else pruner.policy.allocate(scores, pairs), options.following + 8
            )
            following = ids[options.context :]
            if keep == 1:
                best += _nats(engine, most, cache, following)
            for i, policy in enumerate(policies):
                sums[i, j] += _nats(engine, policy, cache, following)
    progress("quality", len(documents), len(documents))
    tokens = len(documents) * options.following
    return QualityModel(
        profile.overlay_hash, text.name, tokens, tuple(bits), KEEPS[::-1],
        _falling((sums - best)[:, ::-1] / tokens),
    )  # fmt: skip


def _documents(engine: Engine, text: Path, options: QualityOptions) -> list[list[int]]:
    need = options.context + options.following + 1
    found: list[list[int]] = []
    for document in read_documents(text):
        ids = encode(engine.tokenizer, document)
        if len(ids) >= need:
            found.append(ids[:need])
        if len(found) == options.skip + options.documents:
            break
    if not (found := found[options.skip :]):
        raise InputError(f"{text} has no document of {need} tokens. Give a longer text.")
    return found


def _read(engine: Engine, ids: Sequence[int]) -> Pruner:
    context = KVContext(engine.decoder.new_ragged_cache(0), protected=min(SINKS, len(ids)))
    pruner = Pruner(
        context, ContextOptions(), len(ids),
        decoder=engine.decoder, prompts=engine.prompts, profile=engine.profile,
    )  # fmt: skip
    pruner.read(ids)
    return pruner


def _nats(engine: Engine, policy: PrecisionPolicy, cache: KVCache, ids: Sequence[int]) -> float:
    """Of the tokens behind the first, each decoded with widths of its own; the cache is as before."""
    if hasattr(policy, "reset"):
        policy.reset()
    start, total = cache.length, 0.0
    for token, after in pairwise(ids):
        logits, _ = decode_one(engine.decoder, engine.step, token, cache, policy)
        total += float(logits.logsumexp(1) - logits[0, after])
        observe(policy, logits, torch.tensor([after]))
    cache.rewind(start)
    return total


def _falling(nats: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Noise taken out: more bits, or more of the cache (columns ascend), never cost quality; nothing is below 0."""
    smooth = np.minimum.accumulate(np.minimum.accumulate(nats, axis=0), axis=1)
    rough = np.maximum.accumulate(np.maximum.accumulate(nats[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]
    return tuple(tuple(round(max(0.0, float(x)), 5) for x in row) for row in (smooth + rough) / 2)
