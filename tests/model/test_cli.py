"""The command line: JSON as the contract says, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import Result, complaint
from safetensors.torch import load_file, save_file
from tiny_models import build_model

from dpllm import __version__, cli
from dpllm.base.errors import InputError
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.commands.common import parse_size
from dpllm.quant.overlay import Overlay
from dpllm.quant.source import INDEX

FAST = ("--fisher", "none", "--jobs", "1")
SMALL = ("--samples", "2", "--sequence-length", "32")


def contents(folder: Path) -> dict[str, str]:
    """Every file below with the hash of its bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def overlay(tiny_overlay, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_overlay, tmp_path / "overlay"))


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard_of(overlay: Path, tensor: str) -> tuple[Path, int]:
    """(file, offset of the tensor's first byte)."""
    path = overlay / json.loads((overlay / INDEX).read_text())["weight_map"][tensor]
    with path.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        return path, 8 + size + json.loads(f.read(size))[tensor]["data_offsets"][0]


def flip(overlay: Path, tensor: str) -> None:
    path, at = shard_of(overlay, tensor)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# -- what the commands answer -----------------------------------------------------------------------------


def test_version_and_help(ok):
    assert ok("--version").out.strip() == f"dpllm {__version__}"
    for command in ("quantize", "calibrate", "generate", "eval", "inspect", "doctor", "report", "demo"):
        assert command in ok("--help").out
        assert "--json" in ok(command, "--help").out


def test_without_a_command_the_help_is_shown(dpllm):
    result = dpllm()
    assert result.code == 2
    assert "generate" in result.out + result.err and "Traceback" not in result.err
    assert "dpllm: " not in result.err


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


def test_generate(ok, tiny_overlay):
    result = ok(
        "generate",
        "import os",
        "--overlay",
        tiny_overlay,
        "--target-bits",
        3.25,
        "--max-new-tokens",
        20,
        "--json",
    )
    said = result.json
    assert len(result.out.splitlines()) == 1, "no text beside the JSON"
    assert set(said) >= {
        "text", "new_tokens", "effective_bits", "ttft_ms", "tpot_ms", "policy", "target", "backend",
        "weight_bytes_per_token", "kv_bytes",
    }  # fmt: skip
    assert said["new_tokens"] == 20
    assert isinstance(said["text"], str) and said["text"]
    assert 2 < said["effective_bits"] < 5
    assert said["ttft_ms"] > 0 and 0 < said["tpot_ms"]["p50"] <= said["tpot_ms"]["p95"]
    assert (said["policy"], said["target"]) == ("rate-distortion", {"bits": 3.25})
    assert said["backend"].startswith("cpu:")
    assert said["weight_bytes_per_token"] > 0
    assert said["kv_bytes"] > 0


def test_generate_streams_the_same_text(ok, tiny_overlay):
    arguments = ("generate", "import os", "--overlay", tiny_overlay, "--max-new-tokens", 20)
    plain = ok(*arguments)
    assert plain.out == ok(*arguments, "--json").json["text"] + "\n"
    assert "20 tokens" in plain.err and "rate-distortion" in plain.err


def test_generate_reads_standard_input(ok, tiny_overlay):
    arguments = ("--overlay", tiny_overlay, "--max-new-tokens", 12, "--json")
    given = ok("generate", "class A:\n", *arguments).json["text"]
    assert ok("generate", "-", *arguments, stdin="class A:\n").json["text"] == given
    assert ok("generate", "-", *arguments, stdin="import os").json["text"] != given


def test_generate_options_arrive(ok, tiny_overlay):
    def text(*arguments) -> str:
        fixed = ("generate", "import os", "--overlay", tiny_overlay, "--max-new-tokens", 24, "--json")
        return ok(*fixed, *arguments).json["text"]

    greedy = text()
    sampled = text("--temperature", 1, "--seed", 5)
    assert sampled == text("--temperature", 1, "--seed", 5) != greedy
    assert text("--temperature", 1, "--top-p", 1e-9, "--seed", 5) == greedy
    stop = [greedy[5:7], greedy[2]]
    assert text("--stop", stop[0], "--stop", stop[1]) == greedy[: min(greedy.find(s) for s in stop)]
    assert text("--threads", 1) == greedy
    assert text("--accuracy", "exact") == text("--threads", 1, "--backend", "reference")


