"""A context that was pruned answers as a dense computation in which the evicted pairs are masked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cpu_cases import needs_library, options_of
from safetensors.torch import load_file, save_file

from dpllm.base.errors import InputError
from dpllm.base.text import load_tokenizer
from dpllm.context import build
from dpllm.context.kv_context import KVContext
from dpllm.context.options import ContextOptions
from dpllm.context.pruner import Pruner
from dpllm.context.saved import read_manifest
from dpllm.decode.options import GenerateOptions
from dpllm.kernels.reference import causal_attention
from dpllm.kvzip_bridge.budget import Budget
from dpllm.kvzip_bridge.cache import DenseKVCache
from dpllm.kvzip_bridge.policies import KV_POLICIES
from dpllm.model.loading import LoadOptions
from dpllm.opening import open_engine

QUESTION, LENGTH = "\n    return self", 12
PRUNING = [name for name in KV_POLICIES if name not in ("keep-all", "whole-heads")]


@pytest.fixture(scope="module")
def text(calibration_documents) -> str:
    return calibration_documents[1][:500]


@pytest.fixture(scope="module")
def plain(tiny_checkpoint):
    """The unquantised model, all in float32."""
    return open_engine(tiny_checkpoint, options=LoadOptions(kv_dtype=torch.float32))


@pytest.fixture(scope="module")
def engine(tiny_overlay):
    return open_engine(tiny_overlay, target_bits=3.5, options=LoadOptions(backend="reference"))


def options(keep: float = 0.4, **more) -> ContextOptions:
    return ContextOptions(Budget(keep_ratio=keep), **{"chunk": 64} | more)


def parts(engine) -> dict:
    """The parts of an engine that building a context needs."""
    return {"decoder": engine.decoder, "prompts": engine.prompts, "profile": engine.profile}


def build_context(engine, text: str, options: ContextOptions) -> KVContext:
    return build.build_context(text, options, **parts(engine))


def prune_tail(engine, context: KVContext, options: ContextOptions) -> None:
    build.prune_tail(context, options, **parts(engine))


def save_context(context: KVContext, path: Path, engine) -> dict:
    assert context.model == engine.path
    return context.save(path)


def load_context(path: Path, engine) -> KVContext:
    return KVContext.load(path, engine)


def answer(engine, context=None, question=QUESTION, **more) -> list[int]:
    steps = engine.generate_with(question, GenerateOptions(LENGTH), context=context, **more)
    return [s.token for s in steps]


def held(cache) -> list[torch.Tensor]:
    heads = range(cache.lengths.shape[1])
    return [t.clone() for layer in range(len(cache.k)) for h in heads for t in cache.run(layer, h)]


class MaskedCache(DenseKVCache):
    """A dense cache whose evicted pairs are masked: what the paper's evaluation code does."""

    def __init__(self, decoder, kept, base: int, capacity: int):
        c = decoder.config
        super().__init__(c.num_layers, c.num_kv_heads, c.head_dim, capacity)
        self.kept, self.base = kept, base

    def attend(self, layer, q, scale, window, kernels):
        end, outs = self.length + len(q), []
        for h, own in enumerate(q.chunk(len(self.k[0]), dim=1)):
            seen = torch.ones(end, dtype=torch.bool)
            if self.length >= self.base:  # the context itself is read whole
                seen[: self.base] = False
                seen[self.kept[layer][h].long()] = True
            k, v = (t[layer][h, :end][seen][None] for t in (self.k, self.v))
            outs.append(causal_attention(own, k, v, scale, window))
        return torch.cat(outs, dim=1)


@pytest.mark.parametrize("policy", PRUNING)
def test_pruned_is_masked(plain, text, policy):
    context = build_context(plain, text, options(policy=policy))
    ids = torch.tensor(context.ids)
    question = torch.tensor(context.question(plain.prompts, QUESTION, False))
    masked = MaskedCache(plain.decoder, context.cache.kept, len(ids), len(ids) + len(question))
    with torch.no_grad():
        plain.decoder.forward(ids, masked)
        expected = plain.decoder.forward(question, masked)
        found = plain.decoder.forward(question, context.cache)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    layers, heads = context.cache.lengths.shape
    pairs = layers * heads * len(ids)
    assert sum(len(p) for own in context.cache.kept for p in own) == round(0.4 * pairs)


def test_everything_kept_answers_like_no_context_at_all(engine, text):
    context = build_context(engine, text, options(1.0))
    assert context.kept_ratio == 1.0
    joined = engine.generate_with(text + QUESTION, GenerateOptions(LENGTH))
    assert context.ids + context.question(engine.prompts, QUESTION, False) == engine.prompts.prompt_ids(
        text + QUESTION
    )
    assert answer(engine, context) == [s.token for s in joined]


