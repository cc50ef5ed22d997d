"""Reads documentation pages: their code blocks, the commands in them, and the code spans of their text."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PLACEHOLDER = re.compile(r"(?<![\w.])[A-Z_]{2,}\b|\[")  # MODEL, [TEXT]


@dataclass(frozen=True)
class Block:
    """A fenced block of code: the language that it names, and the heading above it."""

    language: str
    text: str
    heading: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    inside = [range(*m.span()) for m in found]
    headings = [
        m for m in re.finditer(r"^#+ (.*)$", text, re.M) if not any(m.start() in block for block in inside)
    ]
    return [Block(m[1], m[2], [h[1] for h in headings if h.start() < m.start()][-1]) for m in found]


def block_commands(page: str) -> list[str]:
    """Every command line of the page's `sh` and `console` blocks, without its comment.

    In a `console` block a command follows `$ `, and the other lines are its output.
    """
    found = []
    for block in blocks(page):
        for line in block.text.splitlines():
            if block.language == "console" and line.startswith("$ "):
                found.append(line[2:])
            elif block.language == "sh" and line.strip():
                found.append(line)
    return [re.sub(r"\s+#.*", "", line).strip() for line in found]


def span_commands(page: str) -> list[str]:
    """Every command of dpllm that stands in back quotes in the text of a page, outside its blocks."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return [span for span in spans if span.startswith("dpllm ")]


def words(command: str) -> list[str]:
    """The words of a command, as a shell splits them. A command needs no other service of a shell."""
    assert not re.search(r"[|&;<>$`*\\]", command), f"{command}: only plain words are expected"
    return shlex.split(command)


def is_synopsis(command: str) -> bool:
    """Whether a command names an argument, as MODEL or [TEXT], instead of giving it."""
    return bool(PLACEHOLDER.search(command))