def test_a_terminal_without_unicode(dpllm, tiny_overlay, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert dpllm("generate", "x", "--overlay", tiny_overlay, "--temperature", 3, "--seed", 1).code == 0
    written = terminal.buffer.getvalue().decode("ascii")
    assert "?" in written and len(written) > 50


def test_one_token_has_no_decode_figures(ok, tiny_overlay):
    said = ok("generate", "x", "--overlay", tiny_overlay, "--max-new-tokens", 1, "--json").json
    assert (said["effective_bits"], said["tpot_ms"], said["weight_bytes_per_token"]) == (None, None, None)
    assert said["ttft_ms"] > 0
    ok("generate", "x", "--overlay", tiny_overlay, "--max-new-tokens", 1)


def test_a_plain_checkpoint_generates_too(ok, tiny_checkpoint):
    said = ok("generate", "x", "--overlay", tiny_checkpoint, "--max-new-tokens", 4, "--json").json
    assert (said["policy"], said["target"], said["effective_bits"]) == (None, {"bits": None}, None)
    assert said["tpot_ms"]["p50"] > 0
    assert "4 tokens" in ok("generate", "x", "--overlay", tiny_checkpoint, "--max-new-tokens", 4).err


def test_eval(ok, tiny_overlay, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("def double(x):\n    return 2 * x\n" * 20)
    names = ("rate-distortion", "static", "random", "uniform")
    result = ok(
        "eval",
        text,
        "--overlay",
        tiny_overlay,
        "--policy",
        ",".join(names),
        "--target-bits",
        "3,3.5",
        "--json",
    )
    rows = result.json["results"]
    assert [(r["policy"], r["target_bits"]) for r in rows] == [
        (n, t) for t in (3.0, 3.5) for n in names if (n, t) != ("uniform", 3.5)
    ]
    for r in rows:
        assert set(r) >= {
            "policy", "target_bits", "effective_bits", "perplexity", "nll_mean", "tokens", "weight_bytes_per_token",
        }  # fmt: skip
        assert r["perplexity"] > 1 and r["nll_mean"] > 0
        assert r["tokens"] == rows[0]["tokens"] > 100
        assert abs(r["effective_bits"] - r["target_bits"]) < 0.5
        assert r["weight_bytes_per_token"] > 0
    assert "uniform reads whole bits only" in result.err


def test_eval_limits(ok, tiny_overlay, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x = 1\n" * 40}) + "\n" for _ in range(5)))
    arguments = ("eval", tmp_path / "a.jsonl", "--overlay", tiny_overlay, "--target-bits", 3, "--json")
    assert ok(*arguments, "--context", 20).json["results"][0]["tokens"] == 5 * 19
    assert ok(*arguments, "--context", 20, "--max-tokens", 40).json["results"][0]["tokens"] == 2 * 19
    assert "perplexity" in ok(*arguments[:-1]).out


def test_inspect(ok, tiny_overlay, tiny_checkpoint):
    facts = ok("inspect", tiny_overlay, "--json").json
    assert facts["kind"] == "overlay" and facts["bits"] == [2, 6] and facts["matrices"] == 21
    sizes = [facts["resident_bytes"][str(b)] for b in range(2, 7)]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == sum(facts["stored_bytes"].values())
    assert facts["profile"]["targets"] == [2.0, 6.0] and facts["profile"]["granularity"] == "fused"
    plain = ok("inspect", tiny_checkpoint, "--verify", "--json").json
    assert plain["kind"] == "checkpoint" and plain["model_type"] == "llama" and plain["verified"]
    assert plain["parameters"] == sum(
        t.numel() for t in load_file(tiny_checkpoint / "model.safetensors").values()
    )
    for arguments in ((tiny_overlay,), (tiny_checkpoint,), (tiny_overlay / "profile.safetensors",)):
        assert "overlay" in ok("inspect", *arguments).out or "checkpoint" in ok("inspect", *arguments).out


def test_names_in_brackets_are_shown(ok, tiny_checkpoint, tmp_path, monkeypatch):
    """Rich reads [/b] as markup; a path or a text is none."""
    shutil.copytree(tiny_checkpoint, tmp_path / "m[b]")
    monkeypatch.chdir(tmp_path)
    assert "m[b]" in ok("inspect", "m[b]").out


def test_doctor(ok):
    report = ok("doctor", "--json").json
    assert report["ok"] is True
    assert report["backend"]["name"].startswith("cpu:") and report["backend"]["reason"]
    assert {"reference", "cpu:portable", report["backend"]["name"]} <= set(report["gemv_relative_error"])
    for errors in report["gemv_relative_error"].values():
        assert set(errors) == {str(b) for b in range(2, 9)}
    assert "backend" in ok("doctor").out


# -- memory -----------------------------------------------------------------------------------------------


def test_only_resident_planes_are_read_from_disk(ok, refused, overlay):
    """With the upper planes destroyed, nobody who does not need them notices."""
    for name in Overlay.open(overlay).linears:
        for plane in (4, 5):
            flip(overlay, f"{name}.planes.{plane}")
        flip(overlay, f"{name}.lut.5")
    sizes = ok("inspect", overlay, "--json").json["resident_bytes"]
    arguments = ("generate", "x", "--overlay", overlay, "--target-bits", 3, "--max-new-tokens", 3)
    for limit in (("--resident-bits", 4), ("--max-memory", sizes["4"]), ("--max-memory", sizes["5"] - 1)):
        result = ok(*arguments, *limit)
        assert "resident: 4 planes" in result.err
        assert f"{sizes['4'] / 1e6:.2f} MB read" in result.err
    refused(*arguments, says=r"planes\.4' is damaged")
    refused(*arguments, "--max-memory", sizes["5"], says=r"planes\.4' is damaged")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4e9),
        ("600 MiB", 600 * 2**20),
        ("1e9", 1e9),
        ("1.5k", 1500),
        ("2g", 2e9),
        ("1TiB", 2**40),
        ("7b", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-4GB", "4XB", "nan", "inf", "0", "1e999", "1.2.3", "4 G B", "..", "4GB!"]
)
def test_no_sizes(text):
    with pytest.raises(InputError, match="is no size"):
        parse_size(text)


# -- bad input: options -----------------------------------------------------------------------------------

USAGE = [
    (("generate",), "no prompt"),
    (("generate", ""), "prompt is empty"),
    (("generate", "caf\udce9"), "not UTF-8"),
    (("generate", "x", "--bits", "4", "--target-bits", "3"), "exclude each other"),
    (("generate", "x", "--bits", "4", "--policy", "random"), "--bits fixes every width"),
    (("generate", "x", "--resident-bits", "4", "--max-memory", "1GB"), "exclude each other"),
    (("generate", "x", "--bits", "7"), "target 7 bits is impossible"),
    (("generate", "x", "--bits", "1"), "target 1 bits is impossible"),
    (("generate", "x", "--target-bits", "1.99"), "impossible: 2 .seed. to 6 .resident."),
    (("generate", "x", "--target-bits", "6.01"), "impossible"),
    (("generate", "x", "--target-bits", "nan"), "target nan bits is impossible"),
    (("generate", "x", "--target-bits", "inf"), "target inf bits is impossible"),
    (("generate", "x", "--target-bits", "4", "--resident-bits", "3"), "2 .seed. to 3 .resident."),
    (("generate", "x", "--target-bits", "three"), "--target-bits"),
    (("generate", "x", "--policy", "best"), "unknown policy 'best'.*rate-distortion"),
    (("generate", "x", "--policy", "uniform", "--target-bits", "3.5"), "whole bits"),
    (("generate", "x", "--backend", "fpga"), "unknown kernel backend 'fpga'"),
    (("generate", "x", "--threads", "0"), "--threads 0"),
    (("generate", "x", "--threads", "-2"), "--threads -2"),
    (("generate", "x", "--resident-bits", "9"), "9 resident bits"),
    (("generate", "x", "--resident-bits", "1"), "1 resident bits"),
    (("generate", "x", "--max-memory", "10kB"), "needs .* even at 2 bits"),
    (("generate", "x", "--max-memory", "plenty"), "'plenty' is no size"),
    (("generate", "x", "--max-memory", "1e999"), "is no size"),
    (("generate", "x", "--max-new-tokens", "0"), "max_new_tokens is 0"),
    (("generate", "x", "--temperature", "-1"), "temperature is -1"),
    (("generate", "x", "--temperature", "nan"), "temperature is nan"),
    (("generate", "x", "--top-p", "0"), "top_p is 0"),
    (("generate", "x", "--top-p", "1.5"), "top_p is 1.5"),
    (("generate", "x", "--stop", ""), "empty stop string"),
    (("generate", "x", "--seed", "-1"), "--seed"),
    (("generate", "x", "--seed", str(2**70)), "--seed"),
    (("generate", "x", "--seed", "one"), "--seed"),
    (("generate", "x", "--chat"), "no chat template"),
    (("generate", "x y " * 400), "the model has 512 positions"),
    (("generate", "x", "extra"), "extra"),
    (("generate", "x", "--fast"), "--fast"),
    (("eval", "--policy", "best"), "unknown policy 'best'"),
    (("eval", "--policy", ""), "unknown policy"),
    (("eval", "--target-bits", ""), "no list of numbers"),
    (("eval", "--target-bits", "3;4"), "no list of numbers"),
    (("eval", "--target-bits", "nan"), "no finite number"),
    (("eval", "--target-bits", "3,inf", "--policy", "uniform"), "no finite number"),
    (("eval", "--target-bits", "3,7"), "target 7 bits is impossible"),
    (("eval", "--context", "1"), "--context 1 is too short"),
    (("eval", "--max-tokens", "-1"), "--max-tokens"),
    (("eval", "--seed", "-1"), "--seed"),
    (("eval", "--threads", "0"), "--threads 0"),
    (("eval", "--backend", "fpga"), "unknown kernel backend"),
]


@pytest.mark.parametrize(("arguments", "says"), USAGE)
def test_impossible_wishes(refused, tiny_overlay, arguments, says):
    before = contents(tiny_overlay)
    refused(*arguments, "--overlay", tiny_overlay, says=says)
    assert contents(tiny_overlay) == before


def test_empty_standard_input(refused, tiny_overlay):
    refused("generate", "-", "--overlay", tiny_overlay, stdin="", says="prompt is empty")


def test_commands_that_do_not_exist(refused):
    refused("quantise", says="quantise")
    refused("inspect", says="directory")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--bits", "4"), "no range"),
        (("--bits", "6-2"), "--bits 6-2 is not possible"),
        (("--bits", "1-6"), "--bits 1-6 is not possible"),
        (("--bits", "2-9"), "--bits 2-9 is not possible"),
        (("--head-bits", "9"), "--head-bits 9"),
        (("--fisher", "maybe"), "--fisher maybe"),
        (("--samples", "0"), "at least one sample"),
        (("--sequence-length", "4"), "at least 16 tokens"),
        (("--device", "tpu"), "--device tpu"),
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
        (("--granularity", "row"), "--granularity row"),
        (("--samples", "0"), "at least one sample"),
        (("--sequence-length", "3"), "at least 16 tokens|of at least 16"),
        (("--device", "tpu"), "--device tpu"),
        (("--threads", "0"), "--threads 0"),
        (("--seed", "-1"), "--seed"),
        (("--memory-bits", "2"), "--memory-bits 2"),
        (("--memory-bits", "7"), "--memory-bits 7"),
        (("--targets", "1.5"), "target 1.5 bits is impossible"),
        (("--targets", "5", "--memory-bits", "4"), "target 5 bits is impossible"),
        (("--targets", "few"), "no list of numbers"),
        (("--dp-llm",), "--targets"),
        (("--memory-bits", "much"), "no list of numbers"),
        (("--out", "/nowhere/profile"), "/nowhere is no directory"),
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


@pytest.mark.parametrize(
    "command",
    [("generate", "text"), ("eval",), ("profile",), ("plan", "--tpot-ms", "9"), ("bench", "--model", "tiny"),
     ("report",), ("context", "build", "-", "-o", "ctx")],
)  # fmt: skip
def test_devices_of_commands_that_decode(refused, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("a text"))
    refused(*command, "--device", "tpu", says="--device tpu is unknown")
    if not torch.cuda.is_available():
        refused(*command, "--device", "cuda", says="sees no CUDA device")
    assert list(tmp_path.iterdir()) == []


# -- bad input: text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n \n", "is empty"),
        ("latin.txt", "café".encode("latin-1"), "not UTF-8"),
        ("binary.txt", bytes(range(256)), "not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("bad.jsonl", b'{"body": "a"}\n', "line 1"),
    ],
)
def test_data_that_is_no_text(refused, tiny_checkpoint, overlay, tmp_path, name, content, says):
    data = tmp_path / name
    if content is not None:
        data.write_bytes(content)
    before = contents(tmp_path)
    refused("quantize", tiny_checkpoint, tmp_path / "out", "--data", data, says=says)
    refused("calibrate", overlay, "--data", data, says=says)
    refused("eval", data, "--overlay", overlay, says=says)
    assert contents(tmp_path) == before


def test_data_that_is_too_short(refused, ok, tiny_checkpoint, overlay, tmp_path):
    (tmp_path / "short.txt").write_text("x = 1\n")
    before = contents(overlay)
    refused("calibrate", overlay, "--data", tmp_path / "short.txt", says="at least 511 are needed")
    assert contents(overlay) == before
    arguments = ("quantize", tiny_checkpoint, tmp_path / "out")
    refused(*arguments, "--data", tmp_path / "short.txt", says="at least 511 are needed", alone=False)
    assert not (tmp_path / "out").exists()
    ok(*arguments, *SMALL)  # the corrected command works


# -- bad input: checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "says"),
    [("no/such/dir", "is not a directory, and not a hub id"), ("owner/no-such-model", "could not be downloaded"),
     (__file__, "is a file")],
)  # fmt: skip
def test_models_that_are_not_there(refused, tmp_path, model, says):
    refused("quantize", model, tmp_path / "out", says=says)
    assert list(tmp_path.iterdir()) == []


