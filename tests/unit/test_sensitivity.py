"""The token's multiplier: features as defined, foretelling what can be foretold, neutral where unknown."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpllm.calib.runtime.token_sensitivity import (
    DECAY,
    LIMIT,
    POWER,
    TokenProbe,
    fit_probe,
    sequence_context,
    step_context,
)


def test_step_features_by_hand():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    tokens = torch.tensor([1, 2])
    found = step_context(logits, tokens, None).double().numpy()
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    entropy = -(p * np.log(p)).sum(1)
    np.testing.assert_allclose(found[:, 0], np.log(entropy + 0.01), rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], np.log(p[[0, 1], tokens]), rtol=1e-6)
    np.testing.assert_allclose(found[:, 2], found[:, 0], rtol=1e-6)
    later = step_context(logits.flip(0), tokens, torch.tensor(found).float()).numpy()
    np.testing.assert_allclose(later[:, 2], DECAY * found[:, 2] + (1 - DECAY) * found[::-1, 0], rtol=1e-5)


def test_a_whole_sequence_is_its_steps():
    generator = torch.Generator().manual_seed(0)
    logits, ids = (
        torch.randn(30, 50, generator=generator) * 3,
        torch.randint(0, 50, (30,), generator=generator),
    )
    whole = sequence_context(logits, ids)
    assert whole.shape == (30, 3) and whole[0].isnan().all()
    context = None
    for t in range(29):
        context = step_context(logits[t : t + 1], ids[t + 1 : t + 2], context)
        torch.testing.assert_close(whole[t + 1], context[0], rtol=1e-5, atol=1e-6)


def samples(tokens, noise, rng):
    inputs, context = rng.standard_normal((tokens, 16)), rng.standard_normal((tokens, 3))
    truth = 0.6 * inputs[:, 0] - 0.3 * inputs[:, 5] + 0.9 * context[:, 1]
    return inputs, context, truth, np.exp(truth + noise * rng.standard_normal(tokens))


def test_the_probe_foretells_what_it_can():
    rng = np.random.default_rng(0)
    inputs, context, truth, sensitivity = samples(6000, 1.0, rng)
    probe, numbers, explained = fit_probe(inputs, context, sensitivity)
    assert probe.dtype == np.float16 and numbers.shape == (7,)
    assert explained == pytest.approx(truth.var() / (truth.var() + 1), abs=0.1)
    multiplier = TokenProbe.of(probe, numbers).multiplier(
        torch.from_numpy(inputs).float(), torch.from_numpy(context).float()
    )
    log = multiplier.log().numpy()
    inside = np.abs(log) < LIMIT - 0.1
    assert np.corrcoef(log[inside], truth[inside])[0, 1] > 0.99
    assert np.polyfit(truth[inside], log[inside], 1)[0] == pytest.approx(POWER, rel=0.05)
    assert abs(log.mean()) < 0.05, "the mean token's multiplier is one"


def test_where_nothing_can_be_foretold_every_token_counts_the_same():
    rng = np.random.default_rng(1)
    probe, numbers, explained = fit_probe(
        rng.standard_normal((400, 64)), rng.standard_normal((400, 3)), np.exp(rng.standard_normal(400))
    )
    assert explained <= 0
    assert not probe.any() and not numbers.any()


def test_an_unknown_previous_step_counts_as_the_mean():
    rng = np.random.default_rng(2)
    inputs, context, _, sensitivity = samples(2000, 0.5, rng)
    context[::50] = np.nan
    probe = TokenProbe.of(*fit_probe(inputs, context, sensitivity)[:2])
    x = torch.from_numpy(inputs[:4]).float()
    none = probe.multiplier(x, None)
    torch.testing.assert_close(probe.multiplier(x, torch.full((4, 3), float("nan"))), none)
    torch.testing.assert_close(probe.multiplier(x, probe.means.expand(4, 3)), none)
    assert (probe.multiplier(x, probe.means.expand(4, 3) + 1) - none).abs().max() > 0.1


def test_the_correction_multiplies_and_strange_inputs_are_bounded():
    probe = TokenProbe(torch.full((4,), 100.0), torch.zeros(3), torch.zeros(3), 0.0)
    x = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]])
    found = probe.multiplier(x, None, correction=0.5).log()
    torch.testing.assert_close(found, torch.tensor([LIMIT + 0.5, -LIMIT + 0.5]))
