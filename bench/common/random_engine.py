"""An engine whose weights, gains and text mean nothing, at a true shape: what time depends on is there, quality is not.

Signals are real ones, of the random model's own activations; gains are made up so that every width is best somewhere.
The vocabulary is the reference model's, so that its tokenizer serves.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dpllm import reference
from dpllm.base.text import load_tokenizer
from dpllm.calib.lambda_curve import dense_curve
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.engine import Engine
from dpllm.model.decoder import Decoder, Group
from dpllm.model.loading import LoadOptions
from dpllm.model.random_models import random_decoder, shape

BINS, TOKENS = 16, 48


def random_engine(name: str, planes: int, options: LoadOptions) -> Engine:
    """Of a shape of dpllm/model/random_models.py, with so many planes, calibrated on nothing."""
    tokenizer = load_tokenizer(reference.overlay_path())
    decoder = random_decoder(replace(shape(name), vocab_size=len(tokenizer)), planes, options)
    engine = Engine(Path(f"random-{name}"), decoder, tokenizer, profile_of(decoder))
    engine.set_policy("rate-distortion", 3.5)
    return engine


def profile_of(decoder: Decoder) -> CalibrationProfile:
    """Thresholds between the signals that the decoder's groups really see."""
    groups, rng = decoder.groups, np.random.default_rng(0)
    low, high = groups[0].seed_bits, groups[0].resident_bits
    inputs = inputs_of(decoder)
    diagonals = [rng.random(x.shape[1]).astype(np.float16) for x in inputs]
    ranked = np.stack(
        [np.sort((x.numpy() ** 2) @ d.astype(np.float32)) for x, d in zip(inputs, diagonals, strict=True)]
    )
    edges = (np.arange(1, BINS) * TOKENS) // BINS
    weights = np.asarray([g.weights for g in groups], np.int64)
    steps, rising = np.arange(high - low), np.linspace(0.5, 2.0, BINS)
    size = weights * np.exp(rng.normal(0, 0.7, len(groups)))  # some groups matter more than others
    gain = size[:, None, None] * 4.0 ** -steps[None, :, None] * rising
    cost = np.stack([np.asarray(g.bytes_at, np.int64) for g in groups])
    whole = np.full(len(groups), high)
    draft = CalibrationProfile(
        overlay_hash="0" * 64, granularity="fused", bits=(low, high), group_names=tuple(g.name for g in groups),
        diagonals=tuple(diagonals), source=np.arange(len(groups)), probe=np.zeros(inputs[0].shape[1], np.float16),
        context=np.zeros(7), knots=ranked[:, edges].astype(np.float64), gain=gain,
        mean_loss=np.zeros((len(groups), high - low + 1)), weights=weights, cost=cost, resident=whole[None],
        curve_log2_lambda=np.zeros((1, 2)), curve_bits=np.asarray([[low, high]], float), origin={},
    )  # fmt: skip
    log2_lambda, bits = dense_curve(draft, ranked, whole, np.asarray([low, high]), np.zeros(2))
    return replace(draft, curve_log2_lambda=log2_lambda[None], curve_bits=bits[None])


@torch.no_grad()
def inputs_of(decoder: Decoder) -> list[torch.Tensor]:
    """What each group reads of a few random tokens, float32 [TOKENS, K]."""
    seen: dict[int, torch.Tensor] = {}

    def observe(group: Group, x: torch.Tensor, y: torch.Tensor) -> None:
        seen[group.index] = x.float()

    ids = torch.randint(0, decoder.config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    decoder.forward(ids, observe=observe)
    return [seen[g.index] for g in decoder.groups]
