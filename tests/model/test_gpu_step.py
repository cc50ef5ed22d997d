"""The GPU's decode step, its operations run one by one on the CPU, is what the decoder computes."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from decode_cases import IDS, Thresholds, by_operations, copied, step_by_step, varied
from gpu_cases import TOLERANCE, assert_same, decode_text, load, step_of
from tiny_models import ARCHITECTURES

from dpllm.calib.runtime.threshold_rule import stale_sources
from dpllm.decode import gpu_step
from dpllm.decode.choose_step import StepMaker
from dpllm.decode.gpu_step import GpuStep
from dpllm.decode.options import GenerateOptions
from dpllm.decode.sampling import SamplingOptions, drawn
from dpllm.decode.step import DecoderStep
from dpllm.evaluation.evaluate import score
from dpllm.kernels.gpu_step import definition as step_reference
from dpllm.model.loading import LoadOptions
from dpllm.opening import open_engine as engine_of
from dpllm.policies.fixed import RandomPolicy, StaticPolicy
from dpllm.policies.make import make_policy
from dpllm.policies.rate_distortion import RateDistortionPolicy
from dpllm.policies.token_limit import TokenLimit, WidthCosts


def steps(decoder, policy, ids, cache=None, step=None):
    """(logits [T, V], bits [T, G]) a token at a time."""
    return step_by_step(decoder, step or step_of(decoder), policy, ids, cache)


def rule_of(decoder) -> Thresholds:
    """Thresholds that no signal meets exactly: a last bit is not to decide."""
    rule = Thresholds(decoder, IDS)
    rule.thresholds = rule.thresholds * 1.0003
    return rule


@pytest.mark.parametrize("granularity", ["fused", "linear"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(overlay, name, granularity):
    decoder = load(overlay(name), granularity=granularity)
    for policy in (varied(decoder), rule_of(decoder)):
        found = steps(decoder, policy, IDS)
        assert_same(found, by_operations(decoder, policy, IDS))
        assert found[1].unique().tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["llama-biased", "qwen3"])
def test_a_model_that_was_never_quantised(checkpoints, name):
    decoder, cache = load(checkpoints / name), None
    found = steps(decoder, None, IDS, cache)[0]
    with torch.no_grad():
        assert (found - decoder.forward(torch.tensor(IDS))).abs().max() < TOLERANCE


@pytest.mark.parametrize("head_bits", [4, 16])
def test_kinds_of_head(overlay, head_bits):
    decoder = load(overlay("llama", head_bits))
    assert_same(steps(decoder, varied(decoder), IDS), by_operations(decoder, varied(decoder), IDS))


def pruned(decoder, ids):
    """A ragged cache that holds these tokens, its heads keeping unlike numbers of pairs."""
    cache, c = decoder.new_ragged_cache(4), decoder.config
    with torch.no_grad():
        decoder.forward(torch.tensor(ids), cache)
    keep = (
        torch.rand(c.num_layers, c.num_kv_heads, len(ids), generator=torch.Generator().manual_seed(0)) < 0.5
    )
    keep[1, 0] = False  # a head that keeps nothing
    cache.prune(keep, c.windows, room=3)  # room for three: the cache moves under the step
    return cache


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window"])
def test_a_pruned_cache(overlay, name):
    decoder = load(overlay(name))
    policy = rule_of(decoder)
    found = steps(decoder, policy, IDS[10:], pruned(decoder, IDS[:10]))
    expected = by_operations(decoder, policy, IDS[10:], pruned(decoder, IDS[:10]))
    assert_same(found, expected)


def test_caches_take_turns_and_rewind(overlay):
    decoder = load(overlay("llama"))
    policy, step = varied(decoder), step_of(decoder)
    caches = decoder.new_cache(len(IDS)), pruned(decoder, IDS[:10])
    other = decoder.new_cache(len(IDS)), pruned(decoder, IDS[:10])
    for at in range(5):
        for c, o in zip(caches, other, strict=True):
            found = steps(decoder, policy, [IDS[at]], c, step)[0]
            assert (found - by_operations(decoder, policy, [IDS[at]], o)[0]).abs().max() < TOLERANCE
    caches[0].rewind(2)
    again = steps(decoder, policy, IDS[2:8], caches[0], step)[0]
    assert (again - by_operations(decoder, policy, IDS[:8])[0][2:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("granularity", ["fused", "linear"])
@pytest.mark.parametrize("name", ["uniform", "static", "dp-llm", "rate-distortion"])
def test_calibrated_policies(quantized, profiles, heldout_sequences, name, granularity):
    decoder, ids = load(quantized, granularity=granularity), heldout_sequences[0][:30].tolist()
    policy = make_policy(name, 3.0 if name == "uniform" else 3.25, decoder, profiles[granularity])
    found = steps(decoder, policy, ids)
    assert_same(found, by_operations(decoder, policy, ids))
    assert (len(found[1].unique()) > 1) == (name != "uniform")


# -- what a policy learns from finished steps ---------------------------------------------------------------


def test_a_text_with_context_and_correction(quantized, profiles, heldout_sequences):
    """Including a change of target under way, and an old text's end and a new one's beginning."""
    decoder = load(quantized)
    policy, step = RateDistortionPolicy(profiles["fused"], decoder, 2.6), step_of(decoder)

    def change(t, own):
        if t == 15:
            own.steer(4.5)

    for ids in (heldout_sequences[i][:30].tolist() for i in range(2)):
        found = decode_text(decoder, policy.begin_text(), ids, step, change)
        assert_same(found, decode_text(decoder, policy.begin_text(), ids, None, change))
        assert found[1][16:].double().mean() > found[1][:15].double().mean() + 0.7


def test_what_a_token_may_cost(quantized, profiles, heldout_sequences):
    """The step keeps the limits of tokens as the policy does: they come, change with the target, and go."""
    decoder, ids = load(quantized), heldout_sequences[0][:40].tolist()
    width_costs = WidthCosts.in_bytes(decoder.groups)
    most = {5: 1.1, 15: 0.7, 20: 0.0, 30: None}  # shares of what the target reads beyond the seed
    target = {5: 3.5, 15: 4.5, 20: 4.5, 30: 3.0}

    def allowed(t: int) -> TokenLimit | None:
        wide = sum(g.weights for g in decoder.groups) // 8 * (target[t] - decoder.groups[0].seed_bits)
        return None if most[t] is None else TokenLimit(width_costs.seed + round(most[t] * wide), width_costs)

    def change(t, own):
        if t in most:
            own.steer(target[t], allowed(t))

    policy, results = RateDistortionPolicy(profiles["fused"], decoder, 3.0), []
    for step in (step_of(decoder), None):
        results.append(decode_text(decoder, policy.begin_text(), ids, step, change))
    assert_same(*results)
    limit, over = None, []
    for t, bits in enumerate(results[0][1].tolist()):
        limit = allowed(t) if t in most else limit
        assert limit is None or width_costs.of(bits) <= max(limit.most, width_costs.seed)
        over.append(width_costs.of(bits) > width_costs.seed)
    assert all(over[:20]) and not any(over[20:30]) and all(over[30:]), "and the rest is used"


def test_a_target_that_changes_at_every_token(quantized, profiles, heldout_sequences):
    """What a token missed its own target by is never forgotten, nor held against the next one's."""
    decoder, ids = load(quantized), heldout_sequences[1][:40].tolist()
    policy, results = RateDistortionPolicy(profiles["fused"], decoder, 3.0), []
    for step in (step_of(decoder), None):
        own = policy.begin_text()
        results.append(
            decode_text(decoder, own, ids, step, lambda t, own: own.steer(2.5 + 0.37 * t % 2.0, None))
        )
        if step is not None:
            step.store()
        results[-1] += (float(own.correction),)
    assert_same(results[0][:2], results[1][:2])
    assert results[0][2] == pytest.approx(results[1][2], abs=1e-5) and abs(results[0][2]) > 0.05


