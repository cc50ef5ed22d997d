"""Results are compared with the code that they measured: in a repository made here, and the table with this one."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from git_repository import DAY, Repository

from bench import stale
from bench.common import evidence
from bench.common.checkout import Checkout
from bench.common.evidence import EVIDENCE, Evidence, evidence_of
from bench.stale import Age, ages, show

ROOT = Path(__file__).resolve().parents[2]
SPEED = Evidence("bench.cpu.speed", ("kernels", "dpllm/engine.py"), ("--only", "a;b"))
CODE = "".join(f"line_{i} = {i}\n" for i in range(20))


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Repository:
    monkeypatch.setattr(evidence, "EVIDENCE", {"speed": SPEED, "gpu_*": SPEED})
    made = Repository(tmp_path / "checkout")
    for path in ("kernels/cpu/a.py", "dpllm/engine.py", "dpllm/other.py", "bench/cpu/speed.py"):
        made.write(path, f"# {path}\n{CODE}")
    made.commit("first", day=1)
    return made


def measured(repository: Repository, commit: str, bench: str = "speed") -> None:
    repository.write(f"bench/results/{bench}-cpu.json", json.dumps({"bench": bench, "commit": commit}))
    repository.commit("a result", day=2)


def age(repository: Repository, day: int = 2) -> Age:
    [found] = ages(Checkout(repository.root), day * DAY)
    return found


def edit(repository: Repository, path: str, subject: str, day: int = 3) -> str:
    repository.write(path, f"# edited for: {subject}\n{CODE}")
    return repository.commit(subject, day)


def test_a_result_of_the_newest_code_is_current(repository):
    commit = repository.commit("empty", day=1)
    measured(repository, commit)
    found = age(repository)
    assert found == Age("speed-cpu.json", "speed", commit, False, behind=1, days=1.0, command=SPEED.command)
    assert found.reasons == []


@pytest.mark.parametrize(
    "path", ["kernels/cpu/a.py", "kernels/new.py", "dpllm/engine.py", "bench/cpu/speed.py"]
)
def test_an_edit_of_what_it_exercises_makes_it_stale(repository, path):
    measured(repository, repository.commit("measured", day=2))
    edit(repository, "dpllm/other.py", "elsewhere")
    assert age(repository).reasons == []
    first = edit(repository, path, "one")
    assert age(repository).last == f"{first} one"
    last = edit(repository, path, "two", day=9)
    found = age(repository, day=12)
    assert found.reasons == ["stale"] and found.touched == 2 and found.last == f"{last} two"
    assert found.behind == 4 and found.days == 10.0


def test_deleting_counts(repository):
    measured(repository, repository.commit("measured", day=1))
    repository.git("rm", "--quiet", "kernels/cpu/a.py")
    repository.commit("deleted", day=3)
    assert age(repository).reasons == ["stale"]


def test_files_are_followed_through_moves(repository):
    """Code that came into the folder by a move was edited before it, under its earlier name."""
    repository.write("old/b.py", f"# b\n{CODE}")
    measured(repository, repository.commit("measured", day=1))
    repository.git("mv", "old/b.py", "old/c.py")
    repository.commit("moved once", day=3)
    edited = edit(repository, "old/c.py", "edited under an earlier name")
    repository.git("mv", "old/c.py", "kernels/c.py")
    repository.commit("moved twice", day=4)
    found = age(repository)
    assert found.touched == 1 and found.last == f"{edited} edited under an earlier name"


def test_a_move_alone_changes_nothing(repository):
    measured(repository, repository.commit("measured", day=1))
    repository.git("mv", "kernels/cpu/a.py", "kernels/cpu/b.py")
    repository.commit("moved", day=3)
    assert age(repository).reasons == []


def test_an_edit_on_a_branch_that_does_not_know_of_the_move(repository):
    measured(repository, repository.commit("measured", day=1))
    repository.git("checkout", "--quiet", "-b", "side")
    edited = edit(repository, "kernels/cpu/a.py", "on the side", day=4)
    repository.git("checkout", "--quiet", "-")
    repository.git("mv", "kernels/cpu/a.py", "kernels/cpu/b.py")
    repository.commit("moved", day=3)
    repository.git("merge", "--quiet", "--no-edit", "side")
    assert age(repository).last == f"{edited} on the side"


def test_results_of_edited_work_trees_are_marked(repository, capsys):
    commit = repository.commit("measured", day=1)
    measured(repository, commit + "+")
    found = age(repository)
    assert found.commit == commit and found.dirty and found.reasons == ["edited work tree"]
    show([found])
    assert f"{commit}+" in capsys.readouterr().out


@pytest.mark.parametrize("commit", ["1234567", "unknown"])
def test_a_commit_that_the_history_lacks(repository, commit, capsys):
    measured(repository, commit)
    found = age(repository)
    assert found.behind is None and found.days is None and found.reasons == ["unknown commit"]
    show([found])
    assert "unknown commit" in capsys.readouterr().out


def test_a_commit_of_another_branch_is_not_in_the_history(repository):
    repository.git("checkout", "--quiet", "-b", "side")
    commit = edit(repository, "dpllm/other.py", "abandoned")
    repository.git("checkout", "--quiet", "-")
    measured(repository, commit)
    assert age(repository).reasons == ["unknown commit"]


def test_results_without_an_entry(repository):
    measured(repository, repository.commit("measured", day=1), bench="unheard-of")
    assert age(repository).reasons == ["not in bench/common/evidence.py"]


def test_names_with_a_shape_share_an_entry(repository):
    assert evidence_of("gpu_3B") is SPEED and evidence_of("tpu_3B") is None


def test_what_is_shown(repository, capsys):
    commit = repository.commit("measured", day=1)
    measured(repository, commit)
    measured(repository, commit, bench="gpu_3B")
    show(ages(Checkout(repository.root), 2 * DAY))
    assert capsys.readouterr().out == "2 of 2 results are current.\n"
    edit(repository, "kernels/cpu/a.py", "faster [bold]")
    show(ages(Checkout(repository.root), 4 * DAY))
    out = capsys.readouterr().out
    assert "speed-cpu.json" in out and "gpu_3B-cpu.json" in out and "faster [bold]" in out
    assert out.count("python -m bench.cpu.speed --only 'a;b'") == 1
    assert out.endswith("0 of 2 results are current.\n")


def test_json(repository, capsys, monkeypatch):
    measured(repository, repository.commit("measured", day=1))
    monkeypatch.setattr(stale, "Checkout", lambda: Checkout(repository.root))
    monkeypatch.setattr("sys.argv", ["stale", "--json"])
    stale.main()
    found = json.loads(capsys.readouterr().out)
    assert found["head"] == repository.git("rev-parse", "--short", "HEAD").strip()
    [result] = found["results"]
    assert result["file"] == "speed-cpu.json" and result["reasons"] == [] and result["touched"] == 0


def test_without_a_history_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(stale, "Checkout", lambda: Checkout(tmp_path))
    monkeypatch.setattr("sys.argv", ["stale"])
    with pytest.raises(SystemExit, match="no checkout"):
        stale.main()


# -- the table, and this repository -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVIDENCE)
def test_paths_of_the_table_exist(name):
    missing = [p for p in EVIDENCE[name].paths if not (ROOT / p).exists()]
    assert not missing


def test_every_result_has_an_entry():
    files = sorted((ROOT / "bench" / "results").glob("*.json"))
    assert files
    assert [f.name for f in files if evidence_of(json.loads(f.read_text())["bench"]) is None] == []


def scripts_that_report() -> set[str]:
    """Modules of bench/ that call `report` or `finish` with a run."""
    found = set()
    for path in sorted((ROOT / "bench").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("run.report", "finish") and path.stem != "gpu_common":
                found.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found


def test_every_script_that_reports_has_an_entry():
    assert {e.script for e in EVIDENCE.values()} == scripts_that_report()


def test_every_script_is_in_the_readme():
    text = (ROOT / "bench" / "README.md").read_text()
    runs = [p for p in sorted((ROOT / "bench").rglob("*.py")) if '__name__ == "__main__"' in p.read_text()]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in runs]
    assert [n for n in names if f"`{n}`" not in text] == []
