"""Measures how much quality is lost by reading fewer bits and by pruning the cache: decodes real documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpllm.base.errors import InputError
from dpllm.base.progress import Progress, no_progress
from dpllm.base.text import check_tokens, encode, read_documents
from dpllm.context.kv_context import KVContext
from dpllm.context.options import ContextOptions
from dpllm.context.pruner import Pruner
from dpllm.evaluation.forced_steps import forced_nats
from dpllm.kvzip_bridge.attention import SINKS
from dpllm.planning.quality_model import QualityModel
from dpllm.policies.base import PrecisionPolicy
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.make import make_policy

if TYPE_CHECKING:
    from dpllm.engine import Engine
    from dpllm.kvzip_bridge.cache import KVCache

KEEPS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)  # shares of the cache that are kept
STEPS = (0.0, 0.06, 0.12, 0.25, 0.375, 0.5, 0.75, 1.0)  # positions within the range of effective bits


@dataclass(frozen=True)
class QualityOptions:
    """The amount of text that is measured.

    documents: documents to measure. skip: documents to leave out first, counting only those that are long enough.
    context: tokens of each document that are read and pruned. following: tokens of each that are then decoded.
    """

    documents: int = 12
    skip: int = 0
    context: int = 512
    following: int = 96


def measure_quality(
    engine: Engine,
    text: Path,
    options: QualityOptions = QualityOptions(),
    progress: Progress = no_progress,
) -> QualityModel:
    """Decodes every document at every number of bits after a cache pruned to every ratio.

    Raises InputError for a text that is too short or a model without a calibration profile.
    """
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
            check_tokens(ids[:need], engine.decoder.config.vocab_size, engine.path)
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
    """Negative log probability (nats) of the tokens after the first, each decoded with its own widths.

    The cache is as before afterwards.
    """
    start = cache.length
    nats, _ = forced_nats(engine.new_step(), policy, cache, ids)
    cache.rewind(start)
    return sum(nats)


def _falling(nats: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Removes noise from nats [bits, keep] (both ascending): returns rows that never rise and are never below 0.

    More bits, or more of the cache, cost no quality.
    """
    smooth = np.minimum.accumulate(np.minimum.accumulate(nats, axis=0), axis=1)
    rough = np.maximum.accumulate(np.maximum.accumulate(nats[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]
    return tuple(tuple(round(max(0.0, float(x)), 5) for x in row) for row in (smooth + rough) / 2)
