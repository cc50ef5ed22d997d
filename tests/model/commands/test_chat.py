"""`dpllm chat` through a pipe: answers, commands, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<pad>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<pad>assistant\n{% endif %}"
)
FIGURES = r"\[20 tokens · \d\.\d\d bits · \d+\.\d ms/token\]"


@pytest.fixture
def say(ok, tiny_overlay):
    """Runs a chat of plain text with these lines, with answers of 20 tokens."""

    def run(*lines: str, options: tuple = ("--plain",), overlay: Path = tiny_overlay):
        fixed = ("chat", "--overlay", overlay, "--max-new-tokens", 20)
        return ok(*fixed, *options, stdin="".join(f"{line}\n" for line in lines))

    return run


@pytest.fixture
def framed(overlay) -> Path:
    """A copy of the tiny overlay with a chat template."""
    (overlay / "chat_template.jinja").write_text(TEMPLATE)
    return overlay


# -- answers -----------------------------------------------------------------------------------------------


def test_answers_on_stdout_and_figures_on_stderr(say, ok, tiny_overlay):
    said = say("import os")
    alone = ok("generate", "import os", "--overlay", tiny_overlay, "--max-new-tokens", 20)
    assert said.out == alone.out
    assert re.fullmatch(FIGURES + "\n", said.err), said.err
    assert "\x1b" not in said.err


def test_the_conversation_goes_on(say):
    both = say("import os", "import sys").out
    assert both.startswith(first := say("import os").out)
    assert both.removeprefix(first) != say("import sys").out
    assert say("import os", "", "  ", "import sys").out == both, "empty lines are no messages"


def test_a_byte_order_mark_is_not_part_of_the_first_message(say):
    assert say("\ufeffimport os", "import sys").out == say("import os", "import sys").out


def test_leading_spaces_are_part_of_plain_text_alone(say, framed):
    def answers(line: str, **more) -> list[str]:
        result = say(line, "/save " + str(framed / f"{len(list(framed.iterdir()))}.jsonl"), **more)
        saved = Path(re.findall(r"(\S+\.jsonl): 2 messages", result.err)[0])
        return [json.loads(text)["content"] for text in saved.read_text().splitlines()]

    assert answers("    return")[0] == "    return"
    assert answers("    return ", options=(), overlay=framed)[0] == "return"


def test_json_for_each_answer(say):
    result = say("import os", "/stats", "import sys", options=("--plain", "--json", "--target-bits", "3.25"))
    first, second = map(json.loads, result.out.splitlines())
    assert (first["new_tokens"], first["policy"], first["target"]) == (20, "rate-distortion", {"bits": 3.25})
    assert first["interrupted"] is second["interrupted"] is False
    assert (
        first["text"] + "\n" + second["text"] + "\n"
        == say("import os", "import sys", options=("--plain", "--target-bits", "3.25")).out
    )
    assert second["positions_left"] < first["positions_left"] < 512 - 20
    assert "1 answer · 20 tokens" in result.err and "ms/token]" not in result.err


def test_a_chat_template(say, framed, tmp_path):
    options = ("--system", "Be brief.")
    say("hello", f"/save {tmp_path / 'chat.jsonl'}", options=options, overlay=framed)
    messages = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert [m["content"] for m in messages[:2]] == ["Be brief.", "hello"]
    assert say("hello", options=options, overlay=framed).out == messages[2]["content"] + "\n"
    assert say("hello", options=(), overlay=framed).out != messages[2]["content"] + "\n"


def test_about_a_context(ok, say, framed, tiny_overlay, tmp_path):
    (tmp_path / "notes.txt").write_text("def f(x):\n    return x\n" * 8)
    for name, more in (("chat", ("--chat", "--overlay", framed)), ("plain", ("--overlay", tiny_overlay))):
        build = ("context", "build", tmp_path / "notes.txt", "--kv-policy", "recent", "-o", tmp_path / name)
        ok(*build, *more)
    asked = say("def g(x):", options=("--plain", "--context", str(tmp_path / "plain")))
    question = ("generate", "def g(x):", "--context", tmp_path / "plain", "--max-new-tokens", 20)
    assert asked.out == ok(*question, "--overlay", tiny_overlay).out
    chat = ("--context", str(tmp_path / "chat"))
    once = say("What?", options=chat, overlay=framed).out
    again = say("What?", "/reset", "What?", options=chat, overlay=framed)
    assert again.out == once * 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), r"no chat template\. Give --plain .*'dpllm generate'"),
        (("--plain", "--system", "x"), "plain text has none"),
        (("--plain", "--bits", "3", "--target-bits", "3"), "exclude each other"),
        (("--plain", "--tpot-ms", "30", "--bits", "3"), "--tpot-ms chooses the bits itself"),
        (("--plain", "--temperature", "-1"), "temperature"),
        (("--plain", "--context", "missing"), "not a saved context"),
    ],
)
def test_refused(refused, tiny_overlay, options, says):
    refused("chat", "--overlay", tiny_overlay, *options, stdin="hello\n", says=says)


# -- commands ----------------------------------------------------------------------------------------------


def test_targets_move_between_answers(say):
    result = say("a", "/bits 2", "b", "/target 4.5", "c", "/tpot 1000", "d")
    bits = [float(found) for found in re.findall(r"\[20 tokens · (\d\.\d\d) bits", result.err)]
    assert bits[1] == 2 and bits[2] > 3.5 and bits[3] > 5
    assert "2 bits everywhere" in result.err and "4.5 bits on average" in result.err
    assert "1000 ms per token" in result.err


def test_options_choose_the_first_target(say):
    assert "· 3.00 bits ·" in say("a", options=("--plain", "--bits", "3")).err
    held = say("a", options=("--plain", "--tpot-ms", "1000")).err
    assert float(re.findall(r"(\d\.\d\d) bits", held)[0]) > 5
    bound = say("a", options=("--plain", "--guarantee", "--target-bits", "2.5")).err
    assert float(re.findall(r"(\d\.\d\d) bits", bound)[0]) <= 2.55


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/nope", "unknown command /nope. /help lists the commands."),
        ("/bits", "/bits needs an argument. Write, for example, /bits 3."),
        ("/bits x", "/bits x is not a whole number. Write, for example, /bits 3."),
        ("/bits 2.5", "/bits 2.5 is not a whole number. Write, for example, /bits 3."),
        ("/bits 9", "target 9 bits is impossible"),
        ("/target nan", "/target nan is not a number. Write, for example, /target 3.25."),
        ("/target 12", "target 12 bits is impossible"),
        ("/tpot x", "/tpot x is not a number. Write, for example, /tpot 30."),
        ("/tpot -5", "-5 ms per token cannot be kept"),
        ("/stats now", "/stats takes no argument. Write /stats alone."),
        ("/save", "/save needs an argument. Write, for example, /save FILE."),
        ("/save x.jsonl", "nothing has been said yet"),
    ],
)
def test_a_wrong_command_is_one_line_and_the_chat_goes_on(say, line, says):
    before, after = say(line, "a"), say("a")
    assert before.out == after.out
    lines = [text for text in before.err.splitlines() if "timing" not in text]
    assert lines[0].startswith(says) and len(lines) == 2, before.err


def test_what_only_looks_like_a_command(say):
    assert re.fullmatch(FIGURES + "\n", say("// a comment").err)


def test_stats(say):
    shown = say("/stats", "import os", "/stats").err.splitlines()
    assert shown[0] == "[0 answers · 0 tokens · 0.00 MB of cache · 512 of 512 positions left]"
    figures = r"1 answer · 20 tokens · \d\.\d\d bits · \d+\.\d ms/token · \d\.\d\d MB of weights a token"
    assert re.fullmatch(rf"\[{figures} · \d\.\d\d MB of cache · \d+ of 512 positions left\]", shown[2])


def test_help_names_every_command(say):
    shown = say("/help").err
    for name in ("/bits 3", "/target 3.25", "/tpot 30", "/stats", "/reset", "/save FILE", "/help", "/quit"):
        assert re.search(rf"^{name} +[A-Z].*\.$", shown, re.M), name


def test_reset_and_quit(say):
    once = say("import os").out
    assert say("import os", "/reset", "import os").out == once * 2
    assert say("import os", "/quit", "import os").out == once


def test_save_overwrites_only_its_own_file(say, tmp_path):
    mine, other = tmp_path / "chat.jsonl", tmp_path / "other.jsonl"
    other.write_text("mine")
    result = say("a", f"/save {mine}", "b", f"/save {mine}", f"/save {other}", f"/save {tmp_path}")
    assert len(mine.read_text().splitlines()) == 4 and other.read_text() == "mine"
    assert f"{mine}: 2 messages" in result.err and f"{mine}: 4 messages" in result.err
    assert result.err.count("exists already. Choose another name.") == 2


def test_positions_run_out(say):
    long = "x = 1; " * 40
    result = say(long, long, "x", "/reset", "x", options=("--plain", "--max-new-tokens", "500"))
    lines = result.err.splitlines()
    assert lines.pop(1).startswith("the text ends here because the model's 512 positions are used up")
    assert "positions are left. /reset begins a new conversation." in lines[1]
    assert all(
        line.startswith("the message needs") and "/reset begins a new one." in line for line in lines[2:4]
    )
    assert lines[4] == "A new conversation begins." and re.match(r"\[\d+ tokens", lines[5])
