"""Calibration measures what it says, and its targets hold on text it has not seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from group_members import members
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from dpllm.base.errors import InputError
from dpllm.calib.calibrate import CalibrateOptions, Calibrator, fit_gains
from dpllm.calib.gradient_passes import LABEL_STREAM, gradient_leaf
from dpllm.calib.partial_results import PartialResults
from dpllm.calib.runtime.threshold_rule import stale_sources
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.policies.base import Recorder
from dpllm.policies.make import make_policy
from dpllm.policies.rate_distortion import RateDistortionPolicy

TARGETS = (2.5, 3.0, 3.25, 3.5, 4.0, 4.5)


@pytest.fixture(scope="module")
def decoders(quantized):
    exact = CpuOptions(accuracy="exact")
    return {g: load_decoder(quantized, LoadOptions(granularity=g, cpu=exact)) for g in ("fused", "linear")}


def quiet(*stage) -> None:
    pass


# -- pass 1: saliency -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twin(tiny_checkpoint, decoders):
    """transformers' model with the quantised weights at full width: the same function, other code."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).float().eval()
    decoder = decoders["linear"]
    with torch.no_grad():
        for group in decoder.groups:
            model.get_submodule(group.name).weight.copy_(decoder.backend.dequantize(group.weight, 6))
        model.lm_head.weight.copy_(decoder.head.values.float() * decoder.head.scale.float()[:, None])
    return model


