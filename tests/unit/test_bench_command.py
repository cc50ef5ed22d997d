"""`dpllm bench`: the contract's keys, figures that agree with each other, and bad input."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from cpu_cases import needs_library

from dpllm.base.machine import usable_cores
from dpllm.commands import bench
from dpllm.commands.main import main
from dpllm.model import memory

SHORT = ("--prompt", "8", "--new-tokens", "3")
CONTRACT = {"results", "stream_gb_per_s", "device", "threads", "backend"}
ROW = {"bits", "prefill_tokens_per_s", "decode_tokens_per_s", "gb_per_s", "stream_fraction"}


@pytest.fixture
def run(capsys, monkeypatch):
    """(exit code, stdout, stderr) of `dpllm bench`; the bandwidth is measured over little memory."""
    monkeypatch.setattr(bench, "STREAM_BYTES", 1 << 23)

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["dpllm", "bench", *map(str, args)])
        threads = torch.get_num_threads()
        try:
            with pytest.raises(SystemExit) as e:
                main()
        finally:
            torch.set_num_threads(threads)
        return e.value.code, *capsys.readouterr()

    return command


@pytest.fixture
def report(run):
    def command(*args):
        code, out, err = run(*args, "--json")
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    return command


@pytest.fixture
def refused(run):
    """One clear line, exit code 2."""

    def command(*args, says: str, alone: bool = True):
        code, out, err = run(*args)
        lines = err.splitlines()
        assert (code, out) == (2, ""), (out, err)
        assert lines[-1].startswith("dpllm: ") and says in lines[-1], err
        assert len(lines) == 1 or not alone, err

    return command


# -- figures ------------------------------------------------------------------------------------------------


@needs_library
def test_json(report):
    found = report("--model", "tiny", "--bits", "2,4,8", *SHORT, "--threads", 1)
    assert set(found) >= CONTRACT
    assert found["device"] == "cpu"
    assert found["threads"] == 1
    assert found["backend"].startswith("cpu:")
    assert found["accuracy"] == "balanced"
    assert (found["model"], found["measured_on"], found["context"]) == ("tiny", "random weights", 0)
    assert found["stream_gb_per_s"] > 0
    assert [r["bits"] for r in found["results"]] == [2, 4, 8]
    for row in found["results"]:
        assert set(row) >= ROW
        assert row["prefill_tokens_per_s"] > 0
        assert row["decode_ms"]["p50"] <= row["decode_ms"]["p90"]
        assert row["decode_tokens_per_s"] == pytest.approx(1e3 / row["decode_ms"]["p50"], rel=0.01)
        rate = row["bytes_per_token"] * row["decode_tokens_per_s"] / 1e9
        assert row["gb_per_s"] == pytest.approx(rate, abs=0.006)
        assert row["stream_fraction"] == pytest.approx(rate / found["stream_gb_per_s"], abs=0.002)


@needs_library
def test_bytes_are_those_that_a_token_reads(report):
    """Planes, tables and scales of every matrix, the head, and the pairs in the cache."""
    shapes = [(512, 256), (256, 256), (1536, 256), (256, 768)]  # qkv, o, gate/up, down

    def weights(bits):
        tables = sum(n * 2 ** min(bits, 6) * 2 for n, _ in shapes)
        return 8 * (sum(n * k * bits // 8 for n, k in shapes) + tables) + 4096 * 256 + 4096 * 2

    for context in (0, 100):
        found = report("--model", "tiny", "--bits", "3,7", *SHORT, "--context", context)
        pairs = 2 * 8 * 2 * 64 * 2 * (context + 1)
        assert [r["bytes_per_token"] for r in found["results"]] == [weights(b) + pairs for b in (3, 7)]


@needs_library
def test_an_overlay(report, tiny_overlay):
    found = report("--model", tiny_overlay, "--bits", "6,2", *SHORT, "--accuracy", "exact")
    assert [r["bits"] for r in found["results"]] == [6, 2]
    assert (found["measured_on"], found["accuracy"]) == ("overlay", "exact")
    assert found["threads"] == usable_cores()


@needs_library
def test_without_a_prompt(report):
    found = report(
        "--model", "tiny", "--bits", "3", "--prompt", 0, "--new-tokens", 9, "--backend", "cpu:portable"
    )
    assert found["results"][0]["prefill_tokens_per_s"] is None
    assert found["backend"] == "cpu:portable"


@needs_library
def test_three_ways_to_name_a_model(report, refused, tiny_overlay):
    short = ("--bits", "3", *SHORT)
    assert report(tiny_overlay, *short)["measured_on"] == "overlay"
    assert report("--shape", "tiny", *short)["measured_on"] == "random weights"
    refused(tiny_overlay, "--shape", "tiny", says="give one of them")
    refused("--model", "tiny", "--shape", "tiny", says="give one of them")
    refused("--shape", tiny_overlay, says="nor a known shape")


def test_the_reference_backend(report):
    found = report("--model", "tiny", "--bits", "3", *SHORT, "--backend", "reference")
    assert (found["backend"], found["accuracy"], found["stream_gb_per_s"]) == ("reference", None, None)
    assert found["results"][0]["stream_fraction"] is None
    assert found["threads"] == torch.get_num_threads()


@needs_library
def test_the_table_for_people(run):
    code, out, err = run("--model", "tiny", "--bits", "3", *SHORT)
    assert code == 0
    assert all(word in out for word in ("prefill", "decode", "MB/token", "GB/s", "random weights"))
    assert "backend cpu:" in err


# -- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["abc", "", "3,,4", "3-5", "3.5"])
def test_widths_that_are_no_list(refused, bits):
    refused("--model", "tiny", "--bits", bits, says="is not a list of widths")


@pytest.mark.parametrize("bits", ["9", "3,9", "0", "1", "-2"])
def test_widths_that_no_model_has(refused, bits):
    refused("--model", "tiny", f"--bits={bits}", says="2 to 8 planes")


def test_widths_that_this_model_lacks(refused, tiny_overlay):
    refused("--model", "tiny", "--bits", "1,3", says="1 bits cannot be read: tiny holds 2..3", alone=False)
    refused("--model", tiny_overlay, "--bits", "3,7", says="7 bits cannot be read")


def test_models_that_cannot_be_measured(refused, tiny_checkpoint):
    refused("--model", "70B", says="neither a directory nor a known shape. Choose one of: tiny, 1.1B, 3B, 8B")
    refused("--model", tiny_checkpoint, says="not quantised")


@pytest.mark.parametrize(("option", "value"), [("--context", 200_000), ("--prompt", 131_073)])
def test_more_tokens_than_positions(refused, option, value):
    refused("--model", "tiny", "--bits", "2", option, value, says="131072 positions", alone=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--threads", "0"), "at least 1"),
        (("--threads", "-1"), "at least 1"),
        (("--threads", "4096"), "threads are not possible"),
        (("--backend", "abacus"), "unknown kernel backend 'abacus'"),
        (("--accuracy", "best"), "accuracy 'best' is unknown"),
        (("--prompt", "-3"), "--prompt -3"),
        (("--context", "-1"), "--context"),
        (("--new-tokens", "0"), "--new-tokens"),
    ],
)
def test_other_bad_arguments(refused, arguments, says):
    refused("--model", "tiny", "--bits", "2", *arguments, says=says, alone=arguments[0] != "--backend")


def test_a_model_larger_than_the_memory(refused, monkeypatch):
    """Said at once: making the weights would take longer than this suite."""
    monkeypatch.setattr(memory, "available_bytes", lambda: 4_500_000_000)
    refused("--model", "8B", "--bits", "3,4", says="3 planes would fit")
    monkeypatch.setattr(memory, "available_bytes", lambda: 100_000_000)
    refused("--model", "8B", "--bits", "3,4", says="even 2 planes need")
