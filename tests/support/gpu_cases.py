"""What tests of the GPU's decode step share: its operations run one by one on the CPU, by their definitions."""

from __future__ import annotations

import torch
from decode_cases import copied

from dpllm.decode.gpu_step import GpuStep
from dpllm.decode.step import DecoderStep
from dpllm.kernels.gpu_step import definition as step_reference
from dpllm.model.loading import LoadOptions, load_decoder

TOLERANCE = 1e-4


def load(path, **options):
    return load_decoder(path, LoadOptions(backend="reference", **options))


def step_of(decoder) -> GpuStep:
    return GpuStep(decoder, step_reference)


def assert_same(found, expected) -> None:
    assert torch.equal(found[1], expected[1]), "widths"
    assert (found[0] - expected[0]).abs().max() < TOLERANCE
    assert (expected[0][1:] - expected[0][:-1]).abs().max() > 0.1, "the tokens must matter"


def decode_text(decoder, text, ids, step=None, change=lambda t, text: None):
    """(logits [T, V], bits [T, G]), token by token as Engine decodes: learn, then step. step: None for torch's."""
    step = step or DecoderStep(decoder)
    cache, found, stepped = decoder.new_cache(len(ids) + 1), [], None
    for t, token in enumerate(ids):
        if stepped is not None:
            step.learn(text, stepped, token)
        change(t, text)
        stepped = step(token, cache, text)
        found.append(copied(stepped))
    logits, bits = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(bits)
