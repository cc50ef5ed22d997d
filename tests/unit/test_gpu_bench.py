"""The GPU benchmarks run where there is no GPU: dry, and as predictions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.gpu import roofline

ROOT = Path(__file__).resolve().parents[2]


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def results() -> dict[str, float]:
    return {p.name: p.stat().st_mtime for p in (ROOT / "bench" / "results").iterdir()}


def dry(name: str) -> dict:
    """What the script reports."""
    pytest.importorskip("triton")
    before = results()
    done = run("-m", f"bench.gpu.{name}", "--dry-run")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert {"bench", "commit", "command", "device", "versions", "rows", "gpu", "read_gb_per_s"} <= set(report)
    assert report["instruction_set"] == "none: dry run through the interpreter" and report["processor"]
    assert report["command"] == f"python -m bench.gpu.{name} --dry-run"
    assert report["dry_run"] and report["bench"] == name
    assert all(r.get("us_p50") or r.get("ms_p50") for r in report["rows"])
    assert results() == before, "a dry run leaves no result"
    return report


def test_kernels_dry():
    """Every row of ours is of our kernels, interpreted."""
    kernels = {
        "8x128": "gemv_kernel", "8x128, 4 rows": "gemv_kernel", "8x128, 8 rows": "gemm_kernel",
        "8x128, 16 rows": "gemm_kernel", "8x128, prompt of 130": "dequantize_kernel",
        "head 16x128": "int8_gemv_kernel", "attention after 70": "attend_kernel",
    }  # fmt: skip
    rows, ranges = dry("gpu_kernels")["rows"], set()
    assert {r["what"] for r in rows} == set(kernels)
    for r in rows:
        if r["kernel"].startswith("ours"):
            assert kernels[r["what"]] in r["note"].split(), r
            ranges.add(r["kernel"].removeprefix("ours, "))
        else:
            assert r["note"] is None, r
    fixed = {f"{b} of {b}-{b}" for b in range(2, 9)}
    assert (
        fixed
        | {
            "3 of 2-6",
            "4 of 2-6",
            "3 of 3-4",
            "choosing 3 of 2-6",
            "mixed widths of 2-6",
            "mixed widths of 3-4",
        }
        <= ranges
    )


def test_decode_dry():
    """Every step of a quantised model is of our kernels; our policy chooses, learns and is replayed."""
    report = dry("gpu_decode")
    rows = {r["what"]: r for r in report["rows"]}
    assert report["backend"] == "triton"
    for name, r in rows.items():
        ran = set(r["note"].split())
        assert {"attend_kernel", "norm_kernel"} <= ran
        assert ({"gemv_kernel", "int8_gemv_kernel"} <= ran) == (name != "fp16"), name
        assert ("observe_kernel" in ran) == (name == "3.5 bits, our policy"), name
        assert ("estimate_kernel" in ran) == ("DP-LLM" in name), name
    ours, replayed = rows["3.5 bits, our policy"], rows["our policy's widths, replayed"]
    assert 2 < ours["bits"] == replayed["bits"] < 4 and ours["like"] == replayed["what"]


def test_without_a_gpu_it_says_so():
    pytest.importorskip("triton")
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("-m", "bench.gpu.gpu_kernels", "--allow-dirty")
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr and "Traceback" not in done.stderr


def test_every_call_is_made_before_it_is_captured(monkeypatch):
    """Modules that compile themselves do so one by one, and must not within a capture."""
    pytest.importorskip("triton")
    import torch

    from bench.gpu import gpu_common

    capturing, made = [], []

    @contextmanager
    def capture(graph):
        capturing.append(True)
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    gpu_common.captured([lambda i=i: made.append((i, bool(capturing))) for i in range(5)])
    assert made == [(i, later) for later in (False, True) for i in range(5)]


def test_predictions():
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


def test_each_device_runs_its_own_code():
    assert set(roofline.TARGETS) == {d.name for d in roofline.DEVICES}
    counts = {t: roofline.instructions_per_weight(t) for t in set(roofline.TARGETS.values())}
    assert len({tuple(c.values()) for c in counts.values()}) > 2
    by_device = {r["device"]: r["code"] for r in roofline.table("8B", 1024)}
    assert by_device["RTX 5090"] == "sm_120" and by_device["Jetson AGX Orin 64GB"] == "sm_87"


def test_bytes_are_those_of_the_decoder():
    """What the prediction counts is what the decoder of this shape reports that it reads."""
    from dpllm.model.random_models import random_decoder

    decoder = random_decoder(roofline.shape("tiny"), 4)
    read = sum(g.bytes_at[3 - g.seed_bits] for g in decoder.groups)
    products = [
        x
        for x in roofline.step(roofline.shape("tiny"), 3, 0, roofline.instructions_per_weight(90))
        if x.instructions
    ]
    assert abs(sum(p.nbytes for p in products[:-1]) - read) < 1
