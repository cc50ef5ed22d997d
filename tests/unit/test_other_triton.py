"""The GPU kernels under the newest Triton, where `make` has installed it beside the one that torch wants: every kernel
against its definition through the interpreter, and the machine code of those that decoding spends its time in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
OTHERS = sorted((TESTS.parent / "build").glob("triton-*/triton/__init__.py"))


def under(other: Path, *command: str, **env: str) -> None:
    env = {"PYTHONPATH": str(other.parents[1]), "OMP_NUM_THREADS": "1"} | env
    run = subprocess.run(
        [sys.executable, *command], env=os.environ | env, cwd=TESTS.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.fixture(params=OTHERS or [None], ids=[p.parents[1].name for p in OTHERS] or ["none"])
def other(request) -> Path:
    if request.param is None:
        pytest.skip("no other Triton: `make test` installs it on Linux, x86-64")
    return request.param


@pytest.mark.slow
def test_machine_code(other):
    """No spills, wide loads, no barriers; instructions are compared with the table's under its own version only."""
    under(other, str(TESTS / "support" / "gpu_code.py"), "--only", "gemv 6", "gemv 2-6")


@pytest.mark.slow
def test_numbers_through_the_interpreter(other):
    file = str(TESTS / "interpreted" / "step_kernels.py")
    under(other, "-m", "pytest", "-q", "-W", "ignore", file, "-k", "doctor", TRITON_INTERPRET="1")
