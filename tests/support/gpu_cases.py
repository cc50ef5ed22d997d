"""What tests of the GPU's decode step share: its operations run one by one on the CPU, by their definitions."""

from __future__ import annotations

import torch

from dpllm.decode.gpu_step import GpuStep
from dpllm.decode.step import decode_one
from dpllm.kernels.gpu_step import definition as step_reference
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.policies.base import observe

TOLERANCE = 1e-4


def load(path, **options):
    return load_decoder(path, LoadOptions(backend="reference", **options))


def step_of(decoder) -> GpuStep:
    return GpuStep(decoder, step_reference)


def assert_same(found, expected) -> None:
    assert torch.equal(found[1], expected[1]), "widths"
    assert (found[0] - expected[0]).abs().max() < TOLERANCE
    assert (expected[0][1:] - expected[0][:-1]).abs().max() > 0.1, "the tokens must matter"


def decode_text(decoder, policy, ids, step, change=lambda t, policy: None):
    """Token by token with what was decoded told to the policy, as Engine does; both results."""
    cache, found, logits = decoder.new_cache(len(ids) + 1), [], torch.empty(0)
    for t, token in enumerate(ids):
        if t:
            observe(policy, logits, torch.tensor([token]))
        change(t, policy)
        logits, bits = decode_one(decoder, step, token, cache, policy)
        found.append((logits.clone(), bits.clone()))
    logits, bits = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(bits)
