"""Conversations: the cache has read what the chat template makes of them, and each turn reads only what is new."""

from __future__ import annotations

import json

import pytest
import torch
from scripted_models import save_scripted

from dpllm.base.errors import InputError
from dpllm.base.text import load_tokenizer
from dpllm.conversation import Conversation, OutOfPositions
from dpllm.decode.options import GenerateOptions
from dpllm.model.loading import LoadOptions
from dpllm.opening import open_engine

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<pad>{{ m.content }}</s>{% else %}[{{ m.role }}]{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<pad>{% endif %}"
)
ANSWER = "jQ7~"
BRIEFLY = "Answer briefly."


@pytest.fixture
def tokenizer_with_template(tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def chatting(tokenizer_with_template, tmp_path):
    """A factory of engines that say ANSWER, then a token that ends it, at each turn of the chat template."""

    def build(end: str = "</s>", **config):
        tokenizer = tokenizer_with_template
        spoken = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
        assert len(spoken) == len(ANSWER)
        chain = [tokenizer.pad_token_id, *spoken, tokenizer.convert_tokens_to_ids(end)]
        save_scripted(tmp_path / "chatting", tokenizer, chain, **{"max_position_embeddings": 256} | config)
        return open_engine(tmp_path / "chatting")

    return build


@pytest.fixture
def continuing(tokenizer, tmp_path):
    """An engine that continues 'A' with ANSWER and an end token; its tokenizer has no chat template."""
    chain = tokenizer("A" + ANSWER, add_special_tokens=False)["input_ids"]
    save_scripted(tmp_path / "continuing", tokenizer, [*chain, tokenizer.eos_token_id])
    return open_engine(tmp_path / "continuing")


def heard(conversation: Conversation) -> list[int]:
    """All that the model has read, and what it is about to read first."""
    return [*conversation.context.ids, *conversation.context.pending]


def template_of(conversation: Conversation) -> list[int]:
    return conversation.engine.tokenizer.apply_chat_template(
        conversation.messages, tokenize=True, return_dict=False
    )


def exchange(conversation: Conversation, *messages: str) -> list[str]:
    return [conversation.say(message).text for message in messages]


# -- with a chat template ----------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [None, "", BRIEFLY])
def test_the_cache_has_read_the_template(chatting, system):
    conversation = Conversation(chatting(), system=system)
    for count, message in enumerate(("hello", "import os?", "</x> y"), 1):
        assert exchange(conversation, message) == [ANSWER]
        assert [m["content"] for m in conversation.messages if m["role"] == "assistant"] == [ANSWER] * count
        assert heard(conversation) == template_of(conversation)
        assert conversation.context.cache.length == len(conversation.context.ids)


def test_an_answer_that_is_cut_ends_as_the_template_ends_it(chatting):
    conversation = Conversation(chatting(), GenerateOptions(max_new_tokens=2))
    assert exchange(conversation, "hello", "how", "why") == [ANSWER[:2]] * 3
    assert [*heard(conversation), conversation.engine.tokenizer.eos_token_id] == template_of(conversation)


def test_another_end_token_than_that_of_the_template(chatting, tokenizer_with_template):
    other = tokenizer_with_template.convert_tokens_to_ids("!")
    conversation = Conversation(chatting("!", eos_token_id=[1, other]))
    assert exchange(conversation, "hello", "how", "why") == [ANSWER] * 3
    assert heard(conversation)[:-1] == template_of(conversation)[:-1]
    assert heard(conversation)[-1] == other, "not read yet"


def test_each_turn_reads_only_what_is_new(chatting, monkeypatch):
    engine = chatting()
    conversation, read = Conversation(engine, system=BRIEFLY), []
    forward = engine.decoder.forward
    monkeypatch.setattr(
        engine.decoder,
        "forward",
        lambda ids, *rest, **more: read.append(len(ids)) or forward(ids, *rest, **more),
    )
    exchange(conversation, "a long message to begin with " * 3)
    before = len(heard(conversation))
    read.clear()
    exchange(conversation, "now")
    fresh = engine.prompts.plain_ids("</s>[user]now<pad>")
    assert max(read) == read[0] == len(fresh)
    assert heard(conversation)[before - 1 :][: len(fresh)] == fresh


def test_answers_are_those_of_a_model_that_reads_it_all_at_once(tiny_checkpoint):
    engine = open_engine(tiny_checkpoint, options=LoadOptions(kv_dtype=torch.float32))
    engine.tokenizer.chat_template = TEMPLATE
    conversation = Conversation(engine, GenerateOptions(max_new_tokens=12), system=BRIEFLY)
    for message in ("What is a list?", "And a tuple?", "Thanks."):
        answer = conversation.say(message)
        tokens = [step.token for step in answer]
        ids = heard(conversation)
        with torch.no_grad():
            logits = engine.decoder.forward(torch.tensor(ids[:-1]))
        assert logits.argmax(-1)[-len(tokens) :].tolist() == tokens == ids[-len(tokens) :]


def test_after_a_context_that_was_built_as_a_chat(chatting):
    engine = chatting()
    context = engine.read("A text. " * 4, keep=1.0, policy="recent", chat=True)
    length = context.cache.length
    conversation = Conversation(engine, context=context)
    assert exchange(conversation, "What?", "Why?") == [ANSWER] * 2
    conversation._turns[0] = conversation._turns[0]._replace(message="A text. " * 4 + "What?")
    assert heard(conversation) == template_of(conversation)
    conversation.reset()
    assert context.cache.length == len(context.ids) == length and context.pending == []
    assert exchange(conversation, "Who?") == [ANSWER]


# -- plain text --------------------------------------------------------------------------------------------


def test_plain_text_goes_on(continuing):
    conversation = Conversation(continuing, plain=True)
    assert exchange(conversation, "import A", " or A") == [ANSWER] * 2
    assert continuing.tokenizer.decode(heard(conversation)) == f"<s>import A{ANSWER} or A{ANSWER}</s>"
    assert conversation.context.ids.count(0) == 1 and 1 not in conversation.context.ids
    conversation.reset()
    exchange(conversation, "import A")
    assert continuing.tokenizer.decode(heard(conversation)) == f"<s>import A{ANSWER}</s>"


def test_plain_text_keeps_a_token_that_answer_and_message_share(continuing):
    conversation = Conversation(continuing, GenerateOptions(max_new_tokens=1), plain=True)
    exchange(conversation, "A", ANSWER[0] + "A")
    assert continuing.tokenizer.decode(heard(conversation)) == f"<s>A{ANSWER[0] * 2}A{ANSWER[0]}"


# -- answers that end early --------------------------------------------------------------------------------


def test_a_closed_answer_stays(chatting):
    conversation = Conversation(chatting())
    answer = conversation.say("hello")
    next(answer), next(answer)
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": ANSWER[:2]}
    assert exchange(conversation, "go on") == [ANSWER]
    assert heard(conversation) == template_of(conversation)


def test_the_next_message_ends_an_answer(chatting):
    conversation = Conversation(chatting())
    never_begun = conversation.say("one")
    next(conversation.say("two"))
    assert exchange(conversation, "three") == [ANSWER]
    assert list(never_begun) == []
    assert [m["content"] for m in conversation.messages] == ["two", ANSWER[:1], "three", ANSWER]
    assert heard(conversation) == template_of(conversation)


def test_interrupted_after_a_token_was_read(chatting, monkeypatch):
    """The step has advanced the cache, and its token never arrives."""
    engine = chatting()
    conversation, step = Conversation(engine), engine.new_step()

    class Interrupted:
        calls = 0

        def __call__(self, *arguments):
            step(*arguments)
            raise KeyboardInterrupt

        def learn(self, *arguments):
            step.learn(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "new_step", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            exchange(conversation, "hello")
    assert conversation.messages[-1]["content"] == ANSWER[:1]
    assert exchange(conversation, "go on") == [ANSWER]
    assert heard(conversation) == template_of(conversation)


@pytest.mark.parametrize("earlier", [(), ("hello",)])
def test_interrupted_before_the_answer_began(chatting, monkeypatch, earlier):
    engine = chatting()
    conversation = Conversation(engine)
    exchange(conversation, *earlier)
    before = heard(conversation)

    def interrupt(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            exchange(conversation, "forgotten")
    assert heard(conversation) == before
    assert exchange(conversation, "again") == [ANSWER]
    assert "forgotten" not in str(conversation.messages)
    assert heard(conversation) == template_of(conversation)


# -- limits, figures, files --------------------------------------------------------------------------------


def test_positions_run_out(chatting):
    engine = chatting(max_position_embeddings=64)
    conversation = Conversation(engine)
    exchange(conversation, "hello")
    left = conversation.stats.positions_left
    assert left == 64 - len(heard(conversation))
    before = heard(conversation)
    with pytest.raises(OutOfPositions, match=r"of the model's 64 are left\. Shorten it"):
        conversation.say("x y z " * 20)
    assert heard(conversation) == before
    for _ in range(64):
        try:
            answer = conversation.say("hi")
        except OutOfPositions:
            break
        assert answer.text in ANSWER
    assert conversation.stats.positions_left < left
    conversation.reset()
    assert exchange(conversation, "hello") == [ANSWER]
    assert conversation.stats.positions_left == left


def test_an_answer_that_uses_the_last_position(chatting):
    engine = chatting()
    few = len(engine.prompts.prompt_ids("hello", chat=True)) + 2
    conversation = Conversation(chatting(max_position_embeddings=few))
    answer = conversation.say("hello")
    assert (answer.text, answer.stats.stopped_by) == (ANSWER[:2], "positions")
    assert conversation.stats.positions_left == 0
    with pytest.raises(OutOfPositions, match="begin a new conversation"):
        conversation.say("?")


def test_stats(tiny_overlay):
    engine = open_engine(tiny_overlay, target_bits=3.5)
    conversation = Conversation(engine, GenerateOptions(max_new_tokens=8), plain=True)
    empty = conversation.stats
    assert (empty.answers, empty.tokens, empty.tpot_ms, empty.effective_bits) == (0, 0, None, None)
    assert (empty.kv_bytes, empty.positions_left, empty.positions) == (0, 512, 512)
    answers = [conversation.say("import os"), conversation.say("\n")]
    exchange(conversation, "import sys")  # ends the others: they have not begun
    engine.set_target(bits=2)
    exchange(conversation, "x")
    stats = conversation.stats
    assert [a.steps for a in answers] == [[], []]
    steps = [s for turn in conversation._turns for s in turn.answer.steps[1:]]
    assert (stats.answers, stats.tokens, len(steps)) == (2, 16, 14)
    assert stats.effective_bits == pytest.approx(sum(s.effective_bits for s in steps) / 14, abs=1e-4)
    assert stats.weight_bytes_per_token == pytest.approx(sum(s.weight_bytes for s in steps) / 14, abs=1)
    assert min(s.ms for s in steps) <= stats.tpot_ms <= max(s.ms for s in steps)
    assert stats.kv_bytes == conversation.context.cache.nbytes > 0
    assert stats.positions_left == 512 - len(heard(conversation))


def test_a_plain_checkpoint_has_no_bits(chatting):
    conversation = Conversation(chatting())
    exchange(conversation, "hello")
    assert conversation.stats.effective_bits is None and conversation.stats.weight_bytes_per_token is None


def test_saved_messages(chatting, tmp_path):
    conversation = Conversation(chatting(), system=BRIEFLY)
    exchange(conversation, "naïve?\nyes")
    conversation.save(tmp_path / "chat.jsonl")
    lines = (tmp_path / "chat.jsonl").read_text("utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == conversation.messages == [
        {"role": "system", "content": BRIEFLY},
        {"role": "user", "content": "naïve?\nyes"},
        {"role": "assistant", "content": ANSWER},
    ]  # fmt: skip
    assert "naïve" in lines[1]
    with pytest.raises(InputError, match="cannot be written"):
        conversation.save(tmp_path / "missing" / "chat.jsonl")


def test_what_cannot_be(chatting, continuing):
    engine = chatting()
    with pytest.raises(InputError, match=r"has no chat template\. Give --plain"):
        Conversation(continuing)
    with pytest.raises(InputError, match="plain text has none"):
        Conversation(engine, plain=True, system=BRIEFLY)
    unframed, chat = (engine.read("A text. " * 4, policy="recent", chat=c) for c in (False, True))
    with pytest.raises(InputError, match="a context has begun"):
        Conversation(engine, system=BRIEFLY, context=chat)
    with pytest.raises(InputError, match=r"built as a chat\. Leave out --plain"):
        Conversation(engine, plain=True, context=chat)
    with pytest.raises(InputError, match=r"not built as a chat\. Give --plain"):
        Conversation(engine, context=unframed)
    with pytest.raises(InputError, match="the system text is not UTF-8"):
        Conversation(engine, system="\udcff")
    for message in ("", "\udcff"):
        with pytest.raises(InputError, match="the message is"):
            Conversation(engine).say(message)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no system text here') }}", "no system text here"),
        # The system text stands in the last of the user's messages.
        (
            "{% for m in messages[1:] %}[{{ m.role }}]{% if loop.last %}{{ messages[0].content }}{% endif %}"
            "{{ m.content }}{% endfor %}>",
            "surrounds a first message otherwise",
        ),
    ],
)
def test_templates_that_have_no_place_for_a_system_text(chatting, template, says):
    engine = chatting()
    engine.tokenizer.chat_template = template
    with pytest.raises(InputError, match=says):
        Conversation(engine, system=BRIEFLY)
