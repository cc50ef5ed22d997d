"""The GPU benchmarks run where there is no GPU: dry, and as predictions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args], cwd=BENCH.parent, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def results() -> dict[str, float]:
    return {p.name: p.stat().st_mtime for p in (BENCH / "results").iterdir()}


@pytest.mark.parametrize("name", ["gpu_kernels", "gpu_decode"])
def test_dry_run(name):
    pytest.importorskip("triton")
    before = results()
    done = run(str(BENCH / f"{name}.py"), "--dry-run")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert {"bench", "commit", "command", "device", "versions", "rows", "gpu", "read_gb_per_s"} <= set(report)
    assert report["dry_run"] and report["bench"] == name
    assert all(r.get("us_p50") or r.get("ms_p50") for r in report["rows"])
    assert results() == before, "a dry run leaves no result"


def test_without_a_gpu_it_says_so():
    pytest.importorskip("triton")
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(str(BENCH / "gpu_kernels.py"))
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def roofline():
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("roofline", BENCH / "roofline.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["roofline"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("roofline", None)


def test_predictions(roofline):
    rows = roofline.table("8B", 1024)
    assert all(r["kind"] == "prediction" for r in rows)
    by_device = {}
    for r in rows:
        by_device.setdefault(r["device"], {})[r["bits"]] = r["predicted_tpot_ms"]
        parts = r["of_it_bytes_ms"] + r["of_it_instructions_ms"] + r["of_it_gaps_ms"]
        assert abs(parts - r["predicted_tpot_ms"]) < 0.01
    for name, times in by_device.items():
        assert times[3] < times[3.5] < times[4] < times[5] < times[6] < times[8] < times[16], name
    assert by_device["RTX 4060 Ti"][4] > 2 * by_device["RTX 4090"][4], "bandwidth tells"
    orin = next(d for d in roofline.DEVICES if "AGX Orin" in d.name)
    gb = roofline.shape("8B").num_layers * 218e6 * 4 / 8 / 1e9  # planes alone, four bits
    assert by_device[orin.name][4] > gb / orin.gb_per_s * 1e3


def test_bytes_are_those_of_the_decoder(roofline):
    """What the prediction counts is what the decoder of this shape reports that it reads."""
    from dpllm.shapes import random_decoder

    decoder = random_decoder(roofline.shape("tiny"), 4)
    read = sum(g.bytes_at[3 - g.seed_bits] for g in decoder.groups)
    products = [
        x
        for x in roofline.step(roofline.shape("tiny"), 3, 0, roofline.instructions_per_weight())
        if x.instructions
    ]
    assert abs(sum(p.nbytes for p in products[:-1]) - read) < 1
