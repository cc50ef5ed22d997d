"""What bits and pruning cost in quality: nats per token above the resident maximum with the whole cache.

Weights and cache are measured together, because their errors meet in the same logits: documents are read, their caches
pruned to every ratio, and what follows is decoded at every number of bits. Without such a measurement the calibration's
own estimate stands in; it knows nothing of pruning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dpllm.base.errors import InputError
from dpllm.base.files import write_text
from dpllm.base.text import encode, read_documents
from dpllm.calib.profile import CalibrationProfile, Resident
from dpllm.context import SINKS, KVContext
from dpllm.decode.step import decode_one
from dpllm.policies.base import PrecisionPolicy, observe
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.make import make_policy
from dpllm.pruner import ContextOptions, Pruner

if TYPE_CHECKING:
    from dpllm.engine import Engine
    from dpllm.kvzip_bridge.cache import KVCache

VERSION = 1
NAME = "quality.json"
KEEPS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
STEPS = (0.0, 0.06, 0.12, 0.25, 0.375, 0.5, 0.75, 1.0)  # of the range of effective bits

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class QualityOptions:
    """documents: texts measured. skip: so many of those that are long enough first. context: tokens of each that are
    read and pruned. following: tokens decoded then."""

    documents: int = 12
    skip: int = 0
    context: int = 512
    following: int = 96


@dataclass(frozen=True)
class QualityModel:
    """nats[i][j]: loss per token at bits[i] with keep[j] of the cache, above the resident maximum with all of it; falls
    along bits and along keep. text: what it was measured on; tokens: how many (0: the calibration's estimate)."""

    overlay_hash: str
    text: str
    tokens: int
    bits: tuple[float, ...]
    keep: tuple[float, ...]
    nats: tuple[tuple[float, ...], ...]

    def loss(self, bits: float, keep: float = 1.0) -> float:
        """Nats per token; straight between measured bits and between logarithms of measured ratios."""
        columns, table = np.arange(len(self.keep)), np.asarray(self.nats)
        at = float(np.interp(np.log(keep), np.log(self.keep), columns))
        low, high = math.floor(at), math.ceil(at)
        return float(
            np.interp(bits, self.bits, table[:, low] + (at - low) * (table[:, high] - table[:, low]))
        )

    def save(self, path: Path) -> None:
        """Writes it as JSON, atomically."""
        write_text(path, json.dumps({"quality_version": VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, overlay_hash: str) -> QualityModel:
        """Raises InputError for a file that is no such measurement, or one of another overlay."""
        try:
            stored = json.loads(path.read_text())
            version = stored.pop("quality_version")
            if version != VERSION:
                raise ValueError(f"version {version}, this dpllm reads {VERSION}")
            nats = tuple(tuple(float(x) for x in row) for row in stored.pop("nats"))
            lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
            found = cls(nats=nats, **lists)
            if np.shape(found.nats) != (len(found.bits), len(found.keep)):
                raise ValueError("its table is not whole")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise InputError(
                f"{path} is no measurement of quality ({e}). Run: dpllm profile --quality"
            ) from None
        if found.overlay_hash != overlay_hash:
            raise InputError(f"{path} was measured with another overlay. Run: dpllm profile --quality")
        return found


def quality_of(engine: Engine) -> QualityModel:
    """The measurement beside the overlay, else the calibration's estimate. Raises InputError without a profile."""
    profile, beside = engine.calibration(), engine.path / NAME
    return QualityModel.load(beside, profile.overlay_hash) if beside.exists() else estimated(profile)


def estimated(profile: CalibrationProfile, resident: Resident = None) -> QualityModel:
    """From calibration alone: the loss its gains foretell at every number of bits, with the whole cache."""
    low, high = profile.target_range(resident)
    bits = [float(b) for b in np.linspace(low, high, 17)]
    losses = [expected_loss(profile, b, resident) for b in bits]
    rows = tuple((max(0.0, x - losses[-1]),) for x in losses)
    return QualityModel(profile.overlay_hash, "the calibration's estimate", 0, tuple(bits), (1.0,), rows)


def expected_loss(profile: CalibrationProfile, target_bits: float, resident: Resident = None) -> float:
    """Nats per token that calibration foretells at these bits, less those of reading the seed width everywhere."""
    planes = profile.planes(resident)
    thresholds = profile.thresholds(profile.lambda_for(target_bits, planes), planes)
    steps = (profile.lower_edges()[:, :, None] >= thresholds[:, None, :]).sum(axis=2)  # [G, M]
    gains = np.concatenate([np.zeros_like(profile.gain[:, :1]), np.cumsum(profile.gain, axis=1)], axis=1)
    taken = np.take_along_axis(gains, steps[:, None, :], axis=1)[
        :, 0
    ]  # [G, M]; bins hold equally many tokens
    return -float(taken.mean(axis=1).sum())


# -- measuring ---------------------------------------------------------------------------------------------------


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
        scores, whole = pruner.policy.score(pruner.seen()), pruner.context.cache
        for j, keep in enumerate(KEEPS):
            pruner.context.cache = cache = whole.fork(options.following + 8)
            pairs, every = pruner.pairs(keep)
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
    pruner = Pruner(engine, context, ContextOptions(), len(ids))
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
