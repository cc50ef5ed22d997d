"""`dpllm generate` and `dpllm eval`: JSON as documented, the same text for people, and refused options."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from command_line import contents, flip

from dpllm.quant.overlay import Overlay


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
    assert ok("generate", "-", *arguments, stdin="\ufeffclass A:\n").json["text"] == given, (
        "a byte order mark"
    )


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
    (("generate", "x", "--threads", "0"), "0 threads are not possible"),
    (("generate", "x", "--threads", "-2"), "-2 threads are not possible"),
    (("generate", "x", "--resident-bits", "9"), "resident_bits=9"),
    (("generate", "x", "--resident-bits", "1"), "resident_bits=1"),
    (("generate", "x", "--max-memory", "10kB"), "needs .* even at 2 bits"),
    (("generate", "x", "--max-memory", "plenty"), "'plenty' is not a size"),
    (("generate", "x", "--max-memory", "1e999"), "is not a size"),
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
    (("eval", "--target-bits", ""), "not a list of numbers"),
    (("eval", "--target-bits", "3;4"), "not a list of numbers"),
    (("eval", "--target-bits", "nan"), "not finite"),
    (("eval", "--target-bits", "3,inf", "--policy", "uniform"), "not finite"),
    (("eval", "--target-bits", "3,7"), "target 7 bits is impossible"),
    (("eval", "--context", "1"), "--context 1 is too short"),
    (("eval", "--max-tokens", "-1"), "--max-tokens"),
    (("eval", "--seed", "-1"), "--seed"),
    (("eval", "--threads", "0"), "0 threads are not possible"),
    (("eval", "--backend", "fpga"), "unknown kernel backend"),
]


@pytest.mark.parametrize(("arguments", "says"), USAGE)
def test_impossible_wishes(refused, tiny_overlay, arguments, says):
    before = contents(tiny_overlay)
    refused(*arguments, "--overlay", tiny_overlay, says=says)
    assert contents(tiny_overlay) == before


def test_empty_standard_input(refused, tiny_overlay):
    refused("generate", "-", "--overlay", tiny_overlay, stdin="", says="prompt is empty")


@pytest.mark.parametrize(
    "command",
    [("generate", "text"), ("eval",), ("profile",), ("plan", "--tpot-ms", "9"), ("bench", "--model", "tiny"),
     ("report",), ("context", "build", "-", "-o", "ctx")],
)  # fmt: skip
def test_devices_of_commands_that_decode(refused, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("a text"))
    refused(*command, "--device", "tpu", says="device 'tpu' is unknown")
    if not torch.cuda.is_available():
        refused(*command, "--device", "cuda", says="sees no CUDA device")
    assert list(tmp_path.iterdir()) == []
