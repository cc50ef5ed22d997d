"""`dpllm.quantize`, `dpllm.calibrate` and `dpllm.plan`: the commands' work, from Python."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

import dpllm
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.planning.cost_measurement import measure_cost as measure
from dpllm.quant.overlay import Overlay


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_quantize(tiny_checkpoint, tmp_path):
    stages = set()
    path = dpllm.quantize(
        tiny_checkpoint, tmp_path / "out", bits=(3, 5), fisher="none", jobs=1,
        progress=lambda stage, done, total: stages.add((stage, done <= total)),
    )  # fmt: skip
    assert path == tmp_path / "out" and Overlay.open(path).bits == (3, 5)
    assert stages == {("quantize", True)}
    for wrong, says in (({"bits": (6, 2)}, "6-2"), ({"fisher": "maybe"}, "fisher 'maybe'"),
                        ({"device": "tpu"}, "device 'tpu'"), ({}, "exists already")):  # fmt: skip
        with pytest.raises(dpllm.InputError, match=says):
            dpllm.quantize(tiny_checkpoint, str(path), **{"fisher": "none"} | wrong)


def test_calibrate(tiny_overlay, tmp_path):
    out, stages = tmp_path / "p.safetensors", set()
    report = dpllm.calibrate(
        tiny_overlay, targets=[3, 3.5], memory_bits=4, samples=4, sequence_length=64, out=out, threads=1,
        progress=lambda stage, done, total: stages.add(stage),
    )  # fmt: skip
    assert report.path == out and report.overlay == tiny_overlay
    assert [(t.target_bits, t.memory_bits) for t in report.targets] == [(3, 4), (3.5, 4)]
    assert all(abs(t.effective_bits - t.target_bits) < 0.3 for t in report.targets)
    assert report.target_range == (2, 6) and report.seconds > 0 and report.hours_for_8b > 0
    assert "targets" in stages
    assert sorted(CalibrationProfile.load(out).origin["budgets"]) == ["4", "5"]
    again = dpllm.calibrate(str(tiny_overlay), memory_bits=[3.5], samples=4, sequence_length=64, out=str(out))
    assert again.targets == ()
    assert sorted(CalibrationProfile.load(out).origin["budgets"]) == ["3.5", "4", "5"], "budgets are added"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"granularity": "row"}, "granularity 'row'"),
        ({"samples": 0}, "at least one sample"),
        ({"memory_bits": 7}, "memory_bits 7"),
        ({"targets": [1.5]}, "target 1.5 bits is impossible"),
        ({"dp_llm": True}, "Give targets"),
        ({"threads": 0}, "0 threads"),
        ({"out": "/nowhere/profile"}, "/nowhere is not a directory"),
    ],
)
def test_impossible_calibrations(tiny_overlay, wrong, says):
    with pytest.raises(dpllm.InputError, match=says):
        dpllm.calibrate(tiny_overlay, **wrong)


def test_plan(tiny_overlay, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = shutil.copytree(tiny_overlay, tmp_path / "overlay")
    engine = dpllm.load(own)
    cost = measure(engine)
    cost = replace(cost, weights_ms=tuple(1.0 + i for i in range(len(cost.bits))))
    cost.save(tmp_path / "cost.json")
    asked = {"max_memory": "1GB", "max_quality_loss": "2%", "context": "256"}
    planned = dpllm.plan(engine, **asked, cost=cost)
    assert planned.targets.max_memory == 10**9 and planned.targets.context == 256
    assert planned.plan.quality_loss <= 0.02
    numbers = {"max_memory": 1e9, "max_quality_loss": 0.02, "context": 256}
    assert dpllm.plan(engine, **numbers, cost=tmp_path / "cost.json").plan == planned.plan
    for wrong, says in (({"max_memory": "plenty"}, "not a size"), ({"context": "many"}, "not a number of tokens"),
                        ({"tpot_ms": 1e-6, "context": 256, "cost": cost}, "no plan meets")):  # fmt: skip
        with pytest.raises(dpllm.InputError, match=says):
            dpllm.plan(engine, **wrong)