def damage(checkpoint: Path, how: str) -> None:
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    content = weights.read_bytes()
    if how == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif how == "garbage":
        weights.write_bytes(b"not at all" * 99)
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "foreign":
        save_file({"some.tensor": torch.zeros(3)}, weights)
    elif how in ("incomplete", "no final norm"):
        tensors = load_file(weights)
        del tensors["model.norm.weight" if how == "no final norm" else "model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights)
    elif how == "pickled":
        weights.rename(checkpoint / "pytorch_model.bin")
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "broken config":
        config.write_text("{")
    elif how == "config of another size":
        edit_json(config, hidden_size=128)
    elif how == "impossible config":
        edit_json(config, hidden_size="wide")
    elif how == "unknown type":
        edit_json(config, model_type="gpt2")
    elif how == "unknown activation":
        edit_json(config, hidden_act="gelu")
    elif how == "unknown rope":
        edit_json(config, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    elif how == "quantised elsewhere":
        edit_json(config, quantization_config={"quant_method": "gptq", "bits": 4})


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "damaged or not a safetensors"),
        ("garbage", "damaged or not a safetensors"),
        ("empty", "damaged or not a safetensors"),
        ("foreign", "has no tensor 'model.layers.0"),
        ("incomplete", r"has no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        ("no final norm", "has no tensor 'model.norm.weight'"),
        ("pickled", "pickled weights only"),
        ("no weights", "no .*safetensors"),
        ("no config", "config.json is missing"),
        ("broken config", "cannot be read as JSON"),
        ("config of another size", "has shape .*implies"),
        ("impossible config", "is not valid"),
        ("unknown type", "'gpt2' is not supported.*llama"),
        ("unknown activation", "'gelu' is not supported"),
        ("unknown rope", "'dynamic' is not supported"),
        ("quantised elsewhere", "is quantised"),
    ],
)
def test_checkpoints_that_cannot_be_used(refused, checkpoint, tmp_path, how, says):
    damage(checkpoint, how)
    before = contents(tmp_path)
    refused("quantize", checkpoint, tmp_path / "out", says=says)
    refused("generate", "x", "--overlay", checkpoint, says=says)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(refused, checkpoint, tmp_path, value):
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = value
    save_file(tensors, checkpoint / "model.safetensors")
    refused(
        "quantize", checkpoint, tmp_path / "out", *FAST, says=f"{name}' holds NaN or infinite", alone=False
    )
    refused("quantize", checkpoint, tmp_path / "out", *SMALL, says="holds NaN or infinite", alone=False)
    refused("generate", "x", "--overlay", checkpoint, says="holds NaN or infinite")
    refused("inspect", checkpoint, "--verify", says="holds NaN or infinite", alone=False)
    assert not (tmp_path / "out").exists()


