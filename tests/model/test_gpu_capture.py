"""Capturing the GPU's decode step, with a graph that runs the operations again, for there is no GPU."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from decode_cases import copied
from gpu_cases import assert_same, decode_text, load, step_of

from dpllm.decode.gpu_step import GpuStep
from dpllm.decode.step import DecoderStep
from dpllm.policies.make import make_policy
from dpllm.policies.rate_distortion import RateDistortionPolicy


class Replayed:
    """Stands in for a CUDA graph, for there is no GPU: replaying it runs what was captured."""

    made = 0

    def __init__(self):
        Replayed.made += 1

    def replay(self):
        self.run()


@pytest.fixture
def capturing(monkeypatch):
    """A factory of steps that go through warm-up and capture."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    monkeypatch.setattr(torch.cuda, "graph", lambda g, stream: nullcontext())
    Replayed.made = 0

    def make(decoder) -> GpuStep:
        step = step_of(decoder)
        step._captures = True
        capture = step._captured

        def captured(sites):
            graph = capture(sites)
            graph.run = lambda: step._run(sites)
            return graph

        step._captured = captured
        return step

    return make


def test_capturing_under_way_changes_nothing(capturing, quantized, profiles, heldout_sequences):
    """A text whose policy is exchanged for one of another kind, and back, on a cache that has grown since it was
    placed; each kind is captured once, whatever its target."""
    decoder, ids = load(quantized), heldout_sequences[1][:24].tolist()
    results = []
    for step in (capturing(decoder), DecoderStep(decoder)):
        policies = [
            make_policy(name, target, decoder, profiles["fused"])
            for name, target in (
                ("rate-distortion", 2.75),
                ("dp-llm", 3.25),
                ("static", 3.3),
                ("rate-distortion", 4.5),
            )
        ]
        texts = [policy.begin_text() for policy in policies]
        cache, found, stepped = decoder.new_ragged_cache(4), [], None
        for t, token in enumerate(ids):
            own = texts[t // 6]
            if t % 6:
                step.learn(own, stepped, token)
            stepped = step(token, cache, own)
            found.append(copied(stepped))
        logits, bits = zip(*found, strict=True)
        results.append((torch.cat(logits), torch.cat(bits)))
    assert_same(*results)
    assert Replayed.made == 3


def test_prepared_before_the_first_token(capturing, quantized, profiles, heldout_sequences):
    decoder, ids, lines = load(quantized), heldout_sequences[1][:6].tolist(), []
    step, policy = capturing(decoder), RateDistortionPolicy(profiles["fused"], decoder, 3.0)
    step.prepare(policy.begin_text(), lines.append)
    assert lines == ["capturing the decode step (weighted) ...", "captured: one launch a token"]
    found = decode_text(decoder, policy.begin_text(), ids, step)
    assert_same(found, decode_text(decoder, policy.begin_text(), ids, None))
    assert Replayed.made == 1


def test_a_capture_that_fails_is_told_once(
    capturing, quantized, profiles, heldout_sequences, caplog, monkeypatch
):
    decoder, ids = load(quantized), heldout_sequences[1][:6].tolist()
    step, policy = capturing(decoder), RateDistortionPolicy(profiles["fused"], decoder, 3.0)

    def refuse(graph, stream):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with caplog.at_level(logging.WARNING):
        found = decode_text(decoder, policy.begin_text(), ids, step)
    assert_same(found, decode_text(decoder, policy.begin_text(), ids, None))
    (message,) = [r.message for r in caplog.records]
    assert "could not be captured (operation not permitted when stream is capturing)" in message
