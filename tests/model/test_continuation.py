"""The loop of a text lets a policy learn from each step before the target of the next one moves."""

from __future__ import annotations

import itertools

import pytest
from cpu_cases import needs_library, options_of
from gpu_cases import step_of

from dpllm.decode.continuation import Continuation
from dpllm.decode.cpu_step import NativeStep
from dpllm.decode.gpu_step import GpuStep
from dpllm.decode.sampling import Sampler, SamplingOptions
from dpllm.decode.speculation.continuation import SpeculativeContinuation
from dpllm.decode.speculation.draft_length import DraftLengths
from dpllm.decode.speculation.drafts import SelfDraft
from dpllm.decode.step import DecoderStep
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.policies.rate_distortion import RateDistortionPolicy

TARGETS = (3.0, 5.0, 2.5, 4.0)  # effective bits of four tokens in turn
TOKENS = 40


def step_by(kind: str, path):
    """The step that decodes: torch's operations, the native call, or the GPU's step by its definitions."""
    if kind == "native":
        return NativeStep.of(load_decoder(path, LoadOptions(cpu=options_of())))
    decoder = load_decoder(path, LoadOptions(backend="reference"))
    return DecoderStep(decoder) if kind == "torch" else step_of(decoder)


def continuation_of(step, cache, drafts: bool) -> Continuation:
    decoder, sampler = step.decoder, Sampler(SamplingOptions(temperature=0.0))
    if not drafts:
        return Continuation(decoder, step, cache, sampler)
    draft = SelfDraft(decoder, 2, NativeStep.of(decoder) or DecoderStep(decoder))
    return SpeculativeContinuation(
        decoder, step, cache, sampler, drafts=[draft], lengths=DraftLengths([draft.longest]),
        clock=itertools.count().__next__,
    )  # fmt: skip


@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])
@pytest.mark.parametrize("kind", ["torch", pytest.param("native", marks=needs_library), "gpu"])
def test_a_miss_counts_against_the_target_that_was_missed(
    quantized, profiles, heldout_sequences, kind, drafts
):
    """The correction is the sum of all misses, each against the target that its own token had."""
    step = step_by(kind, quantized)
    text = RateDistortionPolicy(profiles["fused"], step.decoder, TARGETS[0]).begin_text()
    targets = itertools.cycle(TARGETS)
    aims: list[float] = []

    def choose(_):
        aims.append(next(targets))
        text.steer(aims[-1])
        return text

    prompt, cache = heldout_sequences[0][:20].tolist(), step.decoder.new_cache(20 + TOKENS)
    running = continuation_of(step, cache, drafts)
    found = list(running.tokens(prompt, choose, TOKENS))
    step.learn(text, found[-1].stepped, found[-1].token)
    if drafts:
        assert running.tally.accepted > 0, "else no pass has decoded several tokens"
    if isinstance(step, GpuStep):
        step.store()
    misses = [aim - d.stepped.effective_bits for aim, d in zip(aims, found[1:], strict=True)]
    control = text.bits_correction
    assert control.value == pytest.approx(control.rate * sum(misses), abs=1e-4)
    assert aims[0] != aims[-1], "else misses against the following target would have the same sum"
