"""A result says what ran, and is written only where its commit is the code that ran."""

from __future__ import annotations

import json
import sys

import pytest
from cpu_cases import needs_library
from git_repository import Repository

from bench.common import report as module
from bench.common.checkout import Checkout
from bench.common.report import arguments, begin, instruction_set, processor, torch_instruction_set

ROWS = [{"bits": 3, "ms": 1.25}, {"bits": 4, "ms": 1.5}]


@pytest.fixture
def repository(tmp_path) -> Repository:
    made = Repository(tmp_path / "checkout")
    made.write("dpllm/code.py", "x = 1\n")
    made.write("bench/results/old-cpu.json", "{}\n")
    made.commit("first")
    return made


def began(repository: Repository, *argv: str, **options):
    return begin(arguments("").parse_args(list(argv)), checkout=Checkout(repository.root), **options)


def written(repository: Repository, name: str = "speed") -> dict | None:
    path = repository.root / "bench" / "results" / f"{name}-cpu.json"
    return json.loads(path.read_text()) if path.exists() else None


def printed(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(call, capsys) -> str:
    """The line that a call ends the process with."""
    with pytest.raises(SystemExit) as ended:
        call()
    assert isinstance(ended.value.code, str), "a message, and so exit code 1"
    assert "\n" not in ended.value.code
    return ended.value.code


def test_a_clean_work_tree_writes(repository, capsys):
    run = began(repository)
    run.report("speed", ROWS, threads=2)
    found = written(repository)
    assert found == printed(capsys)
    assert found["rows"] == ROWS and found["threads"] == 2 and found["bench"] == "speed"
    assert found["commit"] == repository.git("rev-parse", "--short", "HEAD").strip()
    assert found["processor"] == processor() and found["instruction_set"] == instruction_set()


@pytest.mark.parametrize(
    ("path", "text"), [("dpllm/code.py", "x = 2\n"), ("scratch.py", ""), ("built/x", "")]
)
def test_an_edited_work_tree_is_refused_before_measuring(repository, capsys, path, text):
    repository.write(path, text)
    said = refused(lambda: began(repository), capsys)
    assert said.startswith("bench: Nothing is measured: the work tree has edits")
    assert path in said and "--allow-dirty" in said


def test_moved_and_deleted_files_are_edits(repository, capsys):
    repository.git("mv", "dpllm/code.py", "dpllm/moved.py")
    assert Checkout(repository.root).edits() == ["dpllm/moved.py"]
    repository.git("rm", "--quiet", "--cached", "dpllm/moved.py")
    (repository.root / "dpllm" / "moved.py").unlink()
    assert Checkout(repository.root).edits() == ["dpllm/code.py"]


def test_many_edits_are_counted(repository, capsys):
    for i in range(9):
        repository.write(f"new{i}.py", "")
    assert "(new0.py, new1.py, new2.py and 6 more)" in refused(lambda: began(repository), capsys)


def test_results_and_work_directories_are_not_edits(repository, capsys):
    repository.write("bench/results/old-cpu.json", "{} \n")
    repository.write("bench/results/new-cpu.json", "{}\n")
    repository.write("build/cells/1.json", "{}\n")
    began(repository).report("speed", ROWS)
    assert written(repository)["commit"][-1] != "+"


def test_tracked_files_in_build_are_edits(repository, capsys):
    repository.write("build/made.py", "")
    repository.commit("a file in build/")
    repository.write("build/made.py", "x")
    assert "build/made.py" in refused(lambda: began(repository), capsys)


@pytest.mark.parametrize("edited", [False, True])
def test_allow_dirty_prints_without_writing(repository, capsys, edited):
    if edited:
        repository.write("dpllm/code.py", "x = 2\n")
    began(repository, "--allow-dirty").report("speed", ROWS)
    assert printed(capsys)["commit"].endswith("+") == edited
    assert written(repository) is None


def test_a_run_without_meaning_is_printed(repository, capsys):
    repository.write("dpllm/code.py", "x = 2\n")
    began(repository, writes=False).report("speed", ROWS)
    assert printed(capsys)["rows"] == ROWS and written(repository) is None


def test_edits_made_during_the_run_are_refused_after_printing(repository, capsys):
    run = began(repository)
    repository.write("dpllm/code.py", "x = 2\n")
    said = refused(lambda: run.report("speed", ROWS), capsys)
    assert said.startswith("bench: The result above is not written")
    assert printed(capsys)["rows"] == ROWS and written(repository) is None


def test_the_commit_is_that_of_the_beginning(repository, capsys):
    run = began(repository)
    repository.write("dpllm/code.py", "x = 2\n")
    assert repository.commit("during the run") != run.commit
    run.report("speed", ROWS)
    assert written(repository)["commit"] == run.commit


def test_outside_a_checkout(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    args, checkout = arguments("").parse_args([]), Checkout(tmp_path)
    assert "no checkout" in refused(lambda: begin(args, checkout=checkout), capsys)
    args = arguments("").parse_args(["--allow-dirty"])
    assert begin(args, checkout=checkout).commit == "unknown"


def test_what_ran_may_be_named(repository, capsys):
    began(repository).report("speed", ROWS, hardware="a GPU", instructions="sm_90")
    found = written(repository)
    assert (
        found["device"] == "a GPU"
        and found["instruction_set"] == "sm_90"
        and found["processor"] == processor()
    )


# -- processor, instruction set, command ------------------------------------------------------------------------


def test_processors_of_one_name_are_told_apart(tmp_path):
    text = "processor : 0\nmodel name : Same\ncpu family : 25\nmodel : {}\nstepping : 1\n\nprocessor : 1\nmodel : 9\n"
    found = []
    for i in (1, 17):
        (tmp_path / "cpuinfo").write_text(text.format(i))
        found.append(processor(tmp_path / "cpuinfo"))
    assert found[0].endswith(" (cpu family 25, model 1, stepping 1)")
    assert found[1].endswith(" (cpu family 25, model 17, stepping 1)")
    assert "(" not in processor(tmp_path / "absent").removeprefix(module.processor_name())


@needs_library
def test_the_instruction_set_is_the_backends():
    from dpllm.kernels.backend import choose_backend

    assert instruction_set() == choose_backend("cpu").name


def test_instruction_sets_without_our_library(monkeypatch):
    def absent():
        raise OSError("not built")

    monkeypatch.setattr(module, "instruction_sets", absent)
    assert instruction_set() == "reference"
    assert torch_instruction_set().startswith("torch:")


def test_the_instruction_set_of_a_gpu_is_its_compute_capability(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert instruction_set("cuda") == "sm_90"


def test_the_command_can_be_given_to_a_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ignored", "--only", "a step;another"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", type("Spec", (), {"name": "bench.cpu.cpu_load"}))
    assert module.command() == "python -m bench.cpu.cpu_load --only 'a step;another'"
