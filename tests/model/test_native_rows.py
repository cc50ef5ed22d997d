"""Several tokens in one native step are, bit for bit, as many steps of one token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cpu_cases import ISAS, each_accuracy, needs_library, options_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, COMMON

from dpllm.decode.cpu_step import NativeStep
from dpllm.kernels.cpu.step import MAX_ROWS
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.model.random_models import random_decoder, shape
from dpllm.policies.fixed import RandomPolicy, StaticPolicy
from dpllm.policies.rate_distortion import RateDistortionPolicy

pytestmark = needs_library

IDS = torch.randint(0, COMMON["vocab_size"], (24,), generator=torch.Generator().manual_seed(7)).tolist()
# Sizes around vectors, words and blocks; chunks of rows that no vector divides; one and several heads to a KV head.
SHAPES = {
    "odd": {"hidden_size": 160, "intermediate_size": 1003, "num_heads": 6, "num_kv_heads": 2, "head_dim": 48},
    "narrow": {"hidden_size": 100, "intermediate_size": 77, "num_heads": 5, "num_kv_heads": 1, "head_dim": 20},
    "pairs": {"hidden_size": 256, "intermediate_size": 256, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64},
}  # fmt: skip


def shaped(name: str, isa=None, accuracy="exact", threads=1, **options):
    config = replace(
        shape("tiny"), num_layers=2, windows=(None, 5), uses_rope=(True, False), vocab_size=203,
        inv_freq=torch.ones(SHAPES[name]["head_dim"] // 2), **SHAPES[name],
    )  # fmt: skip
    cpu = options_of(isa, accuracy, threads)
    return random_decoder(config, 8, LoadOptions(cpu=cpu, **options))


def fixed(decoder, bits: int) -> StaticPolicy:
    return StaticPolicy([bits] * len(decoder.groups))


def varied(decoder, turn: int = 0) -> StaticPolicy:
    """Another width at every group."""
    return StaticPolicy([g.seed_bits + (3 * g.index + turn) % (g.resident_bits - 1) for g in decoder.groups])


def read(decoder, policy, sizes, cache=None, ids=IDS, corrections=None):
    """(logits, bits, keys and values held) of the ids, taken so many at a time."""
    step, cache = NativeStep.of(decoder), cache or decoder.new_cache(len(ids))
    text, found, at = policy.begin_text(), [], 0
    for n in sizes:
        own = [0.0] * n if corrections is None else corrections[at : at + n]
        found.append([t.clone() for t in step.several(ids[at : at + n], cache, text, own)[:2]])
        at += n
    assert at == len(ids) == cache.length
    pairs = [torch.stack(cache.pairs(i, 0, at)) for i in range(len(cache.k))]
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]), torch.stack(pairs)


ALONE = [1] * len(IDS)
TOGETHER = ([16, 8], [2] * 12, [1, 7, 3, 13], [9, 15])


def assert_identical(decoder, policy, others=TOGETHER, **more) -> None:
    alone = read(decoder, policy, ALONE, **more)
    assert (alone[0][1:] - alone[0][:-1]).abs().max() > 0, "the tokens must matter"
    for sizes in others:
        for a, b in zip(alone, read(decoder, policy, sizes, **more), strict=True):
            assert torch.equal(a, b), sizes


@pytest.mark.parametrize("shaped_as", SHAPES)
@each_accuracy
@pytest.mark.parametrize("isa", ISAS)
def test_every_width(isa, accuracy, shaped_as):
    decoder = shaped(shaped_as, isa, accuracy)
    for bits in range(2, 9):
        assert_identical(decoder, fixed(decoder, bits), ([16, 5, 3],))
    assert_identical(decoder, varied(decoder))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(overlay, name):
    """Biases, norms of heads, windows, layers without rotation, tied heads."""
    decoder = load_decoder(overlay(name), LoadOptions(cpu=options_of()))
    assert_identical(decoder, varied(decoder))


@pytest.mark.parametrize("head_bits", [4, 16])
def test_other_heads(overlay, head_bits):
    decoder = load_decoder(overlay("llama", head_bits), LoadOptions(cpu=options_of()))
    assert_identical(decoder, varied(decoder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_precision_of_the_cache(dtype):
    decoder = shaped("odd", kv_dtype=dtype)
    assert_identical(decoder, varied(decoder))


@pytest.mark.parametrize("accuracy", ["exact", "balanced"])
def test_threads_change_nothing(accuracy):
    """Nor where chunks of rows end: that depends on threads and widths."""
    results = []
    for threads in (1, 2, 3):
        decoder = shaped("odd", accuracy=accuracy, threads=threads)
        results += [read(decoder, varied(decoder), sizes) for sizes in (ALONE, [16, 8])]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def pruned(decoder):
    """A ragged cache whose heads hold unlike numbers of pairs."""
    cache, rng = decoder.new_ragged_cache(40), torch.Generator().manual_seed(3)
    read(decoder, fixed(decoder, 6), [16, 8], cache)
    keep = torch.rand(decoder.config.num_layers, decoder.config.num_kv_heads, 24, generator=rng) < 0.4
    cache.prune(keep, decoder.config.windows, room=4)
    assert len(cache.lengths.unique()) > 1
    return cache


def test_a_pruned_cache():
    """Which grows on the way: its slack holds four."""
    decoder = shaped("odd")
    policy, results = varied(decoder), []
    for sizes in (ALONE, *TOGETHER):
        cache, step, found, at = pruned(decoder), NativeStep.of(decoder), [], 0
        for n in sizes:
            found += [t.clone() for t in step.several(IDS[at : at + n], cache, policy, [0.0] * n)[:2]]
            at += n
        assert cache.length == 48
        runs = [t for i in range(2) for h in range(2) for t in cache.run(i, h)]
        results.append((torch.cat(found[::2]), torch.cat(found[1::2]), torch.cat(runs)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_what_was_written_behind_the_text_is_overwritten():
    """A draft's keys and values, of other widths and other tokens, leave no trace."""
    decoder = shaped("odd")
    step, cache = NativeStep.of(decoder), decoder.new_cache(len(IDS))
    found = []
    for at in range(0, len(IDS), 8):
        for token in (5, 6, 7):
            step(token, cache, fixed(decoder, 2))
        cache.rewind(at)
        found.append(step.several(IDS[at : at + 8], cache, fixed(decoder, 7), [0.0] * 8)[0].clone())
        cache.rewind(at + 2)  # what was not accepted is read again
        found[-1][2:] = step.several(IDS[at + 2 : at + 8], cache, fixed(decoder, 7), [0.0] * 6)[0]
    assert torch.equal(torch.cat(found), read(decoder, fixed(decoder, 7), ALONE)[0])


