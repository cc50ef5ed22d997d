"""DP-LLM as published, without the defects of its release; each defect has its test."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpllm.base.errors import InputError
from dpllm.calib.dp_llm import LINE, PROJECTION, DPLLMOptions, calibrate_dp_llm, fit_estimator
from dpllm.calib.dp_llm_averages import (
    AveragesOptions,
    averages,
    interpolating_view,
    lower_width,
    tune_averages,
)
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.policies.base import Recorder
from dpllm.policies.dp_llm import DPLLMPolicy, threshold
from dpllm.policies.make import make_policy

BRIEF = AveragesOptions(steps=4, length=48)
FAST = DPLLMOptions(averages=BRIEF, tokens=512, tune_steps=20)


@pytest.fixture(scope="module")
def decoder(quantized):
    return load_decoder(quantized, LoadOptions(granularity="linear", cpu=CpuOptions(accuracy="exact")))


@pytest.fixture(scope="module")
def six(decoder):
    return np.full(len(decoder.groups), 6)


# -- average precision ------------------------------------------------------------------------------------


def test_interpolated_outputs_and_their_gradient(decoder, six):
    group, x = decoder.groups[4], torch.randn(3, decoder.groups[4].weight.in_features)
    p = torch.tensor(3.3, requires_grad=True)
    low, high = (x @ decoder.backend.dequantize(group.weight, b).T for b in (3, 4))
    gemv = interpolating_view(decoder, six).backend.gemv
    y, whole = (
        gemv(x, group.weight, p.expand(3)),
        gemv(x, group.weight, torch.full((3,), 5, dtype=torch.int32)),
    )
    torch.testing.assert_close(y, 0.7 * low + 0.3 * high, rtol=1e-4, atol=1e-5)
    expected = x @ decoder.backend.dequantize(group.weight, 5).T
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)  # activations of 16 bits
    y.sum().backward()
    assert p.grad.item() == pytest.approx((high - low).sum().item(), rel=1e-3)


def test_averages_meet_their_target_within_their_caps(decoder, calibration_sequences):
    caps = np.asarray([3 + g % 4 for g in range(len(decoder.groups))])
    weights = np.asarray([g.weights for g in decoder.groups])
    p = tune_averages(decoder, calibration_sequences, caps, 3.25, BRIEF)
    assert (p @ weights) / weights.sum() == pytest.approx(3.25, abs=1e-6)
    assert (p >= 2).all() and (p <= caps).all()


def test_tuning_moves_bits_to_where_they_help(decoder, six, calibration_sequences):
    def loss(p):
        total, view = 0.0, interpolating_view(decoder, six)
        with torch.no_grad():
            for ids in calibration_sequences[:6, :48]:
                select = lambda g, x: torch.tensor(float(p[g.index])).expand(len(x))  # noqa: E731
                logits = view.forward(ids[:-1], select=select)
                total += torch.nn.functional.cross_entropy(logits, ids[1:]).item()
        return total / 6

    options = AveragesOptions(steps=24, length=48, learning_rate=0.2)
    p = tune_averages(decoder, calibration_sequences[:6], six, 3.5, options)
    assert p.std() > 0.05
    assert loss(p) < loss(np.full(len(p), 3.5))


def test_a_whole_numbered_target_is_not_frozen(decoder, six, calibration_sequences):
    # Released code: target 4.0 starts at l = h = 4, where every gradient is zero.
    assert lower_width(4.0, 2, 6) == 4 and lower_width(4.0, 2, 4) == 3 and lower_width(6.0, 2, 6) == 5
    p = tune_averages(decoder, calibration_sequences, six, 4.0, BRIEF)
    assert np.abs(p - 4.0).max() > 0.01


def test_nothing_decays_the_averages(decoder, six, calibration_sequences, monkeypatch):
    # Released code: AdamW's default decay pulls every p to the middle of its range.
    seen = {}
    original = torch.optim.AdamW.__init__

    def spy(self, params, **options):
        seen.update(options)
        original(self, params, **options)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", spy)
    tune_averages(decoder, calibration_sequences, six, 3.0, BRIEF)
    assert seen["weight_decay"] == 0.0


def test_a_group_whose_budget_is_the_seed_is_left_alone(decoder, calibration_sequences, profiles):
    # Released code: such a linear looks up the table of -1 bits.
    caps = np.full(len(decoder.groups), 6)
    caps[3] = caps[10] = 2
    found = calibrate_dp_llm(decoder, calibration_sequences[:6], {"5": caps}, {"5": [3.5]}, FAST)
    assert found["dp-llm.averages"][0, [3, 10]].tolist() == [2.0, 2.0]
    assert (found["dp-llm.kind"][[3, 10]] == -1).all()
    profile = with_extra(profiles["linear"], found)
    policy = DPLLMPolicy(profile, decoder, 3.5)
    bits = record(decoder, policy, calibration_sequences[7][:32])
    assert (bits[:, [3, 10]] == 2).all()
    assert len(bits.unique()) > 2


# -- estimators and thresholds ----------------------------------------------------------------------------


def test_a_line_serves_where_it_explains_the_error():
    generator = torch.Generator().manual_seed(0)
    delta, direction = torch.randn(20, 12, generator=generator), torch.randn(12, generator=generator)
    x = torch.rand(400, 1, generator=generator) * direction  # one direction: the error is linear in the norm
    found = fit_estimator(delta, x, x, None, DPLLMOptions())
    assert found.kind == LINE and found.explained > 0.999 and found.projection is None
    exact = (x @ delta.T).norm(dim=1)
    slope, intercept = found.line
    torch.testing.assert_close(slope * x.norm(dim=1) + intercept, exact, rtol=1e-2, atol=1e-3)


def test_otherwise_a_tuned_projection_does():
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(96, 48, generator=generator) * torch.logspace(0, -2, 48)
    x = torch.randn(1500, 48, generator=generator)
    x = x / x.norm(dim=1, keepdim=True)  # the norm says nothing
    found = fit_estimator(delta, x, x, None, DPLLMOptions())
    raw = fit_estimator(delta, x, x, None, DPLLMOptions(tune_steps=1))
    exact = (x @ delta.T).norm(dim=1).numpy()

    def miss(e):
        return np.abs((x @ torch.from_numpy(e.projection).float().T).norm(dim=1).numpy() / exact - 1).mean()

    assert found.kind == PROJECTION and found.projection.shape == (64, 48)
    assert miss(raw) < 0.15, "the paper's bound holds before tuning"
    assert miss(found) < miss(raw)


def test_thresholds_are_quantiles_of_the_estimate_itself():
    # Released code: quantiles of exact errors on fresh inputs, compared with estimates on stale ones.
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn(64, 32, generator=generator) * torch.logspace(0, -1, 32)
    fresh = torch.randn(2000, 32, generator=generator)
    stale = fresh + 0.7 * torch.randn(2000, 32, generator=generator)
    found = fit_estimator(delta, fresh, stale, torch.ones(32), DPLLMOptions(k=16, tune_steps=30))
    estimate = (stale @ torch.from_numpy(found.projection).float().T).norm(dim=1).numpy()
    for share in (0.1, 0.37, 0.9):
        assert (estimate > threshold(found.quantiles, share)).mean() == pytest.approx(share, abs=0.01)
    # The exact errors' quantiles would not have done: their distribution is another one.
    assert abs((estimate > threshold(found.exact, 0.1)).mean() - 0.1) > 0.02


def test_thresholds_at_the_ends():
    stored = np.linspace(0, 1, 257)
    assert threshold(stored, 0.005) == float("inf") and threshold(stored, 0.995) == float("-inf")
    assert threshold(stored, 0.25) == pytest.approx(0.75, rel=1e-4)


# -- the policy -------------------------------------------------------------------------------------------


def with_extra(profile, arrays):
    from dataclasses import replace

    return replace(profile, extra=dict(profile.extra) | arrays)


def record(decoder, policy, ids):
    recorder = Recorder(policy.begin_text(), decoder.groups)
    with torch.no_grad():
        decoder.forward(ids, select=recorder)
    return recorder.bits()


@pytest.mark.parametrize("name", ["dp-llm", "oracle-dp-llm"])
def test_two_widths_per_group_and_the_target_is_met(decoder, profiles, heldout_sequences, name):
    policy = make_policy(name, 3.25, decoder, profiles["linear"])
    bits = torch.cat([record(decoder, policy, ids) for ids in heldout_sequences[:24]]).double()
    for g, low in enumerate(policy.low):
        assert set(bits[:, g].tolist()) <= {float(low), float(low + 1)}
    weights = torch.from_numpy(profiles["linear"].weights).double()
    used = float((bits.mean(0) @ weights) / weights.sum())
    assert abs(used - 3.25) < 0.06, "the release misses by 0.05 to 0.09"


def test_the_share_of_the_wider_width_is_the_averages_fraction(decoder, profiles, heldout_sequences):
    policy = make_policy("dp-llm", 3.25, decoder, profiles["linear"])
    row = list(profiles["linear"].extra["dp-llm.targets"]).index(3.25)
    average = profiles["linear"].extra["dp-llm.averages"][row]
    bits = torch.cat([record(decoder, policy, ids) for ids in heldout_sequences]).double().mean(0).numpy()
    assert np.abs(bits - average).mean() < 0.06


def test_several_rows_are_several_tokens(decoder, profiles, heldout_sequences):
    # Released code: more than one sequence at a time falls back to the maximum for all.
    policy = make_policy("dp-llm", 3.25, decoder, profiles["linear"])
    ids = heldout_sequences[0][:24]
    together = record(decoder, policy, ids)
    assert (together != together[0]).any()


def test_budgets_cap_the_widths(quantized, profiles, heldout_sequences):
    profile = profiles["linear"]
    planes = dict(zip(profile.group_names, profile.budget(4).tolist(), strict=True))
    small = load_decoder(quantized, LoadOptions(granularity="linear", resident_bits=planes))
    bits = record(small, make_policy("dp-llm", 3.25, small, profile), heldout_sequences[0])
    assert (bits.amax(0).numpy() <= profile.budget(4)).all()


def test_its_bytes_are_its_estimators(decoder, profiles):
    profile = profiles["linear"]
    policy = make_policy("dp-llm", 3.25, decoder, profile)
    expected = 0
    for g, low in enumerate(policy.low):
        projected = profile.extra["dp-llm.kind"][g, low - 2] == PROJECTION
        expected += 2 * 64 * decoder.groups[g].weight.in_features if projected else 8
    assert policy.extra_bytes == expected
    assert (profile.extra["dp-llm.kind"] == PROJECTION).any(), "else this shows nothing"


def test_targets_that_were_not_calibrated(decoder, profiles):
    with pytest.raises(InputError, match=r"not calibrated for 3.6 bits.*--targets 3.6"):
        make_policy("dp-llm", 3.6, decoder, profiles["linear"])
    bare = with_extra(profiles["linear"], {})
    bare = type(bare)(**{**bare.__dict__, "extra": {}})
    with pytest.raises(InputError, match="--dp-llm"):
        make_policy("dp-llm", 3.25, decoder, bare)
    with pytest.raises(InputError, match="oracle"):
        make_policy("oracle-rate-distortion", 3.25, decoder, bare)


def test_sigmoid_parametrisation():
    caps = torch.tensor([6.0, 3.0, 2.0])
    p = averages(torch.tensor([0.0, 0.0, 5.0]), 2, caps)
    torch.testing.assert_close(p, torch.tensor([4.0, 2.5, 2.0]))