def test_no_tokenizer(refused, checkpoint, tmp_path):
    (checkpoint / "tokenizer.json").write_text("{")
    for command in (("quantize", checkpoint, tmp_path / "out"), ("generate", "x", "--overlay", checkpoint)):
        refused(*command, says="tokenizer in .* cannot be loaded")
    (checkpoint / "tokenizer.json").unlink()
    for command in (("quantize", checkpoint, tmp_path / "out"), ("generate", "x", "--overlay", checkpoint)):
        refused(*command, says="no tokenizer.json")


def test_what_needs_an_overlay_says_so(refused, tiny_checkpoint):
    refused("calibrate", tiny_checkpoint, says="is not a dpllm overlay")
    refused("eval", "--overlay", tiny_checkpoint, says="is not quantised")
    refused("generate", "x", "--overlay", tiny_checkpoint, "--target-bits", 3, says="is not quantised")
    refused("generate", "x", "--overlay", tiny_checkpoint, "--bits", 3, says="is not quantised")
    refused("generate", "x", "--overlay", tiny_checkpoint, "--resident-bits", 3, says="is not quantised")
    refused("generate", "x", "--overlay", tiny_checkpoint, "--max-memory", "1GB", says="is not quantised")


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
    assert contents(overlay) == before
    ok(*arguments)
    ok("inspect", tmp_path / "out", "--verify")


