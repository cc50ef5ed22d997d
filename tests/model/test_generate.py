"""Generation: which tokens come, from which prompts, and what their steps report."""

from __future__ import annotations

import shutil
from itertools import count, islice

import pytest
import torch
from scripted_models import pieces
from tokenizers import normalizers
from transformers import AutoModelForCausalLM

from dpllm.base.errors import InputError
from dpllm.base.text import load_tokenizer
from dpllm.decode import continuation
from dpllm.decode.options import GenerateOptions
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.model.loading import LoadOptions
from dpllm.opening import open_engine
from dpllm.policies.base import Recorder
from dpllm.policies.make import make_policy

PROMPT = "def main(argv):\n    return "


@pytest.fixture(scope="module")
def plain(tiny_checkpoint):
    return open_engine(tiny_checkpoint)


@pytest.fixture
def engine(tiny_overlay):
    return open_engine(tiny_overlay)


GREEDY = GenerateOptions(max_new_tokens=24)


def tokens_of(engine, options=GREEDY, prompt=PROMPT) -> list[int]:
    return [s.token for s in engine.generate_with(prompt, options)]


# -- which tokens -----------------------------------------------------------------------------------------


def test_greedy_is_the_argmax_of_transformers(plain, tiny_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    said = set()
    for prompt in (PROMPT, "import os\n", "class A", "x", "    self.value = 5"):
        ids = plain.prompts.prompt_ids(prompt)
        assert ids[0] == plain.tokenizer.bos_token_id
        expected = []
        with torch.no_grad():
            while len(expected) < 16 and 1 not in expected:
                expected.append(int(model(torch.tensor([ids + expected])).logits[0, -1].argmax()))
        assert tokens_of(plain, GenerateOptions(max_new_tokens=16), prompt) == expected
        said.update(expected)
    assert len(said) > 8, "the random model must say something"


def test_decoding_is_a_maximal_prefill_and_policy_steps(engine):
    steps = list(engine.generate_with(PROMPT, GenerateOptions(max_new_tokens=24)))
    decoder, ids = engine.decoder, torch.tensor(engine.prompts.prompt_ids(PROMPT))
    text = make_policy("rate-distortion", 3.5, decoder, engine.profile).begin_text()
    recorder, cache = Recorder(text, decoder.groups), decoder.new_cache(100)
    with torch.no_grad():
        logits = decoder.forward(ids, cache)
        for n, step in enumerate(steps):
            assert step.token == int(logits[-1].argmax())
            if n:
                assert list(step.bits) == recorder.bits()[0].tolist()
            read = recorder.effective_bits() if n else None
            text.learn(logits[-1:], torch.tensor([step.token]), read)
            logits = decoder.forward(torch.tensor([step.token]), cache, recorder)


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize(("accuracy", "error"), [("exact", 5e-5), ("balanced", 0.01)])
def test_the_prompt_may_be_read_in_chunks(tiny_overlay, monkeypatch, accuracy, error, chunk):
    """The logits are the same up to the rounding of the kernels for few and for many rows."""
    engine = open_engine(tiny_overlay, options=LoadOptions(cpu=CpuOptions(accuracy=accuracy)))
    decoder, ids = engine.decoder, engine.prompts.prompt_ids(PROMPT)
    whole = continuation.read_prompt(decoder, ids, decoder.new_cache(100)).logits
    monkeypatch.setattr(continuation, "PREFILL_CHUNK", chunk)
    cache = decoder.new_cache(100)
    found = continuation.read_prompt(decoder, ids, cache).logits
    assert cache.length == len(ids) and found.shape == whole.shape == (1, decoder.config.vocab_size)
    # `error` is that of one product, relative to its norm, as docs/results.md has it. Logits come after 13 products (4
    # in each of 3 layers, and the head), whose errors are independent. The two ways to read differ by twice as many.
    assert (found - whole).norm() < (2 * 13) ** 0.5 * error * whole.norm()
    short = continuation.read_prompt(decoder, ids[:-1], decoder.new_cache(100)).logits
    assert (short - whole).norm() > 0.3 * whole.norm(), "a token too few is seen"


def test_max_new_tokens(plain):
    assert len(tokens_of(plain, GenerateOptions(max_new_tokens=1))) == 1
    assert len(tokens_of(plain, GenerateOptions(max_new_tokens=9))) == 9


def test_generation_ends_with_the_models_positions(scripted):
    engine = scripted("abcdefghijk", max_position_embeddings=8)
    assert pieces(engine) == list("abcdef")  # bos and 'A' take two of the eight


def test_prompts_as_long_as_the_model(scripted):
    engine = scripted("abc", max_position_embeddings=8)
    assert len(engine.prompts.prompt_ids("xxyyzzA")) == 8
    with pytest.raises(InputError, match="8 tokens; the model has 8 positions") as e:
        next(engine.generate("xxyyzzA"))
    assert len(str(e.value).splitlines()) == 1
    assert pieces(engine, "xxyyzA") == ["a"]


SAMPLED = {"max_new_tokens": 24, "temperature": 1.0}


def test_seeds(engine):
    once, again, other = (tokens_of(engine, GenerateOptions(**SAMPLED, seed=s)) for s in (1, 1, 2))
    assert once == again
    assert once != other


def test_temperature_zero_and_a_narrow_nucleus_are_greedy(engine):
    greedy = tokens_of(engine)
    assert tokens_of(engine, GenerateOptions(max_new_tokens=24, temperature=0, seed=3)) == greedy
    assert tokens_of(engine, GenerateOptions(**SAMPLED, top_p=1e-6, seed=3)) == greedy
    assert tokens_of(engine, GenerateOptions(**SAMPLED, seed=3)) != greedy


def test_without_a_seed_sampling_is_torchs(engine):
    torch.manual_seed(0)
    once = tokens_of(engine, GenerateOptions(**SAMPLED))
    assert tokens_of(engine, GenerateOptions(**SAMPLED)) != once
    torch.manual_seed(0)
    assert tokens_of(engine, GenerateOptions(**SAMPLED)) == once


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0},
     {"top_p": 1.1}, {"top_p": float("nan")}, {"stop": ("a", "")}],
)  # fmt: skip
def test_impossible_options(wrong):
    with pytest.raises(InputError) as e:
        GenerateOptions(**wrong)
    assert len(str(e.value).splitlines()) == 1