def test_asynchronous_signals_and_what_a_token_may_cost(quantized, profiles, heldout_sequences):
    decoder, profile = load(quantized), profiles["fused"]
    asynchronous = replace(profile, source=np.asarray(stale_sources(decoder.layers)[0], np.int64))
    policy = RateDistortionPolicy(asynchronous, decoder, 3.5)
    width_costs, ids = WidthCosts.in_bytes(decoder.groups), heldout_sequences[0][:30].tolist()
    most = width_costs.seed + sum(g.bytes_at[1] - g.bytes_at[0] for g in decoder.groups)
    free, held = (
        decode_text(
            decoder, policy.begin_text(), ids, step_of(decoder),
            lambda t, own, limit=limit: own.steer(3.5, limit),
        )[1]
        for limit in (None, TokenLimit(most, width_costs))
    )  # fmt: skip
    spent = [width_costs.of(b) for b in held.tolist()]
    assert max(width_costs.of(b) for b in free.tolist()) > most >= max(spent)
    assert np.median(spent) > most - 0.1 * (most - width_costs.seed)


def test_who_decides_may_change_between_any_two_tokens(quantized, profiles, heldout_sequences):
    """A text begun by one step goes on by operations, or by another text's step, as if nothing had happened."""
    decoder, ids = load(quantized), heldout_sequences[2][:24].tolist()
    policy, step = RateDistortionPolicy(profiles["fused"], decoder, 3.25), step_of(decoder)
    expected = decode_text(decoder, policy.begin_text(), ids, None)
    own, interloper, cache = policy.begin_text(), policy.begin_text(), decoder.new_cache(len(ids))
    by_torch, found, stepped, last = DecoderStep(decoder), [], None, step
    for t, token in enumerate(ids):
        if stepped is not None:
            last.learn(own, stepped, token)
        if t % 5 == 4:
            step(token, decoder.new_cache(2), interloper)
        if t % 7 == 4:
            step.store()
        last = by_torch if t % 7 == 4 else step
        stepped = last(token, cache, own)
        found.append(copied(stepped))
    logits, bits = zip(*found, strict=True)
    assert_same((torch.cat(logits), torch.cat(bits)), expected)


