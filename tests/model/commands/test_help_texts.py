"""Every help text is whole: sentences end, and narrow panels show all of their words."""

from __future__ import annotations

import re

import pytest
from typer.main import get_command

from dpllm.commands.main import app


def commands(command, name: str = "") -> dict:
    """Every command and group below: name -> command."""
    below = getattr(command, "commands", {})
    found = {name: command}
    for word, child in below.items():
        found |= commands(child, f"{name} {word}".strip())
    return found


COMMANDS = commands(get_command(app))


def words(text: str) -> str:
    """The text without frames, markup and spaces, as lines may break anywhere."""
    return re.sub(r"[│╭╮╰╯─\s]|\[/?bold\]", "", text)


def sentences(command) -> list[str]:
    """The paragraphs of a command's help, and the help of its arguments and options."""
    options = [p.help for p in command.params if getattr(p, "help", None)]
    return [*command.help.split("\n\n"), *options]


@pytest.mark.parametrize("name", COMMANDS)
def test_sentences_end(name):
    for text in sentences(COMMANDS[name]):
        # An example ends as its command does, so that the whole of it can be copied.
        assert text.rstrip().endswith(".") or re.search(r"(^Example|own calibration): dpllm ", text), text
    for option in COMMANDS[name].params:
        assert option.name in ("install_completion", "show_completion") or option.help, option.name


@pytest.mark.parametrize("name", COMMANDS)
def test_panels_of_eighty_columns_cut_nothing(ok, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    shown = ok(*name.split(), "--help").out
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    flat = words(shown)
    for text in COMMANDS[name].help.split("\n\n"):
        assert words(text) in flat, text
    for child in getattr(COMMANDS[name], "commands", {}).values():
        assert words(child.help.split("\n\n")[0]) in flat, child.name
    for option in COMMANDS[name].params:
        if option.help:
            assert any(
                words(option.help) in words(cell) for cell in cells(shown.splitlines(), option.help)
            ), option


def cells(lines: list[str], text: str) -> list[str]:
    """Cells of panels that begin as the text does: each is what stands from its column on, in a dozen lines."""
    begin = " ".join(text.split()[:2])
    places = [(number, line.find(f"  {begin}")) for number, line in enumerate(lines)]
    return ["".join(line[at:] for line in lines[number : number + 12]) for number, at in places if at > 0]
