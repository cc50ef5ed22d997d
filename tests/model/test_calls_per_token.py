"""The Python work of a token: functions of ours that are entered between two tokens."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

import dpllm

OURS = Path(dpllm.__file__).resolve().parents[1]
FOLDERS = ("dpllm", "calib", "kernels", "kvzip_bridge", "quant")
MOST = 15


def calls_of_one_token(steps) -> Counter[str]:
    """Names of our functions, with how often they are entered (or resumed) for the next token."""
    found: Counter[str] = Counter()

    def profile(frame, event, argument) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and any(path.is_relative_to(OURS / f) for f in FOLDERS):
            found[f"{path.stem}.{frame.f_code.co_name}"] += 1

    sys.setprofile(profile)
    try:
        next(steps)
    finally:
        sys.setprofile(None)
    return found


DRAWN = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1}


@pytest.mark.parametrize(("sampling", "most"), [({}, MOST), (DRAWN, MOST + 2)], ids=["greedy", "drawn"])
def test_a_token_enters_few_functions_of_ours(sampling, most):
    engine = dpllm.load(target_bits=3.5)
    if engine.decoder.backend.cpu is None:  # the step is torch operations, each with Python of its own
        return
    steps = iter(engine.generate("import os\n", max_new_tokens=8, **sampling))
    for _ in range(4):
        next(steps)
    found = calls_of_one_token(steps)
    assert sum(found.values()) <= most, found
    assert not any("specul" in name or "draft" in name for name in found), found