@pytest.mark.parametrize("granularity", ["fused", "linear"])
def test_the_rate_distortion_rule(quantized, profiles, granularity):
    """Widths that follow from each token's own input, at corrections of its own."""
    decoder = load_decoder(quantized, LoadOptions(cpu=options_of(), granularity=granularity))
    policy = RateDistortionPolicy(profiles[granularity], decoder, 3.3)
    corrections = [0.1 * (i % 7) - 0.3 for i in range(len(IDS))]
    assert_identical(decoder, policy, corrections=corrections)
    bits = read(decoder, policy, [16, 8], corrections=corrections)[1]
    assert len(bits.unique()) > 2
    assert not torch.equal(bits, read(decoder, policy, [16, 8], corrections=[0.0] * len(IDS))[1])


@settings(deadline=None, max_examples=15)
@given(data=st.data(), isa=st.sampled_from(ISAS or ["none"]), accuracy=st.sampled_from(["exact", "balanced"]))
def test_random_models_and_groupings(data, isa, accuracy):
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    config = replace(
        shape("tiny"), num_layers=1, hidden_size=data.draw(st.integers(1, 300)), num_heads=kv_heads * group,
        intermediate_size=data.draw(st.integers(1, 700)), num_kv_heads=kv_heads, vocab_size=101,
        head_dim=2 * data.draw(st.integers(1, 40)), windows=(data.draw(st.none() | st.integers(1, 30)),),
        uses_rope=(True,),
    )  # fmt: skip
    config = replace(config, inv_freq=torch.linspace(1, 0.01, config.head_dim // 2))
    threads = data.draw(st.integers(1, 3))
    decoder = random_decoder(config, 8, LoadOptions(cpu=options_of(isa, accuracy, threads)))
    sizes, left = [], len(IDS)
    while left:
        sizes.append(data.draw(st.integers(1, min(left, MAX_ROWS))))
        left -= sizes[-1]
    assert_identical(decoder, varied(decoder, data.draw(st.integers(0, 6))), [sizes])


# -- what cannot be done ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 17])
def test_as_many_tokens_as_there_is_room_for(count):
    decoder = shaped("narrow")
    with pytest.raises(ValueError, match=f"{count} tokens in one step; 1..16"):
        NativeStep.of(decoder).several([1] * count, decoder.new_cache(30), fixed(decoder, 4), [0.0] * count)


def test_a_policy_that_is_called_back_takes_one_at_a_time():
    decoder = shaped("narrow")
    cache = decoder.new_cache(4)
    with pytest.raises(ValueError, match="'random' is called back"):
        NativeStep.of(decoder).several(
            [1, 2], cache, RandomPolicy(3.5, len(decoder.groups)).begin_text(), [0.0] * 2
        )
    assert cache.length == 0


@pytest.mark.parametrize("tokens", [[1, 203], [-1, 1]])
def test_tokens_that_do_not_exist(tokens):
    decoder = shaped("narrow")
    with pytest.raises(IndexError, match="there is no token"):
        NativeStep.of(decoder).several(tokens, decoder.new_cache(4), fixed(decoder, 4), [0.0] * 2)


def test_a_cache_without_room():
    decoder = shaped("narrow")
    cache = decoder.new_cache(3)
    with pytest.raises(ValueError, match="holds 3 tokens; 4"):
        NativeStep.of(decoder).several([1, 2, 3, 4], cache, fixed(decoder, 4), [0.0] * 4)
    assert cache.length == 0


def test_a_pass_reads_each_group_once_at_its_widest(quantized, profiles):
    decoder = load_decoder(quantized, LoadOptions(cpu=options_of()))
    text = RateDistortionPolicy(profiles["fused"], decoder, 3.3).begin_text()
    step, cache = NativeStep.of(decoder), decoder.new_cache(len(IDS))
    _, bits, nbytes = step.several(IDS[:16], cache, text, [0.1 * i for i in range(16)])
    widest = bits.amax(0).tolist()
    read = sum(g.bytes_at[b - g.seed_bits] for g, b in zip(decoder.groups, widest, strict=True))
    assert nbytes == read + decoder.head_bytes() + text.extra_bytes
    assert not torch.equal(bits[0], bits.amax(0))
    stepped = step(IDS[16], cache, text)
    row = stepped.bits[0].tolist()
    read = sum(g.bytes_at[b - g.seed_bits] for g, b in zip(decoder.groups, row, strict=True))
    assert stepped.weight_bytes == read + decoder.head_bytes() + text.extra_bytes
    used = sum(g.weights * b for g, b in zip(decoder.groups, row, strict=True))
    assert stepped.effective_bits == used / sum(g.weights for g in decoder.groups)
    assert stepped.greedy == int(stepped.logits[0].argmax())
