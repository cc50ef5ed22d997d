"""The entry point of the `dpllm` command: one clear line for bad input, and the exit code.

Exit codes: 0, 2 for bad input, 130 for Ctrl-C.
"""

from __future__ import annotations

import errno
import signal
import sys
from types import FrameType

import typer

from dpllm.base.errors import InputError
from dpllm.commands.app import app

# isort: off
from dpllm.commands import quantize, calibrate, inspect  # noqa: F401  # each registers itself, in the order of --help
from dpllm.commands import generate, chat, evaluate, context, demo, report  # noqa: F401
from dpllm.commands import profile, plan, doctor, bench  # noqa: F401

# isort: on
from dpllm.commands.streams import prepare_streams, settle_stdout

_FULL, _CLOSED = "Free space or choose another place.", "Check its permissions, or choose another place."
_WAYS_OUT = {
    errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _FULL,
    errno.EACCES: _CLOSED, errno.EPERM: _CLOSED, errno.EROFS: _CLOSED,
}  # fmt: skip


class _Interrupt:
    """Notes that Ctrl-C was pressed before KeyboardInterrupt is raised: a library that is interrupted in the middle of
    a call may take it for an error of its own and raise another exception."""

    def __init__(self) -> None:
        self.came = False
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else someone has other plans
            signal.signal(signal.SIGINT, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        signal.default_int_handler(number, frame)


def main() -> None:
    """Runs the app. Bad input is printed as one line, with exit code 2."""
    interrupt = _Interrupt()
    prepare_streams()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except (Exception, KeyboardInterrupt) as e:
        if interrupt.came or isinstance(e, KeyboardInterrupt | typer.Abort):
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
        message = _explained(e)
        settle_stdout()
        if isinstance(e, BrokenPipeError):  # the reader has gone, and knows why
            sys.exit(1)
        if message is None:
            raise
        _fail(message)


def _explained(e: BaseException) -> str | None:
    """A line about an error that the user can mend; None for an error of the program."""
    if isinstance(e, InputError):
        return str(e)
    if (
        isinstance(e, OSError) and e.errno is not None
    ):  # libraries raise some without, for reasons of their own
        where = e.filename or "a file or stream"
        return f"{where} cannot be read or written: {e.strerror}. {_WAYS_OUT.get(e.errno, 'Check it and try again.')}"
    if any(t.__name__ == "ClickException" for t in type(e).__mro__):
        return e.format_message()  # type: ignore[attr-defined]
    return None


def _fail(message: str) -> None:
    if message:  # empty where no command was given: the help was shown
        print(f"dpllm: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)
