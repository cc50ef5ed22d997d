"""`dpllm context`, `dpllm generate --context` and `dpllm calibrate --kv-heads`."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

SMALL = ("--chunk", "64")


@pytest.fixture(scope="module")
def text_file(calibration_documents, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "notes.py"
    path.write_text(calibration_documents[1][:500])
    return path


@pytest.fixture
def built(ok, tiny_overlay, text_file, tmp_path) -> Path:
    ok("context", "build", text_file, "--overlay", tiny_overlay, *SMALL, "-o", tmp_path / "ctx")
    return tmp_path / "ctx"


def test_build(ok, tiny_overlay, text_file, tmp_path):
    where = ("--overlay", tiny_overlay, "-o", tmp_path / "ctx")
    result = ok("context", "build", text_file, *where, *SMALL, "--keep", 0.25, "--json")
    said = result.json
    assert said["kept_ratio"] == pytest.approx(0.25, abs=1e-3)
    assert said["nbytes"] == pytest.approx(0.25 * said["full_nbytes"], rel=1e-2)
    assert said["fewest_pairs_of_a_head"] < said["most_pairs_of_a_head"], "heads hold unlike numbers of pairs"
    assert (tmp_path / "ctx" / "context.json").is_file() and said["policy"] == "kvzip"


def test_a_byte_order_mark_is_not_read(ok, tiny_overlay, text_file, tmp_path):
    marked = tmp_path / "marked.txt"
    marked.write_text(text_file.read_text(), "utf-8-sig")
    build = ("--overlay", tiny_overlay, *SMALL, "--json")
    tokens = [
        ok("context", "build", text, *build, "-o", tmp_path / text.stem).json["tokens"]
        for text in (text_file, marked)
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("budget", "kept"), [(("--keep-tokens", 60), lambda n: 60 / n), (("--keep-memory", "64kB"), None)]
)
def test_other_budgets(ok, tiny_overlay, text_file, tmp_path, budget, kept):
    said = ok(
        "context", "build", text_file, "--overlay", tiny_overlay, *SMALL, *budget, "-o", tmp_path / "ctx", "--json"
    ).json  # fmt: skip
    if kept is None:
        assert 63_000 < said["nbytes"] <= 64_000
    else:
        assert said["kept_ratio"] == pytest.approx(kept(said["tokens"]), abs=1e-3)


def test_the_command_that_asks(ok, tiny_overlay, text_file, tmp_path, monkeypatch):
    """Names the overlay, is quoted, and is not broken."""
    monkeypatch.setenv("COLUMNS", "40")
    out = tmp_path / "my notes"
    said = ok("context", "build", text_file, "--overlay", tiny_overlay, *SMALL, "-o", out).err
    asked = shlex.split(said.splitlines()[-1].removeprefix("ask it: "))
    assert asked == [
        "dpllm", "generate", "--overlay", str(tiny_overlay), "--context", str(out), "your question",
    ]  # fmt: skip


def test_ask(ok, tiny_overlay, built):
    arguments = ("generate", "\n    return", "--overlay", tiny_overlay, "--max-new-tokens", 8)
    said, plain = ok(*arguments, "--context", built, "--json").json, ok(*arguments, "--json").json
    assert said["kv_bytes"] > plain["kv_bytes"]
    assert ok(*arguments, "--context", built, "--json").json["text"] == said["text"]
    assert "% of a context of" in ok(*arguments, "--context", built).err


def test_policies_are_listed(ok):
    listed = ok("context", "policies", "--json").json
    assert {"kvzip", "snapkv", "recent"} <= set(listed["policies"])
    assert all(len(text) > 10 for kind in listed.values() for text in kind.values())
    assert "expected-attention" in ok("context", "policies").out


def test_inspect(ok, built):
    said = ok("inspect", built, "--json").json
    assert said["kind"] == "context" and said["made"]["policy"] == "kvzip"
    assert said["kept_ratio"] == pytest.approx(0.3, abs=1e-3)


def test_heads(ok, refused, tiny_overlay, text_file, tmp_path):
    overlay = shutil.copytree(tiny_overlay, tmp_path / "overlay")
    arguments = (
        "context",
        "build",
        text_file,
        "--overlay",
        overlay,
        "--kv-policy",
        "whole-heads",
        "-o",
        tmp_path / "ctx",
    )
    refused(*arguments, says="--kv-heads", alone=False)
    ok("calibrate", overlay, "--samples", 2, "--sequence-length", 64, "--kv-heads")
    ok(*arguments)
    ok("calibrate", overlay, "--samples", 2, "--sequence-length", 64)
    assert ok("generate", "x", "--context", tmp_path / "ctx", "--overlay", overlay, "--max-new-tokens", 2)
    shutil.rmtree(tmp_path / "ctx")
    ok(*arguments)  # calibrated again without them, the heads stay in the profile


def test_what_build_refuses(refused, tiny_overlay, text_file, tmp_path):
    def build(*arguments, says, text=text_file, **options):
        where = ("--overlay", tiny_overlay, "-o", tmp_path / "ctx")
        refused("context", "build", text, *where, *arguments, says=says, alone=False, **options)
        assert not list(tmp_path.glob("*ctx*")), "nothing half-written"

    build(says="does not exist", text="nowhere.txt")
    build("--keep", 0, says="above 0")
    build("--keep", 1.5, says="above 0, up to 1")
    build("--keep", 0.3, "--keep-tokens", 5, says="exclude each other")
    build("--keep-memory", "lots", says="is not a size")
    build("--keep-tokens", 1, says="are needed")
    build("--kv-policy", "h2o", says="Choose one of")
    build("--allocation", "even", says="Choose one of")
    build("--block", 1, says="at least 32")
    build("--chunk", 512, says="Choose a chunk of")
    build(says="is empty", text="-", stdin=" ")
    build("--chat", *SMALL, says="no chat template")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    build(says="not UTF-8", text=binary)


def test_what_generate_refuses(refused, tiny_overlay, tiny_checkpoint, built, tmp_path):
    def ask(*arguments, says):
        refused("generate", "x", *arguments, says=says, alone=False)

    ask("--overlay", tiny_overlay, "--context", tmp_path / "nowhere", says="is not a saved context")
    ask("--overlay", tiny_checkpoint, "--context", built, says="another model")
    ask("--overlay", tiny_overlay, "--context", built, "--chat", says="not built as a chat")
    manifest = json.loads((built / "context.json").read_text())
    for broken, says in (
        ("[]", "context.json"),
        ("{", "context.json"),
        (json.dumps(manifest | {"tokens": "x"}), "has the wrong type"),
    ):
        (built / "context.json").write_text(broken)
        ask("--overlay", tiny_overlay, "--context", built, says=says)
    (built / "context.json").write_text(json.dumps(manifest))
    (built / "pairs.safetensors").write_bytes(b"")
    ask("--overlay", tiny_overlay, "--context", built, says="is damaged")


def test_a_name_that_is_taken(refused, tiny_overlay, text_file, built):
    arguments = ("context", "build", text_file, "--overlay", tiny_overlay, "-o", built)
    refused(*arguments, says="exists already")
