"""Progress on stderr: lines in logs, bars in terminals."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dpllm.base import progress
from dpllm.commands import common


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(monkeypatch, stream: io.StringIO) -> str:
    monkeypatch.setattr(common.sys, "stderr", stream)
    monkeypatch.setattr(common, "stderr", Console(stderr=True, highlight=False, emoji=False))
    monkeypatch.setattr(progress, "PAUSE_SECONDS", 0.0)
    with common.stage_bars() as tell:
        tell("quantize", 0, 4)
        tell("quantize", 2, 4)
    return stream.getvalue()


@pytest.mark.parametrize(("stream", "variables"), [
    (io.StringIO, {}), (io.StringIO, {"FORCE_COLOR": "1"}), (Screen, {"TERM": "dumb"}),
])  # fmt: skip
def test_lines_where_there_are_no_bars(monkeypatch, stream, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = shown(monkeypatch, stream())
    assert text.startswith("quantize: 50%, 0 s left\n") and "\x1b" not in text and "━" not in text


def test_bars_in_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "2/4" in shown(monkeypatch, Screen())


def test_commands_write_lines_into_a_log(dpllm, tiny_overlay, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE_SECONDS", 0.0)
    text = dpllm("eval", "--overlay", tiny_overlay, "--context", "64", "--target-bits", "4", "--policy", "uniform",
                 "--max-tokens", "1")  # fmt: skip
    assert "uniform 4: 100%, 0 s in all" in text.err, text
