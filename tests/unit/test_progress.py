"""Progress as plain lines: when a line is written, and what it says."""

from __future__ import annotations

import pytest

from dpllm.base.progress import ProgressLines
from dpllm.base.quantities import duration


class Clocked:
    """Progress lines over a clock that the test moves."""

    def __init__(self):
        self.now, self.lines = 0.0, []
        self.progress = ProgressLines(self.lines.append, clock=lambda: self.now)

    def at(self, now: float, stage: str, done: int, total: int) -> list[str]:
        """The lines that a report at this time brings."""
        self.now, before = now, len(self.lines)
        self.progress(stage, done, total)
        return self.lines[before:]


def test_a_quick_stage_says_nothing():
    clocked = Clocked()
    for step in range(101):
        clocked.at(step / 11, "quantize", step, 100)
    assert clocked.lines == []


def test_a_line_needs_ten_seconds_and_another_percent():
    clocked = Clocked()
    clocked.at(0, "quantize", 0, 1000)
    assert clocked.at(9.9, "quantize", 110, 1000) == []
    assert clocked.at(10, "quantize", 120, 1000) == ["quantize: 12%, 1 min 13 s left"]
    assert clocked.at(15, "quantize", 200, 1000) == []
    assert clocked.at(20, "quantize", 200, 1000) == ["quantize: 20%, 1 min 20 s left"]
    assert clocked.at(40, "quantize", 209, 1000) == []
    assert clocked.at(41, "quantize", 210, 1000) == ["quantize: 21%, 2 min 34 s left"]
    assert clocked.at(42, "quantize", 1000, 1000) == ["quantize: 100%, 42 s in all"]
    assert clocked.at(99, "quantize", 1000, 1000) == []


def test_a_slow_stage_of_one_step_says_its_end():
    clocked = Clocked()
    assert clocked.at(5, "reading", 1, 1) == []
    assert clocked.at(16, "timing", 1, 1) == ["timing: 100%, 11 s in all"]


def test_steps_of_an_earlier_run_do_not_count_for_the_pace():
    clocked = Clocked()
    clocked.at(0, "quantize", 50, 100)
    assert clocked.at(10, "quantize", 51, 100) == ["quantize: 51%, 8 min 10 s left"]


def test_a_stage_that_begins_once_more():
    clocked = Clocked()
    clocked.at(0, "reading", 10, 10)
    clocked.at(1, "reading", 0, 10)
    assert clocked.at(11, "reading", 5, 10) == ["reading: 50%, 10 s left"]


@pytest.mark.parametrize(("seconds", "words"), [
    (0.4, "0 s"), (59.6, "1 min 0 s"), (80, "1 min 20 s"), (3599.9, "1 h 0 min"), (7500, "2 h 5 min"),
])  # fmt: skip
def test_durations(seconds, words):
    assert duration(seconds) == words