@needs_library
def test_native_and_reference_agree(tiny_overlay, text):
    engines = [
        open_engine(
            tiny_overlay,
            target_bits=3.5,
            options=LoadOptions(backend=b, cpu=options_of(), kv_dtype=torch.float32),
        )
        for b in ("reference", None)
    ]
    contexts = [build_context(e, text, options()) for e in engines]
    assert torch.equal(contexts[0].cache.lengths, contexts[1].cache.lengths)
    assert answer(engines[0], contexts[0]) == answer(engines[1], contexts[1])


def test_a_question_leaves_the_context_as_it_was(engine, text):
    context = build_context(engine, text, options())
    before, first = held(context.cache), answer(engine, context)
    answer(engine, context, "\nclass A(")
    unfinished = engine.generate_with("import os", GenerateOptions(LENGTH), context=context)
    next(unfinished)
    unfinished.close()
    assert all(map(torch.equal, held(context.cache), before))
    assert answer(engine, context) == first


def test_forks_answer_alike_and_apart(engine, text):
    context = build_context(engine, text, options())
    first = answer(engine, context)
    own, context.cache = context.cache, context.cache.fork()
    answer(engine, context, "\nclass A(", keep=True)
    context.cache, context.ids, context.pending = own, context.ids[: own.length], []
    assert answer(engine, context) == first


def test_turns_of_a_conversation(plain, text):
    context = build_context(plain, text, options(1.0))
    read = list(context.ids)
    first = answer(plain, context, keep=True)
    assert context.cache.length == len(context.ids), "the cache has read what it says it has"
    second = answer(plain, context, "\ndef g(", keep=True)
    question = context.question(plain.prompts, "\ndef g(", False)
    whole = [
        *read,
        *plain.prompts.prompt_ids(QUESTION)[1:],
        *first,
        *question[len(context.pending) :],
        *second,
    ]
    assert [*context.ids, *context.pending] == whole
    cache = plain.decoder.new_cache(len(whole))
    with torch.no_grad():
        logits = plain.decoder.forward(torch.tensor(whole), cache)
    assert logits[-LENGTH - 1 : -1].argmax(1).tolist() == second


@pytest.mark.parametrize("policy", ["kvzip", "snapkv"])
def test_a_conversation_is_pruned_again(plain, text, policy):
    context = build_context(plain, text, options(policy=policy))
    kept = [p.clone() for heads in context.cache.kept for p in heads]
    answer(plain, context, keep=True)
    length = context.cache.length
    prune_tail(plain, context, options(policy=policy))
    assert (context.cache.length, context.cache.base) == (length, length)
    assert context.kept_ratio == pytest.approx(0.4, abs=1e-3)
    now = [p for heads in context.cache.kept for p in heads]
    assert all(torch.equal(new[: len(old)], old) for old, new in zip(kept, now, strict=True)), (
        "once kept, kept"
    )
    answer(plain, context)


@pytest.mark.parametrize("policy", ["kvzip", "kvzip+", "snapkv", "recent", "random"])
def test_block_by_block(plain, text, policy):
    once, blocks = (build_context(plain, text, options(policy=policy, block=b)) for b in (None, 96))
    assert once.ids == blocks.ids
    assert blocks.kept_ratio == pytest.approx(once.kept_ratio, abs=1e-3)
    assert len(answer(plain, blocks)) == LENGTH
    whole = build_context(plain, text, options(1.0, policy=policy, block=96))
    assert answer(plain, whole) == answer(plain, build_context(plain, text, options(1.0)))


def test_block_by_block_never_holds_the_whole(plain, text, monkeypatch):
    most = []
    context_type = type(plain.decoder.new_ragged_cache(1))
    write = context_type.write
    monkeypatch.setattr(
        context_type, "write", lambda self, *a: (write(self, *a), most.append(self.allocated_nbytes))
    )
    context = build_context(plain, text, options(0.2, block=64))
    token = context.cache.nbytes / context.kept_ratio / len(context.ids)
    assert max(most) <= token * (0.2 * len(context.ids) + 64 + 64 + 256 + 64), (
        "budget, a block, its repetition"
    )