# -- prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "message"), [("", "empty"), ("caf\udce9", "not UTF-8")])
def test_prompts_that_are_no_text(plain, prompt, message):
    with pytest.raises(InputError, match=message):
        next(plain.generate(prompt))


def test_a_prompt_the_tokenizer_drops(scripted, tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    engine = scripted("abc", tokenizer=tokenizer)
    engine.tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(InputError, match="no tokens"):
        next(engine.generate("   "))


def test_a_tokenizer_of_another_model(checkpoints, tokenizer, tmp_path):
    shutil.copytree(checkpoints / "llama", tmp_path / "mixed")  # knows 96 tokens
    tokenizer.save_pretrained(tmp_path / "mixed")
    with pytest.raises(InputError, match="the model knows 96"):
        next(open_engine(tmp_path / "mixed").generate("return self.value"))


def test_chat_template(scripted, tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]A{% endif %}"
    )
    engine = scripted("hey", tokenizer=tokenizer)
    ids = engine.prompts.prompt_ids("good day", chat=True)
    assert engine.tokenizer.decode(ids) == "<s>[user]good day\n[assistant]A"
    assert ids.count(0) == 1, "one bos, not the template's and the tokenizer's"
    assert "".join(pieces(engine, "good day", chat=True)) == "hey"


def test_no_chat_template(plain):
    with pytest.raises(InputError, match="no chat template"):
        next(plain.generate_with("hello", GenerateOptions(chat=True)))


# -- steps, policies, life of a generator -----------------------------------------------------------------


def test_step_fields(engine):
    clock = count(0, 2).__next__
    steps = list(engine.generate_with(PROMPT, GenerateOptions(max_new_tokens=12), clock=clock))
    decoder, prompt = engine.decoder, len(engine.prompts.prompt_ids(PROMPT))
    assert len(steps) == 12
    per_token = steps[1].kv_bytes - steps[0].kv_bytes
    assert per_token == 2 * 3 * 2 * 16 * 2  # keys and values, layers, heads, head size, float16
    assert [s.kv_bytes for s in steps] == [per_token * (prompt + n) for n in range(12)]
    assert [s.ms for s in steps] == [6000.0] + [12000.0] * 11
    assert [s.tpot_ms for s in steps] == [None] + [12000.0] * 11
    assert [s.ttft_ms for s in steps] == [6000.0] + [None] * 11
    first, rest = steps[0], steps[1:]
    everything = sum(g.bytes_at[-1] for g in decoder.groups) + decoder.head_bytes()
    assert (first.effective_bits, first.weight_bytes, len(first.bits)) == (6.0, everything, 0)
    weights = [g.weights for g in decoder.groups]
    for s in rest:
        assert len(s.bits) == len(decoder.groups) and all(2 <= b <= 6 for b in s.bits)
        mean = sum(b * w for b, w in zip(s.bits, weights, strict=True)) / sum(weights)
        assert s.effective_bits == pytest.approx(mean)
        read = sum(g.bytes_at[b - 2] for g, b in zip(decoder.groups, s.bits, strict=True))
        assert s.weight_bytes == read + engine.profile.estimator_bytes() + decoder.head_bytes()
        assert s.weight_bytes < everything
    assert len({tuple(s.bits) for s in rest}) > 1, "widths follow the token"


