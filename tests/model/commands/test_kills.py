"""kill -9 at random moments: the work is continued, and the result is that of an undisturbed run."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import SMALL, contents

from dpllm.calib.runtime.profile import PROFILE_NAME, _read

pytestmark = pytest.mark.slow
KILLS = 4


def process(*args: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dpllm", *map(str, args)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip


def killed_often(command: tuple[object, ...], partial: Path, seed: int) -> set[str]:
    """Kills the command each time after it wrote a few files, then lets it end. Returns the parts found after kills."""
    moments, kept = random.Random(seed), set()
    for _ in range(KILLS):
        enough = len(list(partial.rglob("*"))) + moments.randint(1, 3)
        run = process(*command)
        while run.poll() is None and len(list(partial.rglob("*"))) < enough:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03))
        run.kill()
        run.communicate()
        if run.returncode == 0:  # it was quicker
            return kept
        kept |= {p.name for p in partial.rglob("*.safetensors")}
    run = process(*command)
    _, err = run.communicate()
    assert run.returncode == 0, err
    return kept


def test_quantize(tiny_checkpoint, tmp_path):
    options = ("--jobs", "1", "--refine", "tables", *SMALL)
    assert process("quantize", tiny_checkpoint, tmp_path / "whole", *options).wait() == 0
    kept = killed_often(
        ("quantize", tiny_checkpoint, tmp_path / "out", *options), tmp_path / "out.partial", 1
    )
    assert kept, "no kill came after a part was finished"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_calibrate(overlay, tmp_path):
    (overlay / PROFILE_NAME).unlink()
    options = ("--targets", "3", "--kv-heads", "--threads", "1", "--samples", "6", "--sequence-length", "32")
    whole, out = tmp_path / "whole", tmp_path / "p"
    assert process("calibrate", overlay, "--out", whole, *options).wait() == 0
    kept = killed_often(("calibrate", overlay, "--out", out, *options), tmp_path / "p.partial", 2)
    assert kept, "no kill came after a part was finished"
    (_, expected), (_, found) = _read(whole), _read(out)
    assert expected.keys() == found.keys()
    assert all((expected[n] == found[n]).all() for n in expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["overlay", "p", "whole"]
