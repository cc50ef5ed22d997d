"""Commands that messages print: a shell takes them apart, and the command line takes them, whatever the paths hold."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
from typer.main import get_command

from dpllm.calib.runtime.profile import PROFILE_NAME
from dpllm.commands.main import app

AWKWARD = """it's [bold] a "b" :b: $c [/x]"""
LEADS = ("Run: ", "Make one: ", "Make an overlay: ", "ask it: ", "next: ")


def parsed(text: str) -> tuple[str, dict]:
    """The command that the last line of a message prints: (name, parameters), as the command line reads it."""
    line = text.splitlines()[-1]
    lead = next(lead for lead in LEADS if lead in line)
    program, *words = shlex.split(line.split(lead)[1])
    assert program == "dpllm"
    command, name = get_command(app), "dpllm"
    context = command.make_context(name, [], resilient_parsing=True)
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
    return name, command.make_context(name, list(words), parent=context).params


@pytest.fixture
def copied(tmp_path):
    """A copy of a model at a path that no shell takes as it stands."""

    def copy(model):
        return shutil.copytree(model, tmp_path / AWKWARD / model.name)

    return copy


@pytest.mark.parametrize("command", [
    ("eval", "--overlay"), ("report", "x", "--overlay"), ("generate", "x", "--bits", "3", "--overlay"),
    ("generate", "x", "--resident-bits", "3", "--overlay"), ("bench",), ("calibrate",),
])  # fmt: skip
def test_a_model_that_is_not_quantised(dpllm, tiny_checkpoint, copied, command):
    path = copied(tiny_checkpoint)
    result = dpllm(*command, path)
    assert result.code == 2
    name, given = parsed(result.err)
    assert (name, given["model"]) == ("quantize", str(path))


def test_a_model_that_is_not_calibrated_or_whose_profile_is_damaged(dpllm, tiny_overlay, copied):
    path = copied(tiny_overlay)
    (path / PROFILE_NAME).write_bytes(b"x")
    for command in (("generate", "x", "--overlay"), ("report", "x", "--overlay")):
        name, given = parsed(dpllm(*command, path).err)
        assert (name, given["overlay"]) == ("calibrate", str(path))
    (path / PROFILE_NAME).unlink()
    for command in (("report", "x", "--overlay"), ("plan", "--tpot-ms", 5, "--overlay")):
        name, given = parsed(dpllm(*command, path).err)
        assert (name, given["overlay"]) == ("calibrate", str(path))


def test_a_context_is_asked_with_the_model_and_machine_that_made_it(
    ok, dpllm, tiny_overlay, tiny_checkpoint, copied, monkeypatch, tmp_path
):
    path, target = copied(tiny_overlay), tmp_path / AWKWARD / "context"
    (tmp_path / "text.txt").write_text("The bees live in the attic. " * 4)
    monkeypatch.chdir(path.parent)
    built = ok("context", "build", tmp_path / "text.txt", "--overlay", path.name, "-o", target, "--kv-policy", "knorm",
               "--backend", "reference", "--threads", 1)  # fmt: skip
    name, given = parsed(built.err)
    assert (name, given["overlay"], given["context"]) == ("generate", path.name, str(target))
    assert (given["backend"], given["threads"]) == ("reference", 1)

    def advice(*model) -> list[str]:
        result = dpllm("generate", "x", "--context", target, *model)
        assert result.code == 2
        return shlex.split(result.err.splitlines()[-1].split(" Give ")[-1].split(", or build")[0])

    assert (
        advice() == advice("--overlay", tiny_checkpoint) == ["--overlay", str(path)]
    )  # from any working directory
    manifest = json.loads((target / "context.json").read_text())
    manifest["model"]["path"] = "gone"
    (target / "context.json").write_text(json.dumps(manifest))
    assert (
        "made with --overlay gone, which is not there now" in dpllm("generate", "x", "--context", target).err
    )
    assert ok(
        "generate", "x", "--context", target, "--overlay", path, "--max-new-tokens", 1
    )  # of before: still loads


def test_a_folder_that_is_no_context(dpllm, tiny_overlay, tmp_path):
    result = dpllm("generate", "x", "--overlay", tiny_overlay, "--context", tmp_path / AWKWARD)
    name, given = parsed(result.err)
    assert (name, given["out"]) == ("build", str(tmp_path / AWKWARD))