# -- bad input: overlays and profiles ---------------------------------------------------------------------


def test_overlays_that_are_not_there(refused, tmp_path):
    nowhere = tmp_path / "nowhere"
    refused("generate", "x", "--overlay", nowhere, says="is no directory")
    refused("generate", "x", "--overlay", nowhere, "--max-memory", "1GB", says="is not a directory")
    refused("eval", "--overlay", nowhere, says="is no directory")
    refused("calibrate", nowhere, says="is not a directory")
    refused("inspect", nowhere, says="does not exist")
    refused("inspect", tmp_path, says="config.json is missing")


def test_an_overlay_of_a_newer_format(refused, overlay):
    quantization = json.loads((overlay / "config.json").read_text())["quantization_config"]
    edit_json(overlay / "config.json", quantization_config=quantization | {"format_version": 2})
    for command in (("generate", "x", "--overlay"), ("eval", "--overlay"), ("calibrate",), ("inspect",)):
        refused(*command, overlay, says="format_version is 2, this dpllm reads 1")


@pytest.mark.parametrize("how", ["truncated", "garbage", "foreign", "flipped", "removed", "swapped"])
def test_damaged_overlays(refused, overlay, how):
    tensor = "model.layers.1.mlp.up_proj.planes.0"
    path, _ = shard_of(overlay, tensor)
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-7])
    elif how == "garbage":
        path.write_bytes(b"\x00" * len(content))
    elif how == "foreign":
        save_file({"x": torch.zeros(2)}, path)
    elif how == "flipped":
        flip(overlay, tensor)
    elif how == "removed":
        path.unlink()
    else:
        other, _ = shard_of(overlay, "model.layers.0.mlp.up_proj.planes.0")
        path.write_bytes(other.read_bytes())
    before = contents(overlay)
    for command in (("generate", "x", "--overlay"), ("eval", "--overlay"), ("calibrate",)):
        refused(*command, overlay, says=re.escape(path.name))
    refused("inspect", overlay, "--verify", says=re.escape(path.name), alone=False)
    assert contents(overlay) == before


