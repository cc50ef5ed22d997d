"""The decoder computes what transformers computes, whole sequences and token by token."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES
from transformers import AutoModelForCausalLM

from dpllm.model.loading import LoadOptions, load_decoder

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def pair(request, checkpoints):
    path = checkpoints / request.param
    ids = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path).eval()(ids[None]).logits[0].float()
    return path, ids, expected


@pytest.mark.parametrize("granularity", ["fused", "linear"])
def test_whole_sequence(pair, granularity):
    path, ids, expected = pair
    decoder = load_decoder(path, LoadOptions(granularity=granularity))
    with torch.no_grad():
        logits = decoder.forward(ids)
    assert expected.std() > 0.05, "the random model must say something"
    assert (logits - expected).abs().max() < TOLERANCE


def test_prefill_in_chunks_then_step_by_step(pair):
    path, ids, expected = pair
    decoder = load_decoder(path)
    cache = decoder.new_cache(len(ids))
    with torch.no_grad():
        parts = [decoder.forward(ids[:11], cache), decoder.forward(ids[11:24], cache)]
        parts += [decoder.forward(ids[i : i + 1], cache) for i in range(24, len(ids))]
    assert cache.length == len(ids)
    assert (torch.cat(parts) - expected).abs().max() < TOLERANCE


def test_last_only_is_the_last_row(pair):
    path, ids, expected = pair
    decoder = load_decoder(path)
    with torch.no_grad():
        logits = decoder.forward(ids, last_only=True)
    assert logits.shape == (1, 96)
    assert (logits[0] - expected[-1]).abs().max() < TOLERANCE