@pytest.mark.parametrize("model", ["mistral-window", "qwen2-window"])
def test_layers_with_a_window_keep_what_they_see(checkpoints, tokenizer, model, tmp_path):
    shutil.copytree(checkpoints / model, tmp_path / model)
    tokenizer.save_pretrained(tmp_path / model)
    engine, ids, question = open_engine(tmp_path / model), torch.arange(3, 73), torch.tensor([9, 8, 7])
    windows = engine.decoder.config.windows
    context = KVContext(engine.decoder.new_ragged_cache(0), protected=4)
    pruner = Pruner(context, options(0.5, policy="recent"), len(ids), **parts(engine))
    pruner.read(ids.tolist())
    pruner.prune(pruner.share())
    for heads, window in zip(context.cache.kept, windows, strict=True):
        assert window is None or all(p.tolist() == list(range(70 - window, 70)) for p in heads)
    whole = [torch.arange(70, dtype=torch.int32)] * engine.decoder.config.num_kv_heads
    kept = [p if w is None else whole for p, w in zip(context.cache.kept, windows, strict=True)]
    masked = MaskedCache(engine.decoder, kept, 70, 80)
    with torch.no_grad():
        engine.decoder.forward(ids, masked)
        for piece in (question, question[:1]):
            expected = engine.decoder.forward(piece, masked)
            found = engine.decoder.forward(piece, context.cache)
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_conversation_that_does_not_fit_is_left_alone(plain, text):
    context = build_context(plain, text, options(0.4))
    answer(plain, context, keep=True)
    before, ids = held(context.cache), list(context.ids)
    with pytest.raises(InputError, match="nothing of the conversation would be kept"):
        prune_tail(plain, context, options(0.3))
    assert all(map(torch.equal, held(context.cache), before)) and context.ids == ids


def interrupted(*args, **options):
    raise KeyboardInterrupt


