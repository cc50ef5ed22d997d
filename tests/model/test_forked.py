"""Processes that are forked from one which has loaded and used a model. They run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

BEGIN = """
import multiprocessing, os, sys, threading, warnings
import torch
import dpllm
warnings.simplefilter("ignore")
torch.set_num_threads(2)
engine = dpllm.load(sys.argv[1], target_bits=3.3, backend=sys.argv[2] or None)

def ask(n=0):
    x = torch.ones(700, 700)
    assert float((x.exp() @ x).sum()) > 0
    return [step.token for step in engine.generate("def main():\\n" * 20, max_new_tokens=8, speculate="off")]

def child(work):
    if (pid := os.fork()) == 0:
        code = 1
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

before = ask()
"""

CASES = {
    "a child generates, and so does its child": """
def work():
    return ask() != before or child(lambda: ask() != before)
assert child(work) == 0
assert ask() == before
""",
    "a child ends as programs end": """
if (pid := os.fork()) == 0:
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
""",
    "processes of multiprocessing": """
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(ask, range(4)) == [before] * 4
""",
    "other threads generate": """
done = threading.Event()
found = []
def go_on():
    while not done.is_set():
        found.append(ask() == before)
others = [threading.Thread(target=go_on) for _ in range(3)]
for other in others:
    other.start()
codes = [child(lambda: ask() != before) for _ in range(6)]
done.set()
for other in others:
    other.join()
assert codes == [0] * 6, codes
assert found and all(found)
""",
    "a text is half generated": """
alone = [step.token for step in engine.generate("import os\\n", max_new_tokens=8)]
whole = engine.generate("import os\\n", max_new_tokens=8)
first = next(whole).token
def rest():
    return [first, *(step.token for step in whole)] == alone
assert child(lambda: not rest()) == 0
assert rest()
""",
}


@pytest.mark.parametrize("backend", ["", "reference"])
def test_forked_processes_generate(tiny_overlay, backend):
    script = BEGIN + "".join(f"print({name!r}, flush=True)\n{case}" for name, case in CASES.items())
    command = [sys.executable, "-c", script, str(tiny_overlay), backend]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired as e:
        pytest.fail(f"a process hangs: {e.stdout!r}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == list(CASES)