def autograd_saliency(model, sequences, seed) -> dict[str, torch.Tensor]:
    """Mean over tokens of squared output gradients of every linear, labels drawn from the model."""
    outputs: dict[str, torch.Tensor] = {}
    totals: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, inputs, output):
            output.retain_grad()
            outputs[name] = output

        return hook

    linears = {n: m for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    handles = [m.register_forward_hook(keep(f"model.{n}")) for n, m in linears.items()]
    for i, ids in enumerate(sequences):
        generator = torch.Generator().manual_seed(seed * LABEL_STREAM + i)
        logits = model(ids[None]).logits[0].float()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for name, y in outputs.items():
            totals[name] = totals.get(name, 0) + y.grad[0].square().sum(0)
    for handle in handles:
        handle.remove()
    return {n: t / sequences.numel() for n, t in totals.items()}


def test_saliency_is_the_mean_squared_gradient(decoders, twin, calibration_sequences):
    sequences = calibration_sequences[:3, :48]
    expected = autograd_saliency(twin, sequences, seed=5)
    for granularity, decoder in decoders.items():
        found = Calibrator(decoder, sequences, CalibrateOptions(seed=5)).saliency(quiet)
        for group, saliency in zip(decoder.groups, found, strict=True):
            reference = torch.cat([expected[n] for n in members(group.name, expected)])
            assert saliency.shape == reference.shape, (granularity, group.name)
            assert reference.max() > 0
            assert (saliency - reference).abs().max() < 1e-3 * reference.max(), group.name


def test_saliency_leaves_the_decoder_as_it_was(decoders, calibration_sequences):
    decoder, ids = decoders["fused"], calibration_sequences[0][:16]
    with torch.no_grad():
        before = decoder.forward(ids)
    Calibrator(decoder, calibration_sequences[:1, :16], CalibrateOptions()).saliency(quiet)
    with torch.no_grad():
        after = decoder.forward(ids)
    assert torch.equal(before, after)
    assert not after.requires_grad and not decoder.forward(ids).requires_grad


# -- pass 2: gains ----------------------------------------------------------------------------------------


def test_losses_are_weighted_output_errors(decoders, calibration_sequences):
    decoder, sequences = decoders["fused"], calibration_sequences[:2, :32]
    calibrator = Calibrator(decoder, sequences, CalibrateOptions(seed=3))
    saliency = calibrator.saliency(quiet)
    diagonals = [calibrator.diagonal(g, s) for g, s in zip(decoder.groups, saliency, strict=True)]
    m = calibrator.measure(saliency, diagonals, quiet)
    assert m.signal.shape == (len(decoder.groups), 64) and m.inputs.shape == (64, 64)
    assert m.loss.shape == m.exact.shape == (len(decoder.groups), 64, 5)
    assert m.context.shape == (64, 3) and m.sensitivity.shape == (64,)
    assert (m.loss[:, :, 4] == 0).all() and (m.exact[:, :, 4] == 0).all(), "the widest is the reference"
    means = m.exact.mean(1)
    assert (means[:, :-1] > means[:, 1:]).all(), "more planes, less loss"
    # One group by hand: the first layer's input does not depend on the widths drawn.
    group = decoder.groups[0]
    x = torch.cat([decoder.rms_norm(decoder.embed(row), decoder.layers[0].input_norm) for row in sequences])
    delta = decoder.backend.dequantize(group.weight, 6) - decoder.backend.dequantize(group.weight, 3)
    errors = (x.double() @ delta.double().T) ** 2
    np.testing.assert_allclose(m.exact[0, :, 1], errors @ saliency[0].double(), rtol=1e-3)
    np.testing.assert_allclose(m.signal[0], x**2 @ diagonals[0], rtol=1e-5)
    np.testing.assert_array_equal(m.inputs, x)
    own = torch.cat([own_gradients(decoder, ids, 3, i) for i, ids in enumerate(sequences)])
    np.testing.assert_allclose(m.loss[0, :, 1], (errors * own.double()).sum(1), rtol=1e-3, atol=1e-9)


def own_gradients(decoder, ids, seed, number) -> torch.Tensor:
    """Squared gradients [T, N] of group 0's output, under the widths and labels that calibration draws."""
    found = []
    widths = np.arange(2, 7)
    odds = 0.75 ** np.arange(5) / (0.75 ** np.arange(5)).sum()
    rng, drawn = np.random.default_rng(seed * LABEL_STREAM + number), {}

    def select(group, x):
        if group.index not in drawn:
            drawn[group.index] = torch.as_tensor(rng.choice(widths, len(x), p=odds), dtype=torch.int32)
        return drawn[group.index]

    def observe(group, x, y):
        if group.index == 0:
            y.register_hook(lambda grad: found.append(grad**2))

    logits = decoder.forward(ids, select=select, observe=observe, embedded=gradient_leaf(decoder, ids))
    generator = torch.Generator().manual_seed(seed * LABEL_STREAM + number)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return found[-1]


def test_fit_gains_recovers_a_monotone_relation():
    rng = np.random.default_rng(0)
    signal = rng.gamma(2.0, size=(2, 20_000))
    truth = [lambda s: 3 * s**1.5, lambda s: 0.2 + np.sqrt(s)]
    gains = np.stack([f(s) for f, s in zip(truth, signal, strict=True)])
    noisy = gains * rng.gamma(2.0, 0.5, gains.shape)  # mean one
    loss = np.stack([noisy * 1.25, noisy * 0.25, np.zeros_like(noisy)], axis=2)  # steps of 1 and 1/4
    edges, gain = fit_gains(signal, loss, 32)
    assert edges.shape == (2, 31) and gain.shape == (2, 2, 32)
    assert (np.diff(edges, axis=1) > 0).all()
    assert (np.diff(gain, axis=2) >= 0).all()
    for g in range(2):
        place = np.searchsorted(edges[g], signal[g])
        expected = np.asarray([gains[g, place == m].mean() for m in range(32)])
        np.testing.assert_allclose(gain[g, 0], expected, rtol=0.16)
        np.testing.assert_allclose(gain[g, 1], expected / 4, rtol=0.16)
        assert abs((gain[g, 0] / expected).mean() - 1) < 0.03


def test_edges_lie_between_the_values_of_a_signal_that_takes_few():
    rng = np.random.default_rng(0)
    values = np.asarray([0.5, 1.0, 3.0, 7.0])
    signal = rng.choice(values, (2, 4000)) * (1 + 1e-6 * rng.standard_normal((2, 4000)))
    edges, _ = fit_gains(signal, rng.random((2, 4000, 3)), 16)
    inner = edges[edges < 6.9]
    assert np.isclose(inner[:, None], [0.75, 2.0, 5.0], rtol=1e-4).any(axis=1).all()


def test_fit_gains_of_an_uninformative_signal_is_nearly_flat():
    rng = np.random.default_rng(1)
    signal, noise = rng.random((1, 6400)), rng.gamma(2.0, size=(1, 6400))
    loss = np.stack([noise + 1 - signal, np.zeros_like(noise)], axis=2)  # falling, if anything
    _, gain = fit_gains(signal, loss, 16)
    assert (np.diff(gain[0, 0]) > 0).all(), "a slight slope, so that any target can be hit"
    assert gain[0, 0].max() / gain[0, 0].min() < 1.12
    assert gain.mean() == pytest.approx(loss[:, :, 0].mean(), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.booleans())
def test_fit_gains_never_breaks(seed, tokens, constant):
    rng = np.random.default_rng(seed)
    signal = np.ones((2, tokens)) if constant else rng.integers(0, 4, (2, tokens)).astype(float)
    loss = np.concatenate([rng.random((2, tokens, 3)), np.zeros((2, tokens, 1))], axis=2)
    edges, gain = fit_gains(signal, loss, 48)
    assert np.isfinite(gain).all() and (gain >= 0).all()
    assert (np.diff(gain, axis=2) >= 0).all()
    assert (np.diff(edges, axis=1) >= 0).all()


# -- pass 3: targets --------------------------------------------------------------------------------------


def measured_bits(decoder, profile, target, sequences) -> float:
    recorder = Recorder(make_policy("rate-distortion", target, decoder, profile).begin_text(), decoder.groups)
    means = []
    with torch.no_grad():
        for ids in sequences:
            decoder.forward(ids, select=recorder, last_only=True)
            means.append(recorder.effective_bits().mean().item())
    return float(np.mean(means))


@pytest.mark.parametrize("granularity", ["fused", "linear"])
def test_targets_hold_on_other_text(decoders, profiles, heldout_sequences, granularity):
    decoder, profile = decoders[granularity], profiles[granularity]
    used = {t: measured_bits(decoder, profile, t, heldout_sequences) for t in TARGETS}
    assert all(abs(bits - target) <= 0.05 for target, bits in used.items()), used


@pytest.mark.parametrize("resident", [3, 4])
def test_targets_hold_under_a_memory_limit(quantized, profiles, heldout_sequences, resident):
    decoder = load_decoder(quantized, LoadOptions(resident_bits=resident))
    targets = [t for t in (2.5, 2.8, 3.25, 3.7) if t < resident]
    used = {t: measured_bits(decoder, profiles["fused"], t, heldout_sequences) for t in targets}
    assert all(abs(bits - target) <= 0.05 for target, bits in used.items()), used


def test_curves_rise_as_the_price_falls(profiles):
    for profile in profiles.values():
        assert (np.diff(profile.curve_log2_lambda, axis=1) < 0).all()
        assert (np.diff(profile.curve_bits, axis=1) >= 0).all()
        assert profile.target_range() == (2.0, 6.0)
        assert profile.target_range(4) == (2.0, 4.0)


def test_bits_used_is_what_the_policy_uses(decoders, profiles, heldout_sequences):
    decoder, profile, some = decoders["fused"], profiles["fused"], heldout_sequences[:4]
    calibrator = Calibrator(decoder, some, CalibrateOptions())
    used = calibrator.bits_used(profile, profile.lambda_for(3.3), some)
    assert used == pytest.approx(measured_bits(decoder, profile, 3.3, some), abs=1e-9)


def test_the_same_seed_gives_the_same_profile(decoders, calibration_sequences):
    def calibrate(seed):
        sequences = calibration_sequences[:4, :48]
        return Calibrator(decoders["fused"], sequences, CalibrateOptions(seed=seed, points=3)).run(
            "a" * 64, "fused", {"seed": seed}, quiet
        )

    once, again, other = calibrate(0), calibrate(0), calibrate(1)
    arrays = [f.name for f in dataclasses.fields(once) if isinstance(getattr(once, f.name), np.ndarray)]
    assert len(arrays) == 11
    for name in arrays:
        np.testing.assert_array_equal(getattr(once, name), getattr(again, name))
    assert all(np.array_equal(a, b) for a, b in zip(once.diagonals, again.diagonals, strict=True))
    assert not np.array_equal(once.gain, other.gain)
    assert once.extra.keys() == again.extra.keys()
    assert all(np.array_equal(once.extra[n], again.extra[n]) for n in once.extra)
    assert {k: once.origin[k] for k in ("seed", "tokens", "budgets")} == {
        "seed": 0, "tokens": 4 * 48, "budgets": {"5": 4},
    }  # fmt: skip


class Cut(Exception):
    """A run that is killed."""


@pytest.mark.parametrize("stage, done", [("saliency", 4), ("gains", 9), ("curve", 1)])
def test_a_killed_calibration_continues_to_the_same_profile(
    decoders, calibration_sequences, tmp_path, stage, done
):
    sequences, folder, seen = calibration_sequences[:10, :32], tmp_path / "p.partial", []

    def killed(s, d, total):
        if (s, d) == (stage, done):
            raise Cut

    def job(place=None):
        options = CalibrateOptions(points=2)
        return Calibrator(decoders["fused"], sequences, options, PartialResults(place))

    with pytest.raises(Cut):
        job(tmp_path / "p").run("a" * 64, "fused", {}, killed)
    kept = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.safetensors")}
    assert len(kept) == {"saliency": 0, "gains": 1 + 9, "curve": 1 + 10 + 1}[stage]
    calibrator = job(tmp_path / "p")
    resumed = calibrator.run("a" * 64, "fused", {}, lambda s, d, total: seen.append(s))
    assert {n: (folder / n).stat().st_mtime_ns for n in kept} == kept, (
        "finished parts were not computed again"
    )
    calibrator.partial.remove()
    assert not list(tmp_path.iterdir())
    assert ("saliency" in seen) == (stage == "saliency")
    fresh = job().run("a" * 64, "fused", {}, quiet)
    for name in ("knots", "gain", "curve_bits", "probe", "context"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(fresh, name))


def test_unfinished_work_of_other_options_is_neither_used_nor_deleted(
    decoders, calibration_sequences, tmp_path
):
    sequences, seen = calibration_sequences[:2, :32], []

    def cut(s, d, total):
        seen.append(s)
        if s == "gains":
            raise Cut

    def run(restart=False, **options):
        partial = PartialResults(tmp_path / "p")
        calibrator = Calibrator(decoders["fused"], sequences, CalibrateOptions(**options), partial)
        calibrator.run("a" * 64, "fused", {}, cut, restart=restart)

    with pytest.raises(Cut):
        run()
    with pytest.raises(InputError, match=r"p\.partial holds .* seed was 0 and is 1.*--restart"):
        run(seed=1)
    with pytest.raises(Cut):
        run(budgets=(3.0, 4.0))
    assert seen == ["saliency", "saliency", "gains", "gains"], "no part depends on the budgets"
    with pytest.raises(Cut):
        run(seed=1, restart=True)
    assert seen[4:] == ["saliency", "saliency", "gains"]
    (damaged,) = tmp_path.glob("p.partial/saliency-*")
    damaged.write_bytes(b"not even a safetensors file")
    with pytest.raises(Cut):
        run(seed=1)
    assert seen[7:] == ["saliency", "saliency", "gains"], "a damaged part is computed again"


def test_budgets_count_bytes_and_are_filled(decoders, profiles):
    for granularity, profile in profiles.items():
        groups = decoders[granularity].groups
        planes = profile.budget(4)

        def held(bits, groups=groups):
            total = 0
            for g, b in zip(groups, bits, strict=True):
                total += b * g.weights / 8 + sum(
                    g.weight.nbytes(w) - w * g.weights / 8 for w in range(2, b + 1)
                )
            return total

        allowed = held([4] * len(groups))
        assert held(planes) <= allowed * (1 + 1e-6)
        assert len(set(planes.tolist())) > 1, "not all groups alike"

        def loss(bits, profile=profile):
            return profile.mean_loss[np.arange(len(bits)), np.asarray(bits) - 2].sum()

        assert loss(planes) <= loss([4] * len(groups))
        low, high = profile.target_range(planes)
        assert low == 2.0 and high == pytest.approx((planes * profile.weights).sum() / profile.weights.sum())


def test_targets_hold_under_a_budget(quantized, profiles, heldout_sequences):
    profile = profiles["fused"]
    planes = dict(zip(profile.group_names, profile.budget(4).tolist(), strict=True))
    decoder = load_decoder(quantized, LoadOptions(resident_bits=planes))
    assert [len(g.weight.planes) for g in decoder.groups] == profile.budget(4).tolist()
    used = {t: measured_bits(decoder, profile, t, heldout_sequences) for t in (2.5, 3.0, 3.5)}
    assert all(abs(bits - target) <= 0.05 for target, bits in used.items()), used


@pytest.mark.parametrize("granularity", ["fused", "linear"])
def test_asynchronous_calibration_reads_the_earlier_input(decoders, calibration_sequences, granularity):
    decoder = decoders[granularity]
    options = CalibrateOptions(asynchronous=True, points=3)
    profile = Calibrator(decoder, calibration_sequences[:8], options).run("", granularity, {}, quiet)
    order = [g.name.rpartition(".")[2] for g in decoder.groups]
    for g, source in enumerate(profile.source):
        layer = int(decoder.groups[g].name.split(".")[2])
        fresh = order[g] in ("o", "o_proj", "down", "down_proj")
        if fresh or (layer == 0 and order[g] in ("qkv", "q_proj", "k_proj", "v_proj")):
            assert source == g
        else:
            assert source < g
            assert decoder.groups[source].weight.in_features == decoder.groups[g].weight.in_features
    policy = RateDistortionPolicy(profile, decoder, 3.3)
    recorder = Recorder(policy.begin_text(), decoder.groups)
    with torch.no_grad():
        decoder.forward(calibration_sequences[9][:40], select=recorder)
    assert len(recorder.bits().unique()) > 1


def test_stale_inputs_are_carried_over_by_the_norms(decoders, calibration_sequences):
    decoder, seen = decoders["fused"], {}
    source, ratio = stale_sources(decoder.layers)
    with torch.no_grad():
        decoder.forward(calibration_sequences[0][:5], observe=lambda g, x, y: seen.update({g.index: x}))
    first = decoder.layers[0]
    qkv, gate_up = first.qkv[0].index, first.gate_up[0].index
    assert source[gate_up] == qkv
    residual = seen[qkv] / first.input_norm  # up to its scale, which normalising removes
    renormed = decoder.rms_norm(residual, first.post_norm)
    torch.testing.assert_close(seen[qkv] * ratio[gate_up], renormed, rtol=1e-2, atol=2e-2)


def test_progress_reaches_its_ends(decoders, calibration_sequences):
    seen: dict[str, list[tuple[int, int]]] = {}

    def progress(stage, done, total):
        seen.setdefault(stage, []).append((done, total))

    options = CalibrateOptions(points=2)
    Calibrator(decoders["fused"], calibration_sequences[:2, :32], options).run("", "fused", {}, progress)
    assert seen == {"saliency": [(1, 2), (2, 2)], "gains": [(1, 2), (2, 2)], "curve": [(1, 2), (2, 2)]}
