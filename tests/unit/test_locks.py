"""Locks on places: one writer at a time, whatever happens to the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpllm.base.errors import InputError
from dpllm.base.locks import lock_file, only_writer

HOLD = """
import sys
from pathlib import Path
from dpllm.base.locks import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(place: Path) -> subprocess.Popen:
    """A process that holds the lock until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_another_process_is_named(tmp_path):
    process = holder(tmp_path / "out")
    with (
        pytest.raises(InputError, match=rf"out is being written by process {process.pid} on .*Wait"),
        only_writer(tmp_path / "out"),
    ):
        pass
    with only_writer(tmp_path / "other"):
        pass
    process.communicate(b"")
    with only_writer(tmp_path / "out"):
        assert f"process {os.getpid()} " in lock_file(tmp_path / "out").read_text()
    assert not list(tmp_path.iterdir()), "no lock is left"


def test_a_killed_process_does_not_block(tmp_path):
    process = holder(tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert lock_file(tmp_path / "out").exists(), "its file is there"
    with only_writer(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_an_error_gives_the_lock_back(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), only_writer(tmp_path / "out"):
            raise KeyError
    assert not list(tmp_path.iterdir())


def test_never_two_at_a_time(tmp_path):
    """Many threads take the lock and delete its file again and again; the count shows two that hold it at once."""
    inside, most, refused = 0, 0, 0

    def work(number: int) -> None:
        nonlocal inside, most, refused
        for _ in range(200):
            try:
                with only_writer(tmp_path / "out"):
                    inside += 1
                    most = max(most, inside)
                    inside -= 1
            except InputError:
                refused += 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == 1 and inside == 0
    assert refused, "they did meet"


def test_a_folder_where_no_lock_can_be_made(tmp_path):
    with (
        pytest.raises(InputError, match="nowhere/out cannot be written"),
        only_writer(tmp_path / "nowhere/out"),
    ):
        pass
