"""The `dpllm` command: arguments, one clear line for bad input, nothing else.

Each command's work is a function in dpllm/commands/. Exit codes: 0, 2 for bad input, 130 for Ctrl-C.
"""

from __future__ import annotations

import errno
import io
import sys

import typer

from dpllm.cli.app import app
from dpllm.kernels.errors import InputError

# isort: off
from dpllm.cli import store, text, machine  # noqa: F401  # they register their commands, in the order of --help

# isort: on


def main() -> None:
    """Entry point: runs the app, turns bad input into one line and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what this terminal cannot show
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except InputError as e:
        _fail(str(e))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        _fail(f"{e.strerror}: {e.filename or 'while writing'}. Free space or choose another place.")
    except typer.Abort:
        sys.exit(130)
    except Exception as e:
        if not _is_usage_error(e):
            raise
        if not (message := e.format_message()):  # type: ignore[attr-defined]
            sys.exit(2)  # no command: the help was shown
        _fail(message)


def _is_usage_error(e: Exception) -> bool:
    return any(t.__name__ == "ClickException" for t in type(e).__mro__)


def _fail(message: str) -> None:
    print(f"dpllm: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)