def test_an_altered_side_file(refused, overlay):
    edit_json(overlay / "config.json", max_position_embeddings=9)
    refused("generate", "x", "--overlay", overlay, says="config.json was altered")


def test_a_profile_of_another_overlay(refused, overlay):
    path = overlay / "profile.safetensors"
    replace(CalibrationProfile.load(path), overlay_hash="0" * 64).save(path)
    for command in (("generate", "x", "--overlay"), ("eval", "--overlay"), ("inspect",)):
        refused(*command, overlay, says="calibrated for another overlay.*dpllm calibrate")


def test_damaged_profiles(refused, ok, overlay):
    path = overlay / "profile.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-1], b"", b"x" * 99, content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]):
        path.write_bytes(damaged)
        refused("generate", "x", "--overlay", overlay, says="profile.*Run dpllm calibrate again")
        refused("inspect", path, says="profile.*Run dpllm calibrate again")
    ok("calibrate", overlay, *SMALL)  # as it says
    ok("generate", "x", "--overlay", overlay, "--max-new-tokens", 2)


def test_policies_that_need_a_profile(refused, ok, overlay):
    (overlay / "profile.safetensors").unlink()
    for policy in ("static", "rate-distortion"):
        refused(
            "generate",
            "x",
            "--overlay",
            overlay,
            "--policy",
            policy,
            "--target-bits",
            3,
            says="Run: dpllm calibrate",
        )
    refused("eval", "--overlay", overlay, says="Run: dpllm calibrate")
    assert ok("generate", "x", "--overlay", overlay, "--json").json["effective_bits"] == 6


