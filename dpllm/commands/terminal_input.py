"""What a user writes at a terminal or through a pipe: lines, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Protocol

from dpllm.base.plain_text import without_byte_order_mark
from dpllm.commands.common import note
from dpllm.commands.streams import read_stdin_line


class Lines(Protocol):
    """Where the messages come from."""

    def read(self) -> str | None:
        """Returns the next line without its end; None where the user leaves."""
        ...


def lines_of_user() -> Lines:
    """Lines with editing and history where a terminal is there for them, else plain ones."""
    if sys.stdin.isatty() and sys.stderr.isatty():
        return EditedLines()
    return PlainLines()


class PlainLines:
    """Lines of standard input."""

    def __init__(self) -> None:
        self._first = True

    def read(self) -> str | None:
        """See Lines. Raises InputError where standard input is closed, cannot be read, or is not UTF-8 text."""
        line = read_stdin_line()
        line, self._first = without_byte_order_mark(line) if self._first else line, False
        return line.rstrip("\r\n") if line else None


class EditedLines:
    """Lines that are edited in the terminal. The prompt is shown on stderr, because stdout is for answers."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import create_output

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(
            "> ", output=create_output(stdout=sys.stderr), key_bindings=keys
        )

    def read(self) -> str | None:
        """See Lines. Ctrl-C empties the line; Ctrl-D, or Ctrl-C once more at an empty prompt, leaves."""
        warned = False
        while True:
            try:
                return self._session.prompt()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if warned and not self._session.default_buffer.text:
                    return None
                note("Ctrl-C once more, or Ctrl-D, leaves.")
                warned = True


class Interrupts:
    """Catches Ctrl-C while the model is at work.

    It is raised at once as KeyboardInterrupt, unless `gently` is set: then the first Ctrl-C only sets `came`, so that a
    token is finished first. Code that is interrupted may turn KeyboardInterrupt into another exception, so look at
    `came` after any.
    """

    def __init__(self) -> None:
        self.came = self.gently = False

    def __enter__(self) -> Interrupts:
        self._before = signal.getsignal(signal.SIGINT)
        if callable(self._before):  # else whoever started the program wants the signal left alone
            signal.signal(signal.SIGINT, self._on)
        return self

    def __exit__(self, *error: object) -> None:
        if callable(self._before):
            signal.signal(signal.SIGINT, self._before)

    def _on(self, number: int, frame: FrameType | None) -> None:
        wait = self.gently and not self.came
        self.came = True
        if not wait:
            raise KeyboardInterrupt
