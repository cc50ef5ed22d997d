"""A program at a terminal of its own: types for it, and reads what the screen shows."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z~]|\x1b[=>]")  # colours, and moves of the cursor
PROMPT = "<prompt>"  # stands for the sequence with which a line editor begins to read
CTRL_C, CTRL_D, ENTER, ALT_ENTER, UP = b"\x03", b"\x04", b"\r", b"\x1b\r", b"\x1b[A"


class Terminal:
    """Runs `python -m dpllm ...` at a pseudo-terminal. Use it in a `with` statement."""

    def __init__(self, *arguments: object, rows: int = 24, columns: int = 80, patience: float = 20.0):
        """patience: seconds after which a text that never comes is given up."""
        self.patience, self._unread, self.code = patience, b"", None
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # tests that run in the background inherit that it is ignored
            os.environ.update(TERM="xterm", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
            os.execv(sys.executable, [sys.executable, "-m", "dpllm", *map(str, arguments)])
        self.resize(rows, columns)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)

    def resize(self, rows: int, columns: int) -> None:
        """Changes the size of the window; the program is told by a signal."""
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes | str) -> None:
        """Types keys."""
        os.write(self._fd, keys.encode() if isinstance(keys, str) else keys)

    def interrupt(self) -> None:
        """Types Ctrl-C once the terminal turns it into a signal, which a line editor switches off while it reads."""
        deadline = time.monotonic() + self.patience
        while not termios.tcgetattr(self._fd)[3] & termios.ISIG:
            assert time.monotonic() < deadline, "the line editor still reads"
            time.sleep(0.001)
        self.type(CTRL_C)

    def until(self, shown: str) -> str:
        """What is shown next, up to and including this text. Escape sequences are left out, except for PROMPT."""
        deadline, wanted = time.monotonic() + self.patience, shown.encode()
        while (at := self._plain().find(wanted)) < 0:
            assert self._read(deadline), f"{shown!r} does not come: {self._plain()[-2000:].decode()}"
        text, self._unread = self._plain()[: at + len(wanted)], self._plain()[at + len(wanted) :]
        return text.decode("utf-8", "replace").replace("\r\n", "\n")

    def end(self) -> str:
        """Waits until the program ends. Returns what it still showed; `code` is its exit code."""
        deadline = time.monotonic() + self.patience
        while self._read(deadline):
            pass
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._plain().decode("utf-8", "replace").replace("\r\n", "\n")

    def _plain(self) -> bytes:
        return ESCAPES.sub(b"", self._unread.replace(b"\x1b[?2004h", PROMPT.encode()))

    def _read(self, deadline: float) -> bool:
        """Reads more, and answers where the cursor is asked for. False at the end or when time is up."""
        if not select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            new = os.read(self._fd, 65536)
        except OSError:  # the program has ended
            return False
        if b"\x1b[6n" in new:
            os.write(self._fd, b"\x1b[1;1R")
        self._unread += new
        return bool(new)
