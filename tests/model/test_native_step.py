"""A whole step in one native call is what the decoder computes operation by operation."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import ISAS, needs_library, options_of
from decode_cases import IDS, Thresholds, by_operations, step_by_step, varied
from tiny_models import ARCHITECTURES, COMMON

from dpllm.base.errors import InputError
from dpllm.decode.cpu_step import NativeStep
from dpllm.decode.step import DecoderStep
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.kernels.weight import Int8Weight
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.policies.base import PrecisionPolicy, Recorder, TextPolicy
from dpllm.policies.fixed import RandomPolicy, StaticPolicy
from dpllm.policies.make import make_policy
from dpllm.policies.rate_distortion import RateDistortionPolicy

pytestmark = needs_library

TOLERANCE = 2e-3  # of a logit: a last bit of an input can move the rounding of an activation to 16 bits


def load_exact(path, **options):
    return load_decoder(path, LoadOptions(cpu=options_of(), **options))


def natively(decoder, policy, ids, cache=None, step=None):
    """(logits [T, V], bits [T, G]) by one native call a token."""
    step = step or NativeStep.of(decoder)
    assert step is not None
    return step_by_step(decoder, step, policy, ids, cache)


def assert_same(found, expected) -> None:
    assert torch.equal(found[1], expected[1]), "widths"
    assert (found[0] - expected[0]).abs().max() < TOLERANCE
    assert (expected[0][1:] - expected[0][:-1]).abs().max() > 0.1, "the tokens must matter"


# -- every architecture -------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["fused", "linear"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(overlay, name, granularity):
    decoder = load_exact(overlay(name), granularity=granularity)
    policy = varied(decoder)
    assert_same(natively(decoder, policy, IDS), by_operations(decoder, policy, IDS))


@pytest.mark.parametrize(
    ("name", "head_bits", "kind"),
    [
        ("llama", 4, "planes"), ("llama", 16, "dense"), ("llama", 8, "int8"),
        ("qwen3", 4, "planes"), ("qwen3", 16, "dense"), ("qwen3", 8, "int8"), ("smollm", 7, "planes"),
    ],
)  # fmt: skip
def test_every_kind_of_head(overlay, name, head_bits, kind):
    """Untied (llama) and tied: there the embedding is the head, unless that has planes of its own."""
    decoder = load_exact(overlay(name, head_bits))
    kinds = {Int8Weight: "int8", torch.Tensor: "dense"}
    assert kinds.get(type(decoder.head), "planes") == kind
    assert_same(natively(decoder, varied(decoder), IDS), by_operations(decoder, varied(decoder), IDS))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["llama-biased", "qwen3"])
def test_every_instruction_set(overlay, name, isa):
    decoder = load_decoder(overlay(name), LoadOptions(cpu=options_of(isa)))
    assert decoder.backend.name == f"cpu:{isa}"
    assert_same(natively(decoder, varied(decoder), IDS), by_operations(decoder, varied(decoder), IDS))


def held(cache):
    return torch.stack(cache.k), torch.stack(cache.v)


@pytest.mark.parametrize(("dtype", "last_bit"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)], ids=str)
def test_a_cache_of_half_precision(overlay, dtype, last_bit):
    decoder = load_exact(overlay("llama"), kv_dtype=dtype)
    caches = [decoder.new_cache(len(IDS)) for _ in range(2)]
    expected = by_operations(decoder, varied(decoder), IDS, caches[0])
    found = natively(decoder, varied(decoder), IDS, caches[1])
    assert (found[0] - expected[0]).norm() < last_bit * expected[0].norm()
    assert torch.equal(found[1], expected[1])
    assert caches[1].k[0].dtype == dtype
    for one, other in zip(held(caches[0]), held(caches[1]), strict=True):
        assert (one.float() - other.float()).abs().max() < 2 * last_bit * one.float().abs().max()
        assert (one == other).double().mean() > 0.75, "rounded to the nearest"


@pytest.mark.parametrize("accuracy", ["balanced", "fast"])
def test_int8_activations_stay_close(overlay, accuracy):
    """Rounding to int8 is coarse for 64 columns, but an error of the step would be as large as the logits."""
    decoder = load_decoder(overlay("llama"), LoadOptions(cpu=options_of(accuracy=accuracy)))
    found, bits = natively(decoder, varied(decoder), IDS)
    expected, expected_bits = by_operations(decoder, varied(decoder), IDS)
    assert torch.equal(bits, expected_bits)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("accuracy", ["exact", "balanced"])
def test_threads_change_nothing(overlay, accuracy):
    results = []
    for threads in (1, 2, 3):
        cpu = options_of(accuracy=accuracy, threads=threads)
        decoder = load_decoder(overlay("llama"), LoadOptions(cpu=cpu))
        results.append(natively(decoder, varied(decoder), IDS))
    for logits, bits in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert torch.equal(bits, results[0][1])


def test_caches_are_halved_unless_exactness_is_asked_for(overlay):
    kinds = {}
    for accuracy in ("exact", "balanced", "fast"):
        decoder = load_decoder(overlay("llama"), LoadOptions(cpu=options_of(accuracy=accuracy)))
        kinds[accuracy] = decoder.new_cache(4).k[0].dtype
    assert kinds == {"exact": torch.float32, "balanced": torch.float16, "fast": torch.float16}


def test_where_there_is_no_native_step(overlay, checkpoints):
    path = overlay("llama")
    assert NativeStep.of(load_decoder(path, LoadOptions(backend="reference"))) is None
    assert NativeStep.of(load_decoder(checkpoints / "llama")) is None
    assert NativeStep.of(load_decoder(path, LoadOptions(dtype=torch.bfloat16))) is None
    assert NativeStep.of(load_decoder(path, LoadOptions(kv_dtype=torch.float64))) is None


# -- who decides --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["fused", "linear"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_thresholds(overlay, name, granularity):
    decoder = load_exact(overlay(name), granularity=granularity)
    policy = Thresholds(decoder, IDS)
    assert policy.rule.own_inputs
    found = natively(decoder, policy, IDS)
    assert_same(found, by_operations(decoder, policy, IDS))
    assert found[1].unique().tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("granularity", ["fused", "linear"])
def test_a_policy_that_is_called_back(overlay, granularity):
    decoder = load_exact(overlay("llama"), granularity=granularity)
    native, other = (RandomPolicy(3.4, len(decoder.groups), seed=5) for _ in range(2))
    found = natively(decoder, native, IDS)
    assert_same(found, by_operations(decoder, other, IDS))
    assert found[1].unique().tolist() == [3, 4]


def test_a_policy_sees_the_input_of_its_group(overlay):
    """And may keep it: it is no view of memory that the next group overwrites."""
    decoder = load_exact(overlay("llama"))

    class Watching(PrecisionPolicy, TextPolicy):
        name = "watching"

        def begin_text(self):
            return self

        def __init__(self):
            self.seen = []

        def __call__(self, group, x):
            self.seen.append((group.index, x))
            return torch.full((len(x),), 3, dtype=torch.int32)

    native, other = Watching(), Watching()
    natively(decoder, native, IDS[:4])
    by_operations(decoder, other, IDS[:4])
    assert [g for g, _ in native.seen] == [g for g, _ in other.seen] == list(range(len(decoder.groups))) * 4
    for (_, x), (_, expected) in zip(native.seen, other.seen, strict=True):
        assert x.shape == expected.shape
        assert (x - expected).abs().max() < 1e-3


@pytest.mark.parametrize("granularity", ["fused", "linear"])
@pytest.mark.parametrize("name", ["uniform", "static", "rate-distortion"])
def test_calibrated_policies(quantized, profiles, heldout_sequences, name, granularity):
    decoder, ids = load_exact(quantized, granularity=granularity), heldout_sequences[0][:40].tolist()
    target = 3.0 if name == "uniform" else 3.3
    policy = make_policy(name, target, decoder, profiles[granularity])
    found = natively(decoder, policy, ids)
    assert_same(found, by_operations(decoder, policy, ids))
    assert (len(found[1].unique()) > 1) == (name != "uniform")


def test_retargeting_between_tokens(quantized, profiles, heldout_sequences):
    decoder, ids = load_exact(quantized), heldout_sequences[0][:30].tolist()
    policy, step = RateDistortionPolicy(profiles["fused"], decoder, 2.5), NativeStep.of(decoder)
    texts = [policy.begin_text() for _ in range(2)]
    caches = [decoder.new_cache(len(ids)) for _ in range(2)]
    used = []
    for target, part in ((2.5, ids[:10]), (5.0, ids[10:20]), (2.5, ids[20:])):
        for text in texts:
            text.steer(target)
        found = natively(decoder, texts[0], part, caches[0], step)
        assert_same(found, by_operations(decoder, texts[1], part, caches[1]))
        used.append(found[1].double().mean().item())
    assert used[1] > max(used[0], used[2]) + 1


def test_policies_take_turns(overlay):
    """One step, another policy for every token, each of another kind."""
    decoder = load_exact(overlay("llama"))
    step, caches = NativeStep.of(decoder), [decoder.new_cache(len(IDS)) for _ in range(2)]
    rule = Thresholds(decoder, IDS)
    for i, token in enumerate(IDS):
        makers = (
            lambda i=i: varied(decoder, i),
            lambda: rule,
            lambda: RandomPolicy(3.5, len(decoder.groups)),
        )
        make = makers[i % 3]
        found = natively(decoder, make(), [token], caches[0], step)
        expected = by_operations(decoder, make(), [token], caches[1])
        assert torch.equal(found[1], expected[1])
        assert (found[0] - expected[0]).abs().max() < TOLERANCE


# -- what goes wrong ----------------------------------------------------------------------------------------


class Stubborn(PrecisionPolicy, TextPolicy):
    """Reads 3 planes, but does something else at one group."""

    name = "stubborn"

    def __init__(self, at: int, then):
        self.at, self.then = at, then

    def begin_text(self):
        return self

    def __call__(self, group, x):
        bits = self.then() if group.index == self.at else 3
        return torch.full((len(x),), bits, dtype=torch.int32)


def recovers(decoder, step, cache, before) -> None:
    """The failed token left no trace: the next ones are what they would have been."""
    assert cache.length == len(before)
    found = natively(decoder, varied(decoder), IDS[len(before) :], cache, step)
    expected = by_operations(decoder, varied(decoder), IDS)
    assert (found[0] - expected[0][len(before) :]).abs().max() < TOLERANCE


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 2, 11])
def test_what_a_policy_raises_surfaces(overlay, at, error):
    decoder = load_exact(overlay("llama"))
    step, cache = NativeStep.of(decoder), decoder.new_cache(len(IDS))
    natively(decoder, varied(decoder), IDS[:5], cache, step)

    def fail():
        raise error("no width for this one")

    for _ in range(2):
        with pytest.raises(error, match="no width for this one"):
            step(IDS[5], cache, Stubborn(at, fail))
    recovers(decoder, step, cache, IDS[:5])


@pytest.mark.parametrize("bits", [0, 1, 7, -1, 1000])
def test_widths_that_are_not_resident(overlay, bits):
    """Refused alike, whoever computes and however the width was chosen."""
    decoder = load_exact(overlay("llama"))
    step, cache = NativeStep.of(decoder), decoder.new_cache(len(IDS))
    natively(decoder, varied(decoder), IDS[:5], cache, step)
    widths = [3] * len(decoder.groups)
    widths[7] = bits
    for policy in (Stubborn(7, lambda: bits), StaticPolicy(widths)):
        for one in (step, DecoderStep(decoder)):
            with pytest.raises(ValueError, match=f"{bits}.* not resident"):
                one(IDS[5], cache, policy)
    recovers(decoder, step, cache, IDS[:5])


def test_a_refused_policy_leaves_the_text_before_it_steerable(quantized, profiles, heldout_sequences):
    decoder, ids = load_exact(quantized), heldout_sequences[0][:20].tolist()
    policy, step = RateDistortionPolicy(profiles["fused"], decoder, 2.5), NativeStep.of(decoder)
    own, other = policy.begin_text(), policy.begin_text()
    caches = [decoder.new_cache(len(ids)) for _ in range(2)]
    before = natively(decoder, own, ids[:10], caches[0], step)
    by_operations(decoder, other, ids[:10], caches[1])
    with pytest.raises(ValueError, match="not resident"):
        step(ids[10], caches[0], StaticPolicy([1000] * len(decoder.groups)))
    for text in (own, other):
        text.steer(5.0)
    after = natively(decoder, own, ids[10:], caches[0], step)
    assert_same(after, by_operations(decoder, other, ids[10:], caches[1]))
    assert after[1].double().mean() > before[1].double().mean() + 1


def test_more_thresholds_than_planes(overlay):
    decoder = load_exact(overlay("llama"), resident_bits=4)
    policy = Thresholds(load_exact(overlay("llama")), IDS)
    with pytest.raises(ValueError, match="6 are not resident"):
        NativeStep.of(decoder)(IDS[0], decoder.new_cache(4), policy)


def test_a_full_cache(overlay):
    decoder = load_exact(overlay("llama"))
    step, cache = NativeStep.of(decoder), decoder.new_cache(3)
    natively(decoder, varied(decoder), IDS[:3], cache, step)
    before = held(cache)
    with pytest.raises(ValueError, match="holds 3 tokens; 4"):
        step(IDS[3], cache, varied(decoder))
    assert cache.length == 3
    assert all(map(torch.equal, held(cache), before))


@pytest.mark.parametrize("token", [-1, COMMON["vocab_size"], 2**31 - 1])
def test_tokens_that_do_not_exist(overlay, token):
    decoder = load_exact(overlay("llama"))
    with pytest.raises(IndexError, match="token"):
        NativeStep.of(decoder)(token, decoder.new_cache(4), varied(decoder))


def test_rewinding(overlay):
    decoder = load_exact(overlay("mistral-window"))
    step, cache = NativeStep.of(decoder), decoder.new_cache(len(IDS))
    first = natively(decoder, varied(decoder), IDS, cache, step)
    cache.rewind(6)
    again = natively(decoder, varied(decoder), IDS[6:], cache, step)
    assert torch.equal(again[0], first[0][6:])


def test_a_prompt_by_operations_then_native_steps(overlay):
    decoder = load_exact(overlay("qwen2-window"))
    caches = [decoder.new_cache(len(IDS)) for _ in range(2)]
    with torch.no_grad():
        for c in caches:
            decoder.forward(torch.tensor(IDS[:12]), c, Recorder(varied(decoder), decoder.groups))
    found = natively(decoder, varied(decoder), IDS[12:], caches[0])
    assert_same(found, by_operations(decoder, varied(decoder), IDS[12:], caches[1]))


def test_more_threads_than_cores_are_refused():
    with pytest.raises(InputError, match="threads are not possible"):
        LoadOptions(cpu=CpuOptions(threads=4096))