def test_steps_of_an_unquantised_model(plain):
    steps = list(plain.generate_with(PROMPT, GenerateOptions(max_new_tokens=3)))
    assert {s.effective_bits for s in steps} == {0.0}


def test_abandoning_a_generator(engine):
    whole = tokens_of(engine)
    begun = engine.generate_with(PROMPT, GenerateOptions(max_new_tokens=24))
    assert [s.token for s in islice(begun, 3)] == whole[:3]
    begun.close()
    assert tokens_of(engine) == whole


def test_generators_do_not_disturb_each_other(engine):
    options = GenerateOptions(max_new_tokens=10)
    alone = [tokens_of(engine, options, p) for p in (PROMPT, "import os")]
    both = zip(engine.generate_with(PROMPT, options), engine.generate_with("import os", options), strict=True)
    together = [[s.token for s in steps] for steps in zip(*both, strict=True)]
    assert together == alone


def test_retargeting_while_generating(engine):
    """The new target holds from the very next token."""
    engine.set_policy("uniform", 2)
    used = []
    for step in engine.generate_with(PROMPT, GenerateOptions(max_new_tokens=9)):
        used.append(step.effective_bits)
        if len(used) == 3:
            engine.set_policy("uniform", 5)
        if len(used) == 6:
            engine.set_policy("rate-distortion", 3.0)
    assert used[:6] == [6, 2, 2, 5, 5, 5]
    assert all(b not in (2, 5) for b in used[6:])


def test_what_load_chooses(tiny_overlay, tmp_path, tiny_checkpoint):
    chosen = open_engine(tiny_overlay)
    assert (chosen.policy.name, chosen.target_bits) == ("rate-distortion", 3.5)
    small = open_engine(tiny_overlay, options=LoadOptions(resident_bits=3))
    assert (small.policy.name, small.target_bits) == ("rate-distortion", 3.0)
    shutil.copytree(tiny_overlay, tmp_path / "bare")
    (tmp_path / "bare" / "profile.safetensors").unlink()
    bare = open_engine(tmp_path / "bare")
    assert (bare.policy.name, bare.target_bits, bare.profile) == ("uniform", 6.0, None)
    assert (
        open_engine(tmp_path / "bare", profile=tiny_overlay / "profile.safetensors").policy.name
        == "rate-distortion"
    )
    assert open_engine(tiny_checkpoint).policy is None
    with pytest.raises(InputError, match="one precision"):
        open_engine(tiny_checkpoint, target_bits=3.0)
    with pytest.raises(InputError, match="not a directory"):
        open_engine(tmp_path / "nowhere")


def test_a_linear_profile_decides_per_matrix(tiny_overlay, profiles, tmp_path):
    profiles["linear"].save(tmp_path / "linear.safetensors")
    engine = open_engine(tiny_overlay, profile=tmp_path / "linear.safetensors", target_bits=3.0)
    assert len(engine.decoder.groups) == 3 * 7
    assert len(list(engine.generate_with(PROMPT, GenerateOptions(max_new_tokens=2)))[1].bits) == 21


def test_planes_held_differ_from_group_to_group(tiny_overlay, profiles):
    profile = profiles["fused"]
    planes = dict(zip(profile.group_names, profile.budget(4).tolist(), strict=True))
    engine = open_engine(tiny_overlay, options=LoadOptions(resident_bits=planes))
    assert engine.target_bits == 3.5
    first, *others = engine.generate_with("import os", GenerateOptions(max_new_tokens=12))
    groups = engine.decoder.groups
    held = sum(planes[g.name] * g.weights for g in groups) / sum(g.weights for g in groups)
    assert first.effective_bits == pytest.approx(held), "the prompt reads what is there"
    for step in others:
        assert all(bits <= planes[g.name] for bits, g in zip(step.bits, groups, strict=True))
