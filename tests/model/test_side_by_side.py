"""Side by side is one after the other: policies that learn from finished steps, evaluated and generated."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dpllm.calib.dequantised import dequantised_view
from dpllm.decode.options import GenerateOptions
from dpllm.evaluation.evaluate import evaluate, score
from dpllm.evaluation.side_by_side import steps
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.opening import open_engine
from dpllm.policies.base import PrecisionPolicy, Recorder, TextPolicy
from dpllm.policies.make import make_policy
from dpllm.policies.rate_distortion import RateDistortionPolicy


@pytest.fixture(scope="module")
def decoder(quantized):
    return load_decoder(quantized, LoadOptions(cpu=CpuOptions(accuracy="exact")))


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", ["rate-distortion", "oracle-rate-distortion"])
def test_side_by_side_equals_one_by_one(decoder, profiles, heldout_sequences, name, corrected):
    documents = [heldout_sequences[0][:30], heldout_sequences[1][:17], heldout_sequences[2][:24]]
    cls = type(make_policy(name, 3.25, decoder, profiles["fused"]))
    bits = {i: [] for i in range(3)}
    nll = dict.fromkeys(range(3), 0.0)
    with torch.no_grad():
        policy = cls(profiles["fused"], decoder, 3.25, corrected)
        for numbers, logits, after, recorder in steps(decoder, policy, documents, rows=2):
            for row, i in enumerate(numbers):
                bits[i].append(recorder.bits()[row])
                nll[i] -= logits[row].log_softmax(0)[after[row]].item()
        for i, ids in enumerate(documents):
            text = cls(profiles["fused"], decoder, 3.25, corrected).begin_text()
            cache = decoder.new_cache(len(ids))
            alone = 0.0
            for t in range(len(ids) - 1):
                recorder = Recorder(text, decoder.groups)
                logits = decoder.forward(ids[t : t + 1], cache, recorder)
                assert torch.equal(recorder.bits()[0], bits[i][t]), (i, t)
                alone -= logits[0].log_softmax(0)[ids[t + 1]].item()
                text.learn(logits, ids[t + 1 : t + 2], recorder.effective_bits())
            assert nll[i] == pytest.approx(alone, abs=1e-3)
    assert len(torch.stack(bits[0]).unique()) > 1


def test_windows_of_attention_are_kept(tmp_path, calibration_documents):
    from tiny_models import build_model

    from dpllm.model.decoder import Decoder

    build_model("mistral-window").save_pretrained(tmp_path / "m")
    plain: Decoder = load_decoder(tmp_path / "m")
    ids = torch.randint(3, 90, (30,), generator=torch.Generator().manual_seed(0))

    class Nothing(PrecisionPolicy, TextPolicy):
        name = "nothing"

        def begin_text(self):
            return self

        def __call__(self, group, x):
            raise AssertionError("a dense group is not asked")

    with torch.no_grad():
        rows = torch.cat([logits for _, logits, _, _ in steps(plain, Nothing(), [ids])])
        torch.testing.assert_close(rows, plain.forward(ids[:-1]), rtol=1e-3, atol=1e-3)


def test_the_dense_decoder_computes_the_same(decoder, profiles, heldout_sequences):
    policy = make_policy("dp-llm", 3.25, decoder, profiles["fused"]).begin_text()
    ids = heldout_sequences[0][:50]
    backend = decoder.backend
    view = dequantised_view(decoder)
    with torch.no_grad():
        expected, found = decoder.forward(ids, select=policy), view.forward(ids, select=policy)
    assert view.backend is not backend and not view.recompute
    assert decoder.backend is backend and decoder.recompute, "the decoder itself does not change"
    assert dequantised_view(decoder, limit=1000) is decoder, "the matrices do not fit"
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # the kernels' activations have 16 bits


@pytest.mark.parametrize("target", [2.5, 3.25, 4.0, 4.75])
def test_corrected_bits_are_on_target(decoder, profiles, heldout_sequences, target):
    documents = [ids[:100].tolist() for ids in heldout_sequences[:24]]
    result = evaluate(
        decoder, make_policy("rate-distortion", target, decoder, profiles["fused"]), target, documents
    )
    assert abs(result.effective_bits - target) <= 0.02
    assert result.tokens == 24 * 99 and math.isfinite(result.perplexity)


def test_another_domain_is_corrected(decoder, profiles):
    """Random tokens are nothing like the calibration text."""
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(3, 380, (300,), generator=generator).tolist() for _ in range(4)]
    used = {}
    for corrected in (False, True):
        policy = RateDistortionPolicy(profiles["fused"], decoder, 3.25, corrected=corrected)
        used[corrected] = evaluate(decoder, policy, 3.25, documents).effective_bits
    assert abs(used[True] - 3.25) <= 0.03 < abs(used[False] - 3.25), used


def test_free_running_generation_is_on_target(tiny_overlay):
    engine = open_engine(tiny_overlay, target_bits=3.25)
    used = []
    for seed in range(3):
        options = GenerateOptions(max_new_tokens=160, temperature=1.0, seed=seed)
        used += [s.effective_bits for s in list(engine.generate_with("import os", options))[1:]]
    assert abs(np.mean(used) - 3.25) <= 0.05


def test_texts_share_a_policy_and_no_state(decoder, profiles, heldout_sequences):
    policy = RateDistortionPolicy(profiles["fused"], decoder, 2.5)
    text, other = policy.begin_text(), policy.begin_text()
    text.learn(torch.randn(1, 384), torch.tensor([3]), read_bits=5.0)
    text.steer(4.0)
    assert text.correction < 0 and text.previous is not None
    for fresh in (other, policy.begin_text()):
        assert fresh.correction == 0.0 and fresh.previous is None
        assert fresh.bits_correction.target_bits == 2.5
        assert not torch.equal(fresh.thresholds, text.thresholds)


def test_the_native_evaluation_is_step_by_step_decoding(decoder, profiles, heldout_sequences):
    documents = [ids[:60] for ids in heldout_sequences[:3]]
    policy = make_policy("rate-distortion", 3.25, decoder, profiles["fused"])
    found = score(decoder, policy, [d.tolist() for d in documents])
    sums = torch.zeros(3, 2, dtype=torch.float64)
    with torch.no_grad():
        for numbers, logits, after, recorder in steps(decoder, policy, documents):
            nll = torch.nn.functional.cross_entropy(logits, after, reduction="none").double()
            sums[numbers] += torch.stack([nll, recorder.effective_bits()], dim=1)
    for (nll, bits), one in zip(sums.tolist(), found, strict=True):
        assert one.tokens == 59
        assert one.nll == pytest.approx(nll, rel=1e-3) and one.bits == pytest.approx(bits, rel=1e-3)