def test_interrupted_pruning_loses_nothing(plain, text, monkeypatch):
    context = build_context(plain, text, options(policy="snapkv"))
    answer(plain, context, keep=True)
    before, ids = held(context.cache), list(context.ids)
    monkeypatch.setattr(plain.decoder, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_tail(plain, context, options(policy="snapkv"))
    assert all(map(torch.equal, held(context.cache), before)) and context.ids == ids


def test_a_question_that_failed_was_not_asked(plain, text, monkeypatch):
    context = build_context(plain, text, options())
    monkeypatch.setattr(plain.decoder, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(plain, context, keep=True)
    assert (context.pending, context.cache.length) == ([], len(context.ids))


def test_one_kept_question_at_a_time(engine, text):
    context = build_context(engine, text, options())
    first = engine.generate_with("import os", GenerateOptions(LENGTH), context=context)
    next(first)
    with pytest.raises(InputError, match="still being answered"):
        answer(engine, context, keep=True)
    first.close()
    answer(engine, context, keep=True)


# -- on disk ---------------------------------------------------------------------------------------------------


def test_saved_and_loaded(engine, text, tmp_path):
    context = build_context(engine, text, options())
    first = answer(engine, context)
    manifest = save_context(context, tmp_path / "ctx", engine)
    again = load_context(tmp_path / "ctx", engine)
    assert again.ids == context.ids and again.facts == json.loads(json.dumps(context.facts))
    assert all(map(torch.equal, held(again.cache), held(context.cache)))
    assert answer(engine, again) == first
    assert manifest["nbytes"] == context.cache.nbytes
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"
    size = sum(f.stat().st_size for f in (tmp_path / "ctx").iterdir())
    positions = context.cache.lengths.sum() * 4
    assert size - context.cache.nbytes - positions < 8000, "bytes on disk are those of the kept pairs"


def test_a_conversation_is_saved_too(plain, text, tmp_path):
    context = build_context(plain, text, options())
    answer(plain, context, keep=True)
    save_context(context, tmp_path / "ctx", plain)
    assert answer(plain, load_context(tmp_path / "ctx", plain)) == answer(plain, context)


def saved(engine, text, path):
    save_context(build_context(engine, text, options()), path, engine)
    return path


def test_another_model_is_refused(engine, plain, text, tmp_path):
    path = saved(engine, text, tmp_path / "ctx")
    with pytest.raises(InputError, match="was made with another model"):
        load_context(path, plain)


def test_damaged_files_are_refused(engine, text, tmp_path):
    path = saved(engine, text, tmp_path / "ctx")
    shutil.copytree(path, tmp_path / "short")
    file = tmp_path / "short" / "pairs.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        load_context(tmp_path / "short", engine)
    file.unlink()
    with pytest.raises(InputError, match="is missing"):
        load_context(tmp_path / "short", engine)
    for change, says in (
        ({"format": "other"}, "not in the format"), ({"format_version": 99}, "format version 99"),
        ({"tokens": None}, "'tokens' is missing"), ({"chat": []}, "'chat' is missing"),
        ({"model": {"path": 3, "sha256": ""}}, "'model.path' is missing"),
    ):  # fmt: skip
        manifest = {k: v for k, v in (read_manifest(path) | change).items() if v is not None}
        (tmp_path / "short" / "context.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=says):
            load_context(tmp_path / "short", engine)
    (tmp_path / "short" / "context.json").unlink()
    with pytest.raises(InputError, match="is not a saved context"):
        load_context(tmp_path / "short", engine)


def test_tensors_that_do_not_match_the_manifest_are_refused(engine, text, tmp_path, monkeypatch):
    path = saved(engine, text, tmp_path / "ctx")
    manifest = read_manifest(path)
    for change in ({"pending": [99999]}, {"protected": -1}, {"base": 3}):
        (path / "context.json").write_text(json.dumps(manifest | change))
        with pytest.raises(InputError, match="do not fit together"):
            load_context(path, engine)
    (path / "context.json").write_text(json.dumps(manifest))
    tensors = load_file(path / "pairs.safetensors")
    save_file(tensors | {"k.0": tensors["k.0"][:-1]}, path / "pairs.safetensors")
    monkeypatch.setattr("dpllm.context.saved._sha256", lambda p: read_manifest(path)["sha256"])
    with pytest.raises(InputError, match="do not fit together"):
        load_context(path, engine)


def test_a_place_that_is_taken(engine, text, tmp_path):
    (tmp_path / "ctx").mkdir()
    with pytest.raises(InputError, match="exists already"):
        saved(engine, text, tmp_path / "ctx")


# -- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"policy": "h2o"}, "unknown KV policy 'h2o'"),
        ({"allocation": "even"}, "allocation 'even' is unknown"),
        ({"block": 3}, "a block of 3 tokens is too small"),
        ({"chunk": 1}, "a chunk of 1 tokens is too small"),
        ({"keep": 0.001}, "are needed"),
        ({"chunk": 512}, "Choose a chunk of"),
        ({"policy": "heads"}, "needs a profile of heads"),
        ({"policy": "whole-heads"}, "needs a profile of heads"),
        ({"policy": "keep-all"}, "Choose another policy"),
    ],
)
def test_what_cannot_be(plain, text, arguments, says):
    with pytest.raises(InputError, match=says):
        build_context(plain, text, options(**arguments))


def test_texts_that_cannot_be(plain, text):
    with pytest.raises(InputError, match="the context is empty"):
        build_context(plain, "  \n", options())
    with pytest.raises(InputError, match="the model has 512 positions"):
        build_context(plain, text * 10, options())


def test_questions_that_cannot_be(plain, text):
    context = build_context(plain, text, options())
    with pytest.raises(InputError, match="the prompt is empty"):
        answer(plain, context, "")
    with pytest.raises(InputError, match="not built as a chat"):
        next(plain.generate_with("hello", GenerateOptions(chat=True), context=context))
    with pytest.raises(InputError, match=f"after {len(context.ids)} tokens of context"):
        answer(plain, context, text * 2)
    assert context.cache.length == len(context.ids)


# -- chats -----------------------------------------------------------------------------------------------------


def test_a_chat_is_the_template(plain, text, tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]A{% endif %}"
    )
    chatting = open_engine(tiny_checkpoint, options=LoadOptions(kv_dtype=torch.float32))
    chatting.prompts = replace(chatting.prompts, tokenizer=tokenizer)
    context = build_context(chatting, text, options(1.0, chat=True))
    assert tokenizer.decode(context.ids[: context.protected]) == "<s>[user]", (
        "the frame before it is never evicted"
    )
    asked = context.ids + context.question(chatting.prompts, " Why?", True)
    assert asked == chatting.prompts.prompt_ids(text + " Why?", chat=True)
    context.pending = [tokenizer.eos_token_id]
    again = tokenizer.decode(context.question(chatting.prompts, "How?", True))
    assert again == f"{tokenizer.eos_token}\n[user]How?\n[assistant]A"
    context.pending = chatting.prompts.plain_ids(
        "x"
    )  # the answer was cut short: the template's end token follows it
    again = tokenizer.decode(context.question(chatting.prompts, "How?", True))
    assert again == f"x{tokenizer.eos_token}\n[user]How?\n[assistant]A"
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InputError, match="does not frame a conversation"):
        build_context(chatting, text, options(1.0, chat=True))


def test_a_frame_longer_than_a_block(tiny_checkpoint, text):
    chatting = open_engine(tiny_checkpoint, options=LoadOptions(kv_dtype=torch.float32))
    chatting.tokenizer.chat_template = (
        "You are one who answers truthfully, at length and with patience, whatever the question may be about. "
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    context = build_context(chatting, text[:300], options(0.6, chat=True, block=32))
    assert context.protected > 32
    assert all(
        p[: context.protected].tolist() == list(range(context.protected)) for p in context.cache.kept[0]
    )