def test_nobody_yet_and_nothing_to_choose(overlay):
    """None is a rule as well: all that is resident, from the first step on."""
    decoder = load(overlay("llama"))
    found = steps(decoder, None, IDS[:3])
    widest = StaticPolicy([g.resident_bits for g in decoder.groups])
    assert found[1] is None, "nobody chose"
    assert (found[0] - by_operations(decoder, widest, IDS[:3])[0]).abs().max() < TOLERANCE


def test_an_interrupted_beginning_is_begun_anew(quantized, profiles, heldout_sequences, monkeypatch):
    decoder, ids = load(quantized), heldout_sequences[0][:12].tolist()
    policy, step = RateDistortionPolicy(profiles["fused"], decoder, 3.5), step_of(decoder)

    def interrupted(tensors):
        if len(step._policy.sites) > 1 and tensors[0] is policy.rule.diagonals[-1]:
            raise KeyboardInterrupt
        return stack(tensors)

    stack = torch.stack
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "stack", interrupted)
        step(ids[0], decoder.new_cache(2), policy.begin_text())
    found = decode_text(decoder, policy.begin_text(), ids, step)
    assert_same(found, decode_text(decoder, policy.begin_text(), ids, None))


def test_retargeting_rewrites_memory_only(quantized, profiles, heldout_sequences):
    decoder, ids = load(quantized), heldout_sequences[0][:20].tolist()
    text, step = RateDistortionPolicy(profiles["fused"], decoder, 2.5).begin_text(), step_of(decoder)
    cache, used = decoder.new_cache(len(ids)), []
    for target, part in ((2.5, ids[:10]), (5.0, ids[10:])):
        text.steer(target)
        used.append(steps(decoder, text, part, cache, step)[1].double().mean().item())
        assert len(step._policy.sites) == 2, "of nothing chosen, and of this"
    assert used[1] > used[0] + 1


# -- the rest -----------------------------------------------------------------------------------------------


def test_a_policy_that_decides_on_the_host_is_told_once(overlay, caplog):
    decoder = load(overlay("llama"))
    with caplog.at_level(logging.WARNING):
        found = steps(decoder, RandomPolicy(3.4, len(decoder.groups), seed=5), IDS)
    assert_same(found, by_operations(decoder, RandomPolicy(3.4, len(decoder.groups), seed=5), IDS))
    assert [r.message for r in caplog.records] == [
        "policy 'random' decides on the host: decoding operation by operation"
    ]


def test_a_reason_not_to_capture_is_told_once(overlay, caplog):
    decoder = load(overlay("llama"))
    step = GpuStep(decoder, step_reference, reason="no reason at all")
    with caplog.at_level(logging.WARNING):
        steps(decoder, varied(decoder), IDS[:3], step=step)
    assert [r.message for r in caplog.records] == ["decoding operation by operation: no reason at all"]


