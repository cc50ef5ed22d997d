"""How long-running work reports what it has done, and plain lines of it for logs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from dpllm.base.quantities import duration

Progress = Callable[[str, int, int], None]  # (stage, steps done, steps in all)
PAUSE_SECONDS = 10.0  # between two lines of a stage; a stage that takes less says nothing


def no_progress(stage: str, done: int, total: int) -> None:
    """Reports nothing: the default of functions that take a `Progress`."""


@dataclass
class _Stage:
    began: float  # when its first step began, in seconds of the clock
    first: tuple[
        float, int
    ]  # time and steps done of its first report: steps of an earlier run say nothing of the pace
    spoke: float
    done: int
    percent: int = 0
    printed: bool = False

    def left(self, now: float, total: int) -> str:
        """The time that the remaining steps take at the pace so far; empty while there is no pace."""
        began, before = self.first
        if self.done <= before or now <= began:
            return ""
        return f", {duration((now - began) / (self.done - before) * (total - self.done))} left"


class ProgressLines:
    """A `Progress` that writes a line now and then, for places that cannot show bars.

    A stage gets a line when its whole percent has grown and PAUSE_SECONDS have passed since its last one, and one at
    its end unless it was quick.

    write: takes a line without its line break. clock: returns seconds.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._write, self._clock = write, clock
        self._stages: dict[str, _Stage] = {}
        self._reported = clock()  # when any stage reported last: the next one began then

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Takes the number of steps that a stage has done, of the steps that it has in all."""
        now = self._clock()
        state = self._stages.get(stage)
        if state is None or done < state.done:  # a stage that goes back begins once more
            state = self._stages[stage] = _Stage(self._reported, (now, done), self._reported, done)
        self._reported, state.done = now, done
        percent = 100 * done // total if total else 100
        if percent <= state.percent:
            return
        if percent >= 100:
            if state.printed or now - state.began > PAUSE_SECONDS:
                self._write(f"{stage}: 100%, {duration(now - state.began)} in all")
        elif now - state.spoke >= PAUSE_SECONDS:
            self._write(f"{stage}: {percent}%{state.left(now, total)}")
            state.spoke, state.printed = now, True
        else:
            return
        state.percent = percent
