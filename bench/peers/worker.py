"""A peer runtime in a process of its own, driven by one JSON line per request.

Two runtimes in one process disturb each other: OpenMP workers keep spinning for some milliseconds after a
parallel region, and both pools want the same cores. So each peer lives in a child that blocks on its standard
input while anybody else is measured, and that answers only after its own threads have gone to sleep (`SETTLE`).

A child is `python -m bench.peers.<module> '{"option": ...}'`; the module calls `serve(make)`. Requests are
{"call": name, "args": [...]}; answers are {"result": ...} or {"error": "one line"}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SETTLE = 0.05  # seconds between the end of a measurement and its answer; libgomp spins for about 10 ms


class PeerError(RuntimeError):
    """A peer cannot be run: one line that says which, why and what to do."""


class Peer:
    """Starts a worker and calls its methods.

    `python` may be another environment's interpreter: it needs numpy and the peer's own packages, not ours.
    `environment` is added to the child's; `show_errors` passes its standard error on. Use as a context manager,
    or call `close()`.
    """

    def __init__(
        self,
        module: str,
        options: Any,
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
        show_errors: bool = False,
    ) -> None:
        self.name = module
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        errors = None if show_errors else self._errors
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (environment or {})
        try:
            self._child = subprocess.Popen(
                [python, "-m", f"bench.peers.{module}", json.dumps(asdict(options))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=env,
            )  # fmt: skip
        except OSError as error:
            raise PeerError(f"{module}: cannot start {python}: {error}") from error
        self.info: dict[str, Any] = self._answer()

    def call(self, method: str, *args: Any) -> Any:
        """Runs one method of the worker and returns what it returned."""
        assert self._child.stdin
        try:
            self._child.stdin.write(json.dumps({"call": method, "args": args}) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # _answer says what the child's last words were
        return self._answer()

    def prefill(self, tokens: int) -> float:
        """Seconds for a prompt of that many tokens, from an empty cache."""
        return self.call("prefill", tokens)

    def decode(self, tokens: int, context: int) -> list[float]:
        """Milliseconds of each generated token after a prompt of `context` tokens, greedy choice included."""
        return self.call("decode", tokens, context)

    def close(self) -> None:
        """Ends the child; harmless twice."""
        if self._child.poll() is None:
            assert self._child.stdin
            self._child.stdin.close()
            try:
                self._child.wait(10)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._errors.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        assert self._child.stdout
        line = self._child.stdout.readline()
        if not line:
            code = self._child.wait()
            self._errors.seek(0)
            last = [text for text in self._errors.read().splitlines() if text.strip()][-1:]
            raise PeerError(
                f"{self.name}: worker ended with code {code}: {last[0] if last else 'no message'}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer["result"]


def serve(make: Callable[[dict[str, Any]], Any]) -> None:
    """The child's side: builds the object from the options, sends its `info`, then obeys until input ends.

    Whatever a library prints goes to standard error: the answers have the original output to themselves.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        target = make(json.loads(sys.argv[1]))
    except Exception as error:
        send({"error": one_line(error)})
        return
    send({"result": target.info})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            message = {"result": getattr(target, request["call"])(*request["args"])}
        except Exception as error:
            message = {"error": one_line(error)}
        time.sleep(SETTLE)
        send(message)


def one_line(error: BaseException) -> str:
    """An exception as one line of at most 200 characters."""
    text = " ".join(str(error).split()) or "no message"
    return (text if isinstance(error, PeerError) else f"{type(error).__name__}: {text}")[:200]
