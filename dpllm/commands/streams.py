"""Standard input, output and error that may be closed, full, or a pipe whose other end is gone."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO, cast

from dpllm.base.errors import InputError
from dpllm.base.plain_text import without_byte_order_mark


class ClosedStream(io.TextIOBase):
    """A standard stream that was closed before the program began. Raises InputError when it is used."""

    def __init__(self, name: str):
        self._name = name

    def _refuse(self, *_: Any) -> NoReturn:
        raise InputError(f"standard {self._name} is closed. Open it, or send it to a file or /dev/null.")

    read = readline = write = _refuse


class NamedStream:
    """Standard output. Its errors name it, because those of the system name no file."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text. Raises OSError whose file is 'standard output'."""
        with self._handling():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is left of the text. Raises OSError as `write` does."""
        with self._handling():
            self._stream.flush()

    @contextmanager
    def _handling(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            e.filename = "standard output"
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class TolerantStream(NamedStream):
    """Standard error, which drops what cannot be written: a full disk below a log must not end hours of work."""

    @contextmanager
    def _handling(self) -> Iterator[None]:
        with suppress(OSError):
            yield


def prepare_streams() -> None:
    """Puts something in place of closed streams, names standard output, and makes standard error tolerant.

    The numbers 0 to 2 are taken, or the next file that is opened would get one of them, and what a library prints
    would be written into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stdin is None:
        sys.stdin = cast(TextIO, ClosedStream("input"))
    if sys.stdout is None:
        sys.stdout = cast(TextIO, ClosedStream("output"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what this terminal cannot show
    if not isinstance(sys.stdout, (ClosedStream, NamedStream)):
        sys.stdout = cast(TextIO, NamedStream(sys.stdout))
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for the rest of the process)
    elif not isinstance(sys.stderr, TolerantStream):
        sys.stderr = cast(TextIO, TolerantStream(sys.stderr))


def check_stdout() -> None:
    """Raises InputError where standard output is closed, before a command works for an answer that nobody can read."""
    if isinstance(sys.stdout, ClosedStream):
        sys.stdout.write("")


def settle_stdout() -> None:
    """Writes what was printed. Where that fails, drops it, so that Python does not fail once more when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_stdin() -> str:
    """All of standard input, without a byte order mark.

    Raises InputError where it is closed, cannot be read, or is not UTF-8 text.
    """
    return without_byte_order_mark(_from_stdin(lambda: sys.stdin.read()))


def read_stdin_line() -> str:
    """The next line of standard input with its end; '' after the last. Raises InputError as `read_stdin` does."""
    return _from_stdin(lambda: sys.stdin.readline())


def _from_stdin(read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError as e:
        raise InputError(f"standard input is not UTF-8 text ({e}).") from None
    except OSError as e:
        raise InputError(f"standard input cannot be read: {e.strerror or e}. Give text through it.") from None