def test_what_is_likeliest_and_what_was_read(overlay):
    decoder = load(overlay("llama"))
    step, cache = step_of(decoder), decoder.new_cache(4)
    for policy in (varied(decoder), RandomPolicy(3.5, len(decoder.groups))):
        text = policy.begin_text()
        logits = step.launch(IDS[0], cache, text)
        found = step.finished(text)
        assert found.greedy == int(logits[0].argmax())
        widths = [g.bytes_at[b - 2] for g, b in zip(decoder.groups, found.bits[0].tolist(), strict=True)]
        assert found.weight_bytes == sum(widths) + decoder.head_bytes()


@pytest.mark.parametrize("token", [-1, 96])
def test_tokens_that_do_not_exist(overlay, token):
    decoder = load(overlay("llama"))
    with pytest.raises(IndexError, match="token"):
        step_of(decoder)(token, decoder.new_cache(4), varied(decoder))


def test_a_full_cache_and_widths_that_are_not_there(overlay):
    decoder = load(overlay("llama"))
    step, cache = step_of(decoder), decoder.new_cache(3)
    steps(decoder, varied(decoder), IDS[:3], cache, step)
    with pytest.raises(ValueError, match="holds 3 tokens; 4"):
        step(IDS[3], cache, varied(decoder))
    assert cache.length == 3
    few = load(overlay("llama"), resident_bits=4)
    with pytest.raises(ValueError, match="6 are not resident"):
        step_of(few)(IDS[0], few.new_cache(4), Thresholds(decoder, IDS))


def test_no_gpu_no_step(overlay, checkpoints):
    assert GpuStep.of(load(overlay("llama"))) is None
    assert isinstance(StepMaker(load(checkpoints / "llama")).new(), DecoderStep)


def test_a_gpu_on_which_nothing_of_ours_runs_is_left_to_torch(monkeypatch, caplog):
    monkeypatch.setattr(gpu_step, "lacking_for_triton", lambda device: "a first product fails (no gcc)")
    with caplog.at_level(logging.WARNING):
        assert GpuStep.of(SimpleNamespace(device=torch.device("cuda"))) is None
    assert [r.message for r in caplog.records] == [
        "decoding by torch's operations: a first product fails (no gcc)"
    ]


def test_scoring_does_without(quantized, profiles, heldout_sequences):
    decoder = load(quantized)
    policy = RateDistortionPolicy(profiles["fused"], decoder, 3.0)
    assert score(decoder, policy, [heldout_sequences[0][:12].tolist()])[0].tokens == 11


def test_tokens_drawn_on_the_device():
    """Every token over an even grid of numbers: the shares are those of the distribution that top-p leaves."""
    logits = torch.tensor([0.3, 2.0, -1.0, 1.2, -0.4, 1.9])
    grid = (torch.arange(4000) + 0.5) / 4000
    for temperature, top_p in ((1.0, 1.0), (0.6, 0.8), (1.5, 1e-9)):
        options = SamplingOptions(temperature=temperature, top_p=top_p)
        found = torch.cat([drawn(logits, options, float(u)) for u in grid])
        p = (logits.double() / temperature).softmax(0)
        ranked, order = p.sort(descending=True)
        ranked[ranked.cumsum(0) - ranked >= top_p] = 0
        expected = torch.zeros(6, dtype=torch.float64).scatter_(0, order, ranked / ranked.sum())
        assert (found.bincount(minlength=6) / 4000 - expected).abs().max() < 1e-3
    assert 0 <= int(drawn(logits, SamplingOptions(temperature=1.0), 1 - 2**-53)) < 6


def test_the_engine_decodes_by_it(tiny_overlay):
    """The same text and widths as without; greedy tokens come from the step itself."""
    texts = []
    for made in (True, False):
        engine = engine_of(tiny_overlay, target_bits=3.25, options=LoadOptions(backend="reference"))
        if made:
            engine._steps.gpu = step_of(engine.decoder)
        steps_ = list(engine.generate_with("def main():", GenerateOptions(max_new_tokens=12)))
        drawn_ = list(
            engine.generate_with("def main():", GenerateOptions(max_new_tokens=6, temperature=1.0, seed=3))
        )
        texts.append([(s.token, tuple(s.bits), s.effective_bits, s.kv_bytes) for s in steps_ + drawn_])
    assert texts[0] == texts[1]
    assert len({bits for _, bits, _, _ in texts[0]}) > 2
