"""Policies: batched evaluation is step-by-step decoding, figures are what was read, budgets are kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from group_members import members
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_profiles import random_profiles

from dpllm.base.errors import InputError
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.evaluation.evaluate import evaluate
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.policies.base import PrecisionPolicy, Recorder
from dpllm.policies.fixed import RandomPolicy
from dpllm.policies.make import POLICIES, make_policy
from dpllm.policies.rate_distortion import RateDistortionPolicy
from dpllm.quant.overlay import Overlay

GRANULARITIES = ["fused", "linear"]
TARGETS = {
    "uniform": 3.0, "static": 3.3, "random": 3.4, "dp-llm": 3.25, "rate-distortion": 3.25, "oracle-dp-llm": 3.25,
    "oracle-rate-distortion": 3.25,
}  # fmt: skip


BACKENDS = {
    "reference": 1e-4,
    "cpu": 2e-3,
}  # and how far logits may differ by the order of additions: the native
# kernels round activations to 16 bits here, and a last bit of the input can move such a step


@pytest.fixture(scope="module", params=BACKENDS)
def decoders(request, quantized):
    options = {"backend": request.param, "cpu": CpuOptions(accuracy="exact")}
    return {g: load_decoder(quantized, LoadOptions(granularity=g, **options)) for g in GRANULARITIES}


def record(decoder, policy, ids, cache=None):
    """(logits [T, V], bits [T, G]) of one pass."""
    text = policy.begin_text() if isinstance(policy, PrecisionPolicy) else policy
    recorder = Recorder(text, decoder.groups)
    with torch.no_grad():
        logits = decoder.forward(ids, cache, recorder)
    return logits, recorder.bits()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", POLICIES)
def test_batched_equals_step_by_step(decoders, profiles, heldout_sequences, name, granularity):
    decoder, profile, ids = decoders[granularity], profiles[granularity], heldout_sequences[0][:40]
    batched, bits = record(decoder, make_policy(name, TARGETS[name], decoder, profile), ids)
    text = make_policy(name, TARGETS[name], decoder, profile).begin_text()
    cache = decoder.new_cache(len(ids))
    steps = [record(decoder, text, ids[i : i + 1], cache) for i in range(len(ids))]
    assert torch.equal(torch.cat([b for _, b in steps]), bits)
    tolerance = BACKENDS[decoder.backend.name.partition(":")[0]]
    assert (torch.cat([logits for logits, _ in steps]) - batched).abs().max() < tolerance
    with torch.no_grad():
        widest = decoder.forward(ids)
    assert (widest - batched).abs().max() > 0.1, "the widths must matter, else this shows nothing"
    dynamic = name not in ("uniform", "static")
    assert bool((bits != bits[0]).any()) == dynamic
    assert len(bits.unique()) > 1 or name == "uniform"


def test_evaluate_scores_what_step_by_step_decoding_says(decoders, profiles, heldout_sequences):
    decoder, profile, documents = decoders["fused"], profiles["fused"], heldout_sequences[:2, :24]
    policy = make_policy("dp-llm", 3.25, decoder, profile)
    result = evaluate(decoder, policy, 3.25, documents.tolist())
    nll, used = 0.0, []
    for ids in documents:
        cache = decoder.new_cache(len(ids))
        for i in range(len(ids) - 1):
            logits, bits = record(decoder, policy, ids[i : i + 1], cache)
            nll -= logits[0].double().log_softmax(0)[ids[i + 1]].item()
            used.append(bits[0].double().numpy() @ profile.weights / profile.weights.sum())
    assert result.tokens == 2 * 23
    assert result.nll_mean == pytest.approx(nll / result.tokens, abs=1e-4)
    assert result.perplexity == pytest.approx(math.exp(nll / result.tokens), rel=1e-3)
    assert result.effective_bits == pytest.approx(np.mean(used), abs=1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_recorded_figures_are_the_stored_bytes(decoders, profiles, quantized, heldout_sequences, granularity):
    decoder, overlay = decoders[granularity], Overlay.open(quantized)
    stored = dict(overlay.entries())
    named = [members(g.name, overlay.linears) for g in decoder.groups]
    assert sorted(n for names in named for n in names) == sorted(n for n in overlay.linears if n != "lm_head")

    def nbytes(name, bits):
        planes = sum(stored[f"{name}.planes.{p}"] for p in range(bits))
        return planes + stored[f"{name}.lut.{bits}"] + stored[f"{name}.scale"]

    policy = make_policy("rate-distortion", 3.25, decoder, profiles[granularity])
    recorder = Recorder(policy.begin_text(), decoder.groups)
    with torch.no_grad():
        decoder.forward(heldout_sequences[0][:20], select=recorder)
    selector = sum(2 * g.weight.in_features for g in decoder.groups)  # one float16 a column
    selector += 2 * decoder.groups[0].weight.in_features  # and the probe
    sizes = {n: math.prod(layout.shape) for n, layout in overlay.linears.items()}
    for t, row in enumerate(recorder.bits().tolist()):
        read = [(n, b) for names, b in zip(named, row, strict=True) for n in names]
        assert recorder.weight_bytes()[t].item() == sum(nbytes(n, b) for n, b in read) + selector
        mean = sum(sizes[n] * b for n, b in read) / sum(sizes[n] for n, _ in read)
        assert recorder.effective_bits()[t].item() == pytest.approx(mean, abs=1e-12)
    assert decoder.head_bytes() == stored["lm_head.int8"] + stored["lm_head.scale"]


def test_retargeting_between_tokens(decoders, profiles, heldout_sequences):
    decoder, ids = decoders["fused"], heldout_sequences[0]
    policy, cache = RateDistortionPolicy(profiles["fused"], decoder, 2.5), decoder.new_cache(len(ids))
    planes = [g.weight.planes.data_ptr() for g in decoder.groups]
    text, other = policy.begin_text(), policy.begin_text()
    before = other.thresholds.clone()
    used = {}
    for target, tokens in ((2.5, ids[:50]), (5.0, ids[50:100]), (2.5, ids[100:])):
        text.steer(target)
        rows = [record(decoder, text, token[None], cache)[1][0].double() for token in tokens]
        used.setdefault(target, []).extend(float(r.numpy() @ profiles["fused"].weights) for r in rows)
    total = profiles["fused"].weights.sum()
    assert np.mean(used[2.5]) / total < 3 < 4.5 < np.mean(used[5.0]) / total
    assert [g.weight.planes.data_ptr() for g in decoder.groups] == planes
    assert torch.equal(other.thresholds, before), "another text of the policy keeps its target"


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("target", [2.0, 2.2, 3.0, 3.25, 4.7, 6.0])
def test_static_fills_its_budget(decoders, profiles, granularity, target):
    decoder, profile = decoders[granularity], profiles[granularity]
    bits = np.asarray(make_policy("static", target, decoder, profile).fixed_bits)
    used, budget = float(bits @ profile.weights), target * profile.weights.sum()
    assert used <= budget * (1 + 1e-6)
    upgrades = profile.weights[bits < 6]
    assert (used + upgrades > budget * (1 - 1e-6)).all(), "one more bit would have fitted somewhere"

    def loss(widths):
        return profile.mean_loss[np.arange(len(bits)), np.asarray(widths) - 2].sum()

    assert loss(bits) <= loss([int(target)] * len(bits)) * (1 + 1e-6)


def test_random_hits_its_target(decoders):
    groups = decoders["fused"].groups
    policy, again, other = (RandomPolicy(3.25, len(groups), s).begin_text() for s in (0, 0, 1))
    x = torch.zeros(4000, 1)
    drawn = torch.stack([policy(g, x) for g in groups])
    assert set(drawn.unique().tolist()) == {3, 4}
    deviation = math.sqrt(0.25 * 0.75 / drawn.numel())
    assert abs(drawn.double().mean() - 3.25) < 4 * deviation
    assert ((drawn.double().mean(1) - 3.25).abs() < 5 * deviation * math.sqrt(len(groups))).all()
    assert torch.equal(torch.stack([again(g, x) for g in groups]), drawn)
    assert not torch.equal(torch.stack([other(g, x) for g in groups]), drawn)
    assert not torch.equal(drawn[0], drawn[1]), "groups draw on their own"


@pytest.mark.parametrize("target", [2.0, 4.0, 6.0])
def test_random_at_a_whole_target_is_uniform(decoders, target):
    groups = decoders["fused"].groups
    policy = RandomPolicy(target, len(groups)).begin_text()
    assert all((policy(g, torch.zeros(500, 1)) == int(target)).all() for g in groups)


@pytest.mark.parametrize("resident", [2, 3, 4])
@pytest.mark.parametrize("name", ["static", "rate-distortion", "random"])
def test_only_resident_planes_are_read(quantized, profiles, heldout_sequences, resident, name):
    decoder = load_decoder(quantized, LoadOptions(resident_bits=resident))
    assert all(g.resident_bits == resident == len(g.weight.planes) for g in decoder.groups)
    for target in {2.0, (2 + resident) / 2, float(resident)}:
        policy = make_policy(name, target, decoder, profiles["fused"])
        _, bits = record(decoder, policy, heldout_sequences[0])
        assert bits.max() <= resident
        if target == resident:
            assert (bits == resident).all()


def test_the_ends_of_the_range_read_seed_and_maximum(decoders, profiles, heldout_sequences):
    for target in (2.0, 6.0):
        policy = make_policy("rate-distortion", target, decoders["fused"], profiles["fused"])
        assert (record(decoders["fused"], policy, heldout_sequences[0])[1] == int(target)).all()


@pytest.mark.parametrize("target", [1.99, 6.01, 0.0, -3.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", POLICIES)
def test_impossible_targets(decoders, profiles, name, target):
    with pytest.raises(InputError, match="impossible") as e:
        make_policy(name, target, decoders["fused"], profiles["fused"])
    assert len(str(e.value).splitlines()) == 1


def test_needs_that_cannot_be_met(decoders, profiles, checkpoints, quantized):
    decoder, profile = decoders["fused"], profiles["fused"]
    with pytest.raises(InputError, match="unknown policy 'best'"):
        make_policy("best", 3.0, decoder, profile)
    with pytest.raises(InputError, match="whole bits"):
        make_policy("uniform", 3.5, decoder, profile)
    for name in ("static", "rate-distortion"):
        with pytest.raises(InputError, match="needs a calibration profile"):
            make_policy(name, 3.5, decoder, None)
    with pytest.raises(InputError, match="not quantised"):
        make_policy("random", 3.5, load_decoder(checkpoints / "llama"), None)
    with pytest.raises(InputError, match="impossible"):
        small = load_decoder(quantized, LoadOptions(resident_bits=3))
        make_policy("rate-distortion", 3.5, small, profile)


# -- the rule of rate-distortion ----------------------------------------------------------------------


def chosen_bits(profile: CalibrationProfile, lam: float, max_bits: int | None = None) -> np.ndarray:
    """[G, M] widths that the thresholds give to a signal in the middle of every bin."""
    signal = np.arange(profile.gain.shape[2]) + 0.5
    thresholds = profile.thresholds(lam, max_bits)
    assert thresholds.dtype == np.float32
    return profile.bits[0] + (signal[None, :, None] > thresholds[:, None, :]).sum(2)


def cheapest_bits(profile: CalibrationProfile, lam: float, max_bits: int) -> np.ndarray:
    """The definition: in each bin, the width of least expected loss + lambda * bytes (the lower of equals)."""
    groups, _, bins = profile.gain.shape
    best = np.zeros((groups, bins), int)
    for g in range(groups):
        for m in range(bins):
            steps = max_bits - profile.bits[0]
            loss = [profile.gain[g, b:, m].sum() for b in range(steps + 1)]
            best[g, m] = np.argmin([loss[b] + lam * profile.cost[g, b] for b in range(steps + 1)])
    return profile.bits[0] + best


LAMBDAS = st.integers(0, 400).map(lambda n: n / 8)  # exact in binary, so ties are ties


@settings(max_examples=200, deadline=None)
@given(random_profiles(), LAMBDAS, st.data())
def test_thresholds_minimise_loss_plus_price(profile, lam, data):
    low, high = profile.bits
    resident = data.draw(st.integers(low + 1, high))
    np.testing.assert_array_equal(chosen_bits(profile, lam, resident), cheapest_bits(profile, lam, resident))


@settings(max_examples=200, deadline=None)
@given(random_profiles(), LAMBDAS, LAMBDAS)
def test_a_higher_price_never_buys_more(profile, one, other):
    cheap, dear = sorted((one, other))
    assert (chosen_bits(profile, cheap) >= chosen_bits(profile, dear)).all()
    assert (profile.thresholds(cheap) <= profile.thresholds(dear)).all()


@settings(max_examples=50, deadline=None)
@given(random_profiles())
def test_thresholds_ascend(profile):
    for lam in (0.0, 0.5, 3.0, 1e9):
        t = profile.thresholds(lam)
        assert (t[:, 1:] >= t[:, :-1]).all()
    assert (chosen_bits(profile, 1e9) == profile.bits[0]).all()
