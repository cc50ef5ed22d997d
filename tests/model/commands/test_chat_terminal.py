"""`dpllm chat` at a real terminal: the prompt, slash commands, Ctrl-C, the end of input, another window size."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest

if sys.platform == "win32":
    pytest.skip("there are no pseudo-terminals here", allow_module_level=True)

from terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, PROMPT, UP, Terminal

LONG = 3000  # tokens of an answer that is stopped long before
SHORT = 20


@pytest.fixture
def chat(tmp_path, monkeypatch):
    """A chat with the reference model as plain text, once its first prompt is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    terminals = []

    def begin(*options: object, tokens: int = SHORT) -> Terminal:
        terminal = Terminal("chat", "--plain", "--max-new-tokens", tokens, *options)
        terminals.append(terminal)
        assert "/help lists the commands; Ctrl-C ends an answer; Ctrl-D leaves." in terminal.until(PROMPT)
        return terminal

    yield begin
    for terminal in terminals:
        terminal.__exit__()


def say(terminal: Terminal, message: str) -> str:
    """What is shown between a message and the figures of its answer, both included."""
    terminal.type(message.encode() + ENTER)
    shown = terminal.until("ms/token]")
    terminal.until(PROMPT)
    return shown


def order(terminal: Terminal, command: str, shown: str) -> str:
    terminal.type(command.encode() + ENTER)
    text = terminal.until(shown)
    terminal.until(PROMPT)
    return text


def saved(terminal: Terminal, path) -> list[dict]:
    order(terminal, f"/save {path}", "messages")
    return [json.loads(line) for line in path.read_text().splitlines()]


def leave(terminal: Terminal) -> str:
    terminal.type(CTRL_D)
    shown = terminal.end()
    assert terminal.code == 0 and "Traceback" not in shown
    return shown


def test_answers_and_commands(chat, ok, tmp_path):
    """What a chat through a pipe does, at a terminal: the answers are the same."""
    terminal = chat()
    assert re.search(r"\[20 tokens · 3\.\d\d bits", say(terminal, "import os"))
    order(terminal, "/bits 2", "2 bits everywhere, from the next token on.")
    assert "· 2.00 bits ·" in say(terminal, "import sys")
    assert "2 answers · 40 tokens" in order(terminal, "/stats", "positions left]")
    assert order(terminal, "/help", "begins a new line of a message.").count("\n/") >= 7
    order(terminal, "/nope", "unknown command /nope. /help lists the commands.")
    messages = saved(terminal, tmp_path / "chat.jsonl")
    leave(terminal)
    lines = ["import os", "/bits 2", "import sys"]
    piped = ok("chat", "--plain", "--max-new-tokens", SHORT, stdin="".join(f"{line}\n" for line in lines))
    assert [m["content"] for m in messages[::2]] == [lines[0], lines[2]]
    assert "".join(m["content"] + "\n" for m in messages[1::2]) == piped.out


def stop_answer(terminal: Terminal, message: str) -> None:
    """Sends a message, and stops the answer with Ctrl-C after some lines of it."""
    terminal.type(message.encode() + ENTER)
    for _ in range(40):  # more lines than the editor draws
        terminal.until("\r\n")
    terminal.interrupt()
    terminal.until("[stopped · ")
    tokens = int(re.findall(r"(\d+) tokens", terminal.until("ms/token]"))[0])
    assert 1 < tokens < LONG
    terminal.until(PROMPT)


def test_ctrl_c_stops_an_answer_and_keeps_it(chat, tmp_path):
    """The history has what was shown, and the next answer goes on from there."""
    terminal = chat(tokens=LONG)
    stop_answer(terminal, "import os")
    before = saved(terminal, tmp_path / "one.jsonl")
    assert [m["role"] for m in before] == ["user", "assistant"]
    assert before[1]["content"].count("\n") >= 10, "the lines that were shown are kept"
    stop_answer(terminal, "import sys")
    after = saved(terminal, tmp_path / "two.jsonl")
    assert after[:2] == before
    assert [m["role"] for m in after[2:]] == ["user", "assistant"]
    assert "2 answers" in order(terminal, "/stats", "positions left]")
    leave(terminal)


def test_ctrl_c_at_the_prompt_empties_the_line_and_leaves_at_the_second(chat):
    terminal = chat()
    terminal.type("never said")
    terminal.until("never said")
    terminal.type(CTRL_C)
    terminal.until("Ctrl-C once more, or Ctrl-D, leaves.")
    terminal.until(PROMPT)
    assert "1 answer " in say(terminal, "import os") + order(terminal, "/stats", "positions left]")
    terminal.type(CTRL_C)
    terminal.until("Ctrl-C once more, or Ctrl-D, leaves.")
    terminal.until(PROMPT)
    terminal.type(CTRL_C)
    terminal.end()
    assert terminal.code == 0


def test_ctrl_d_and_quit_leave(chat):
    first, second = chat(), chat()
    leave(first)
    second.type(b"/quit" + ENTER)
    second.end()
    assert second.code == 0


def test_a_message_of_two_lines_and_one_from_the_history(chat, tmp_path):
    terminal = chat()
    terminal.type(b"def f(x):" + ALT_ENTER + b"    return" + ENTER)
    terminal.until("ms/token]")
    terminal.until(PROMPT)
    order(terminal, "/reset", "A new conversation begins.")
    terminal.type(UP + UP + ENTER)
    terminal.until("ms/token]")
    terminal.until(PROMPT)
    assert saved(terminal, tmp_path / "chat.jsonl")[0]["content"] == "def f(x):\n    return"
    leave(terminal)


def test_the_window_changes_its_size(chat, tmp_path):
    """At the prompt, where a long line is shown again, and during an answer."""
    terminal = chat(tokens=200)
    message = "alpha = [" + ", ".join(str(i) for i in range(20))
    terminal.type(message)
    terminal.until("19")
    terminal.resize(12, 30)
    terminal.type("]" + "\r")
    terminal.until("\n")
    terminal.resize(40, 100)
    terminal.until("ms/token]")
    terminal.until(PROMPT)
    assert saved(terminal, tmp_path / "chat.jsonl")[0]["content"] == message + "]"
    leave(terminal)


def test_the_terminal_goes_away(chat):
    """Its window is closed: the program ends by itself."""
    terminal = chat()
    os.close(terminal._fd)
    terminal._fd = os.open(os.devnull, os.O_RDONLY)
    _, status = os.waitpid(terminal.pid, 0)
    terminal.code = os.waitstatus_to_exitcode(status)
    assert terminal.code != 1, "no traceback"
