"""`dpllm quantize` and `dpllm calibrate`: what they answer and what they refuse."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from command_line import FAST, SMALL, contents

from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.quant.overlay import Overlay


def test_quantize(ok, tiny_checkpoint, tmp_path):
    result = ok("quantize", tiny_checkpoint, tmp_path / "out", "--bits", "3-5", *FAST, "--json").json
    overlay = Overlay.open(tmp_path / "out")
    assert result["overlay"] == str(tmp_path / "out")
    assert result["bits"] == [3, 5] == list(overlay.bits)
    assert result["hash"] == overlay.hash
    assert result["weights"] == 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)
    assert result["stored_bytes"] == overlay.stored_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (
        ok("generate", "x", "--overlay", tmp_path / "out", "--bits", 4, "--json").json["effective_bits"] == 4
    )


def test_quantize_with_text(ok, tiny_checkpoint, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n"}) + "\n" for i in range(90))
    )
    result = ok("quantize", tiny_checkpoint, tmp_path / "out", "--data", text, *SMALL, "--json").json
    facts = ok("inspect", tmp_path / "out", "--verify", "--json").json
    assert facts["hash"] == result["hash"]
    assert facts["fisher"]["samples"] == 2
    assert facts["profile"] is None


def test_calibrate(ok, overlay):
    (overlay / "profile.safetensors").unlink()
    arguments = ("--samples", "6", "--sequence-length", "64", "--targets", "3,3.5", "--memory-bits", "4")
    result = ok("calibrate", overlay, *arguments, "--granularity", "linear", "--json").json
    profile = CalibrationProfile.load(overlay / "profile.safetensors", Overlay.open(overlay).hash)
    assert result["profile"] == str(overlay / "profile.safetensors")
    assert (
        (result["granularity"], result["groups"])
        == ("linear", 21)
        == (profile.granularity, len(profile.gain))
    )
    assert result["target_range"] == [2.0, 6.0]
    assert result["estimator_bytes"] == profile.estimator_bytes()
    assert [(t["target_bits"], t["memory_bits"]) for t in result["targets"]] == [(3.0, 4), (3.5, 4)]
    assert all(abs(t["effective_bits"] - t["target_bits"]) < 0.15 for t in result["targets"])
    assert (
        ok("generate", "x", "--overlay", overlay, "--target-bits", 3, "--json").json["policy"]
        == "rate-distortion"
    )


def test_calibrating_again_adds_budgets_and_policies(ok, overlay, tmp_path):
    out = tmp_path / "p.safetensors"
    small = ("--samples", "4", "--sequence-length", "64", "--out", out)
    ok("calibrate", overlay, *small, "--memory-bits", "4.5", "--targets", "3", "--dp-llm")
    result = ok("calibrate", overlay, *small, "--memory-bits", "3.5", "--targets", "3", "--json").json
    assert [(t["target_bits"], t["memory_bits"]) for t in result["targets"]] == [(3.0, 3.5)]
    profile = CalibrationProfile.load(out)
    assert sorted(profile.origin["budgets"]) == ["3.5", "4.5", "5"]
    assert profile.budget(3.5).mean() < profile.budget(4.5).mean() < profile.budget(5).mean()
    assert "dp-llm.targets" in profile.extra
    facts = ok("inspect", out, "--json").json
    assert facts["budgets"] == [3.5, 4.5, 5.0] and facts["dp_llm_targets"] == [3.0]


def test_calibrate_elsewhere(ok, overlay, tmp_path):
    before = contents(overlay)
    ok("calibrate", overlay, "--samples", 2, "--sequence-length", 32, "--out", tmp_path / "p.safetensors")
    assert contents(overlay) == before
    assert ok("inspect", tmp_path / "p.safetensors", "--json").json["kind"] == "profile"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--bits", "4"), "not a range"),
        (("--bits", "6-2"), "--bits 6-2 is not possible"),
        (("--bits", "1-6"), "--bits 1-6 is not possible"),
        (("--bits", "2-9"), "--bits 2-9 is not possible"),
        (("--head-bits", "9"), "--head-bits 9"),
        (("--fisher", "maybe"), "fisher 'maybe' is unknown"),
        (("--samples", "0"), "at least one sample"),
        (("--sequence-length", "4"), "at least 16 tokens"),
        (("--device", "tpu"), "device 'tpu' is unknown"),
        (("--jobs", "-1"), "--jobs"),
        (("--jobs", "many"), "--jobs"),
        (("--seed", "-1"), "--seed"),
        (("--rows-per-table", "-1"), "--rows-per-table"),
    ],
)
def test_impossible_quantisations(refused, tiny_checkpoint, tmp_path, arguments, says):
    refused("quantize", tiny_checkpoint, tmp_path / "out", *arguments, says=says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--granularity", "row"), "granularity 'row'"),
        (("--samples", "0"), "at least one sample"),
        (("--sequence-length", "3"), "at least 16 tokens|of at least 16"),
        (("--device", "tpu"), "device 'tpu' is unknown"),
        (("--threads", "0"), "0 threads are not possible"),
        (("--seed", "-1"), "--seed"),
        (("--memory-bits", "2"), "memory_bits 2"),
        (("--memory-bits", "7"), "memory_bits 7"),
        (("--targets", "1.5"), "target 1.5 bits is impossible"),
        (("--targets", "5", "--memory-bits", "4"), "target 5 bits is impossible"),
        (("--targets", "few"), "--targets 'few' is not a list of numbers"),
        (("--dp-llm",), "Give targets"),
        (("--memory-bits", "much"), "not a list of numbers"),
        (("--out", "/nowhere/profile"), "/nowhere is not a directory"),
        (("--out", "/"), "is a directory"),
    ],
)
def test_impossible_calibrations(refused, tiny_overlay, arguments, says):
    before = contents(tiny_overlay)
    refused("calibrate", tiny_overlay, *arguments, says=says)
    assert contents(tiny_overlay) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(refused, tiny_checkpoint, tiny_overlay, tmp_path):
    refused("quantize", tiny_checkpoint, tmp_path / "out", "--device", "cuda", says="sees no CUDA device")
    refused("calibrate", tiny_overlay, "--device", "cuda", says="sees no CUDA device")


def test_one_stored_width_leaves_nothing_to_calibrate(ok, refused, tiny_checkpoint, tmp_path):
    ok("quantize", tiny_checkpoint, tmp_path / "out", "--bits", "4-4", *FAST)
    assert ok("generate", "x", "--overlay", tmp_path / "out", "--json").json["effective_bits"] == 4
    refused("calibrate", tmp_path / "out", says="one width only")


def test_an_overlay_cannot_be_quantised_again(refused, tiny_overlay, tmp_path):
    refused("quantize", tiny_overlay, tmp_path / "out", says="is quantised already")


def test_places_that_cannot_be_written(refused, tiny_checkpoint, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for out, says in (("there", "exists already"), ("file", "exists already"), ("no/out", "is not a directory"),
                      ("file/out", "is not a directory")):  # fmt: skip
        refused("quantize", tiny_checkpoint, tmp_path / out, *FAST, says=says, alone=False)
    assert contents(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there"]


def test_a_disk_that_fills_up(refused, ok, tiny_checkpoint, overlay, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = ("quantize", tiny_checkpoint, tmp_path / "out", *FAST)
    before = contents(overlay)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        refused(*arguments, says="cannot be written.*Free space", alone=False)
        refused("calibrate", overlay, *SMALL, says="cannot be written.*Free space", alone=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    kept = {n: c for n, c in contents(overlay).items() if not n.startswith("profile.safetensors.partial/")}
    assert kept == before, "besides finished parts, which the next run goes on from"
    ok(*arguments)
    ok("inspect", tmp_path / "out", "--verify")
