"""Locks on places that only one process may write at a time.

The lock is a lock of the operating system on an open file beside the place. It ends with the process, however the
process ends, so the file that a killed process leaves does not block anyone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from dpllm.base.errors import InputError

try:
    import fcntl
except ImportError:  # not a POSIX system: there, nothing is locked
    fcntl = None  # type: ignore[assignment]

TAKEN = (errno.EAGAIN, errno.EACCES)
LONGEST = 200  # characters of a command that an error repeats


@contextlib.contextmanager
def only_writer(place: Path) -> Iterator[None]:
    """Keeps every other process (and thread) that asks for the same place from writing it during the block.

    place: a file or folder, which need not exist; its parent must. Raises InputError, at once, where another one is
    writing it. A file system that knows no locks gives none.
    """
    file = lock_file(place)
    handle = _locked(file, place)
    try:
        yield
    finally:
        if handle is not None:
            try:
                with contextlib.suppress(OSError):
                    file.unlink()  # before it is unlocked: nobody else can hold it yet
            finally:
                os.close(handle)


def lock_file(place: Path) -> Path:
    """The file that is locked for a place."""
    return place.with_name(f".{place.name}.dpllm-lock")


def _locked(file: Path, place: Path) -> int | None:
    """A handle that holds the lock; None where the file system knows none."""
    if fcntl is None:
        return None
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as e:
            raise InputError(
                f"{place} cannot be written: {file} cannot be opened ({e.strerror}). Choose another place."
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            holder = _read(handle)
            os.close(handle)
            if e.errno not in TAKEN:
                return None
            raise InputError(
                f"{place} is being written by {holder}. Wait until it has ended, or choose another place."
            ) from None
        if _still_there(handle, file):
            _sign(handle)
            return handle
        os.close(handle)  # it was deleted by its last holder after we had opened it


def _still_there(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Writes who holds the lock. A full disk must not keep anyone from it."""
    program = Path(sys.argv[0]).name.replace("__main__.py", "dpllm") if sys.argv else ""
    command = " ".join([program, *sys.argv[1:]])
    words = f"process {os.getpid()} on {socket.gethostname()} ({command[:LONGEST]})"
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, words.encode("utf-8", "replace"), 0)


def _read(handle: int) -> str:
    with contextlib.suppress(OSError):
        if words := " ".join(os.pread(handle, 4 * LONGEST, 0).decode("utf-8", "replace").split()):
            return words
    return "another process"
