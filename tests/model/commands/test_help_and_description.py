"""Help, `dpllm context policies`, `dpllm inspect` and `dpllm doctor`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from dpllm import __version__
from dpllm.commands import context
from dpllm.kvzip_bridge.budget import ALLOCATIONS
from dpllm.kvzip_bridge.policies import KV_POLICIES
from dpllm.policies.make import POLICIES

COMMANDS = (
    "quantize", "calibrate", "inspect", "generate", "eval", "report", "demo", "profile", "plan", "doctor", "bench",
    "context build", "context policies",
)  # fmt: skip


@pytest.fixture
def help_of(ok, monkeypatch):
    """A command's help without its frames, in one line."""
    monkeypatch.setenv("COLUMNS", "400")

    def text(command: str) -> str:
        return " ".join(re.sub("[│╭╮╰╯─]", " ", ok(*command.split(), "--help").out).split())

    return text


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


def test_commands_that_do_not_exist(refused):
    refused("quantise", says="quantise")
    refused("inspect", says="directory")


def test_the_panels_of_help(help_of):
    said = help_of("generate")
    assert re.findall(r"(Common|Targets|Machine|Expert) --", said) == [
        "Common", "Targets", "Machine", "Expert",
    ]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_whole_sentences(help_of, command):
    said = help_of(command)
    assert "9223372036854775807" not in said
    assert " Options --" not in said, "every option has a panel"
    for text in re.findall(r"<[a-z\[\] ]+>(?: \[x>=\d\])? (.*?)(?= --[a-z]| \[default| \[required|$)", said):
        assert text[0].isupper(), text


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_help_lists_every_policy(help_of, command):
    said = help_of(command)
    assert all(name in said for name in POLICIES)


def test_threads_and_jobs_are_explained_alike(help_of):
    for command in ("quantize", "calibrate", "generate"):
        assert "Use this number of CPU threads." in help_of(command)
        assert "one per core" in help_of(command)


def test_help_loads_nothing_heavy():
    code = "import sys; sys.argv = ['dpllm', '--help']\nimport dpllm.commands.main as m\ntry: m.main()\n"
    code += "except SystemExit: pass\nprint(*sorted({n.split('.')[0] for n in sys.modules}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "dpllm" in done.stderr.split()
    assert not set(done.stderr.split()) & {"torch", "transformers", "numpy", "safetensors", "scipy"}


def test_context_policies_has_a_line_for_every_name(ok):
    assert list(context.KV_POLICY_LINES) == list(KV_POLICIES)
    assert list(context.ALLOCATION_LINES) == list(ALLOCATIONS)
    assert ok("context", "policies", "--json").json["policies"] == context.KV_POLICY_LINES


def test_context_policies_without_docstrings():
    command = [sys.executable, "-OO", "-m", "dpllm", "context", "policies", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["policies"]["kvzip"].endswith("(KVzip, arXiv:2505.23416).")


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


def test_doctor_for_people(ok):
    shown = ok("doctor").out
    assert "{" not in shown and "processor: " in shown and "Every kernel computes correctly." in shown
    assert re.search(r"│ 4 +│ \d\.\de-\d\d +│", shown), "errors are rounded"
