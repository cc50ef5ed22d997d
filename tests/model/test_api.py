"""The Python interface: what `import dpllm` offers, with the arguments that users give."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch

import dpllm
from dpllm import InputError
from dpllm.decode.options import GenerateOptions
from dpllm.model.memory import resident_bytes
from dpllm.quant.overlay import Overlay

PROMPT = "import os\n"


@pytest.fixture(scope="module")
def engine(tiny_overlay):
    return dpllm.load(tiny_overlay, target_bits=3.5)


def test_every_public_name_explains_itself():
    for name in dpllm.__all__:
        public = getattr(dpllm, name)
        if name == "__version__":
            continue
        assert len(inspect.getdoc(public).splitlines()[0]) > 15, name
        for attribute, member in vars(public).items() if inspect.isclass(public) else ():
            if inspect.isfunction(member) and not attribute.startswith("_"):
                assert inspect.getdoc(member), f"{name}.{attribute}"


def test_the_page_of_the_api_has_every_name():
    page = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
    assert [name for name in dpllm.__all__ if f"`{name}`" not in page and f"dpllm.{name}" not in page] == []


@pytest.mark.parametrize(
    "public", [dpllm.load, dpllm.Engine.generate, dpllm.quantize, dpllm.calibrate, dpllm.plan]
)
def test_options_are_keywords(public):
    parameters = [p for p in inspect.signature(public).parameters.values() if p.name != "self"]
    assert all(p.kind == p.KEYWORD_ONLY for p in parameters[2:]), public
    assert not any(p.kind == p.VAR_KEYWORD for p in parameters), "each option has a name of its own"


# -- load ---------------------------------------------------------------------------------------------------


def test_arguments_of_load(tiny_overlay):
    engine = dpllm.load(
        str(tiny_overlay), threads=1, backend="cpu", accuracy="exact", resident_bits=4, policy="static",
        target_bits=3.3, dtype=torch.float32,
    )  # fmt: skip
    assert engine.decoder.backend.cpu.handle.threads == 1
    assert engine.decoder.backend.cpu.handle.options.accuracy == "exact"
    assert set(engine.planes.tolist()) == {4}
    assert engine.policy.name == "static" and engine.target_bits == 3.3
    assert "static" in repr(engine) and "3.3" in repr(engine)
    some = resident_bytes(Overlay.open(tiny_overlay), 3)
    held = [dpllm.load(tiny_overlay, max_memory=m).planes.max() for m in ("1GB", some)]
    assert held == [6, 3]


def test_a_time_is_held_from_the_start(tiny_overlay, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = dpllm.load(tiny_overlay, tpot_ms=1000, max_quality_loss="50%")
    assert engine.controller.target_ms == 1000
    assert len(list(engine.generate(PROMPT, max_new_tokens=4))) == 4
    with pytest.raises(InputError, match="cannot be kept"):
        dpllm.load(tiny_overlay, tpot_ms=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"device": "tpu"}, "unknown"),
        ({"threads": 0}, "not possible"),
        ({"backend": "abacus"}, "backend"),
        ({"resident_bits": 4, "max_memory": "1GB"}, "exclude each other"),
        ({"max_memory": "much"}, "not a size"),
        ({"max_memory": 10}, "Raise it"),
        ({"tpot_ms": 20, "target_bits": 3}, "chooses the bits"),
        ({"max_quality_loss": 0.1}, "Give tpot_ms"),
        ({"target_bits": 9}, "impossible"),
        ({"policy": "best"}, "unknown policy"),
    ],
)
def test_what_load_refuses(tiny_overlay, arguments, says):
    with pytest.raises(InputError, match=says) as refused:
        dpllm.load(tiny_overlay, **arguments)
    assert len(str(refused.value).splitlines()) == 1


def test_what_is_not_there(tmp_path, checkpoints):
    with pytest.raises(InputError, match="nowhere"):
        dpllm.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not quantised"):
        dpllm.load(checkpoints / "llama", resident_bits=3)


# -- generate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": [""]}, "stop string"),
        ({"speculate": "often"}, "speculate"),
        ({"chat": True}, "chat template"),
    ],
)
def test_arguments_are_checked_at_the_call(engine, arguments, says):
    with pytest.raises(InputError, match=says):
        engine.generate(PROMPT, **arguments)
    with pytest.raises(TypeError):
        engine.generate(PROMPT, max_tokens=3)
    with pytest.raises(InputError, match="empty"):
        engine.generate("")


def test_a_generation_is_steps_text_and_figures(engine):
    generation = engine.generate(PROMPT, max_new_tokens=12)
    first = next(generation)
    assert first.ttft_ms > 0 and first.tpot_ms is None and first.ms == first.ttft_ms and first.bits == ()
    assert generation.stats.new_tokens == 1 and generation.stats.stopped_by is None
    others = list(generation)
    assert all(s.ttft_ms is None and s.tpot_ms > 0 and s.ms == s.tpot_ms for s in others)
    assert generation.steps == [first, *others]
    assert str(generation) == generation.text == "".join(s.text for s in generation.steps)
    stats = generation.stats
    assert stats.new_tokens == 12 and stats.ttft_ms > 0 and set(stats.tpot_ms) == {"p50", "p95"}
    assert stats.effective_bits == pytest.approx(sum(s.effective_bits for s in others) / 11, abs=1e-3)
    assert stats.kv_bytes == generation.steps[-1].kv_bytes > 0
    assert engine.generate(PROMPT, max_new_tokens=12).text == generation.text


def test_why_a_text_ended(engine, monkeypatch):
    whole = engine.generate(PROMPT, max_new_tokens=20)
    assert whole.text and whole.stats.stopped_by == "max_new_tokens"
    piece = whole.text[4:7]
    stopped = engine.generate(PROMPT, max_new_tokens=20, stop=piece)
    assert stopped.text == whole.text[: whole.text.index(piece)] and stopped.stats.stopped_by == "stop string"
    config = engine.decoder.config
    monkeypatch.setattr(type(config), "eos_ids", (whole.steps[5].token,), raising=False)
    object.__setattr__(config, "eos_ids", (whole.steps[5].token,))
    ended = engine.generate(PROMPT, max_new_tokens=20)
    assert ended.stats.stopped_by is None and ended.text is not None
    assert ended.stats.stopped_by == "end token"


def test_positions_run_out(engine):
    room = engine.decoder.config.max_positions
    long = "import os\n" * 200
    ids = engine.prompts.prompt_ids(long)
    prompt = engine.tokenizer.decode(ids[: room - 8])
    generation = engine.generate(prompt, max_new_tokens=50)
    assert generation.text is not None
    assert generation.stats.stopped_by in ("positions", "end token")


def test_targets_change_between_tokens(engine):
    generation = engine.generate_with(PROMPT, GenerateOptions(max_new_tokens=12, ignore_eos=True))
    before = [next(generation) for _ in range(4)][1:]
    engine.set_target(bits=6)
    later = list(generation)
    assert later and all(s.effective_bits == 6 for s in later)
    assert all(s.effective_bits < 6 for s in before)
    engine.set_target(target_bits=3.5)
    for wrong in ({}, {"bits": 3, "target_bits": 3.0}):
        with pytest.raises(InputError, match="exactly one"):
            engine.set_target(**wrong)


# -- chat, contexts, scores ---------------------------------------------------------------------------------


def test_chat(engine):
    with pytest.raises(InputError, match="no chat template"):
        engine.chat([{"role": "user", "content": "hello"}])
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    engine.tokenizer.chat_template = template
    try:
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
        answers = [engine.chat(m, max_new_tokens=8).text for m in (messages, messages[1:])]
        assert answers[1] == engine.generate("hello", chat=True, max_new_tokens=8).text
        assert answers[0] != answers[1]
        with pytest.raises(InputError, match="no option 'max_tokens'"):
            engine.chat(messages, max_tokens=3)
    finally:
        engine.tokenizer.chat_template = None


def test_contexts_are_read_saved_and_loaded(engine, tmp_path):
    context = engine.read("import os\nimport sys\n" * 12, keep=0.5, policy="knorm")
    assert 0.4 < context.kept_ratio < 0.6
    answer = engine.generate("def", context=context, max_new_tokens=8).text
    context.save(tmp_path / "notes")
    again = dpllm.KVContext.load(tmp_path / "notes", engine)
    assert engine.generate("def", context=again, max_new_tokens=8).text == answer
    assert json.loads((tmp_path / "notes" / "context.json").read_text())["made"]["policy"] == "knorm"
    with pytest.raises(InputError):
        context.save(tmp_path / "notes")
    engine.generate("def", context=again, max_new_tokens=8, keep=True).text  # noqa: B018
    grown = again.cache.length
    engine.prune(again, dpllm.ContextOptions(dpllm.Budget(keep_ratio=0.9), policy="knorm"))
    assert again.cache.length == grown


def test_scores_are_log_probabilities(engine):
    engine.set_target(bits=6)
    text = "import os\nimport sys\n"
    score = engine.score(text)
    ids = torch.tensor(score.tokens)
    with torch.no_grad():
        logits = engine.decoder.forward(ids[:-1], engine.decoder.new_cache(len(ids)))
    expected = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    assert score.log_probs == pytest.approx(expected.tolist(), abs=0.08)
    assert score.perplexity == pytest.approx(float((-expected).mean().exp()), rel=0.05)
    assert score.effective_bits == 6
    engine.set_target(target_bits=3.5)
    assert engine.score(text).log_probs != score.log_probs
    plain = dpllm.load(dpllm.reference.model_path())
    assert plain.score("import os\n").effective_bits == 0