def test_one_stored_width_leaves_nothing_to_calibrate(ok, refused, tiny_checkpoint, tmp_path):
    ok("quantize", tiny_checkpoint, tmp_path / "out", "--bits", "4-4", *FAST)
    assert ok("generate", "x", "--overlay", tmp_path / "out", "--json").json["effective_bits"] == 4
    refused("calibrate", tmp_path / "out", says="one width only")


# -- the real process -------------------------------------------------------------------------------------


def process(*args, **options) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dpllm", *map(str, args)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options,
    )  # fmt: skip


def test_process_answers_on_stdout_and_talks_on_stderr(tiny_overlay):
    """As a script sees it: prompt through a pipe, JSON on the last line."""
    arguments = ("generate", "-", "--overlay", tiny_overlay, "--max-new-tokens", 5, "--resident-bits", 4)
    run = process(*arguments, "--json")
    out, err = run.communicate(b"import os\n")
    assert run.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["new_tokens"] == 5
    assert len(out.splitlines()) == len(err.splitlines()) == 1
    assert b"resident: 4 planes" in err


def test_process_refuses_in_one_line(tiny_overlay):
    run = process("generate", "-", "--overlay", tiny_overlay)
    out, err = run.communicate(b"caf\xe9")
    complaint(Result(run.returncode, out.decode(), err.decode()), alone=True)
    assert b"UTF-8" in err


def test_a_reader_that_goes_away(tiny_overlay):
    run = process("generate", "x", "--overlay", tiny_overlay, "--max-new-tokens", 200)
    run.stdout.close()
    run.stdin.close()
    err = run.stderr.read()
    run.stderr.close()
    assert run.wait() == 1  # typer's answer; no trace of it
    assert err == b""


@pytest.mark.parametrize("taken_for", [ValueError("no shape"), InputError("a damaged file."), None])
def test_ctrl_c_is_what_it_is(monkeypatch, capsys, taken_for):
    """Whatever the library that was at work made of it."""

    def work(standalone_mode):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            if taken_for is not None:
                raise taken_for from None
            raise

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(cli, "app", work)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_interrupted_quantisation_can_be_continued(ok, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    build_model("llama", **sizes).save_pretrained(tmp_path / "model")
    arguments = ("quantize", tmp_path / "model", tmp_path / "out", *FAST)

    def default_sigint() -> None:  # whoever runs the tests in the background has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    run = process(*arguments, preexec_fn=default_sigint)
    while run.poll() is None and not list(tmp_path.glob("out.partial/model-*.safetensors")):
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate()
    assert run.returncode == 130, err
    assert b"Traceback" not in err and out == b""
    assert not (tmp_path / "out").exists()
    done = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("out.partial/model-*.safetensors")}
    assert done
    ok(*arguments)
    assert {n: (tmp_path / "out" / n).stat().st_mtime_ns for n in done} == done, "finished layers were kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    ok("inspect", tmp_path / "out", "--verify")
