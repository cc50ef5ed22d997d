"""Checks before the work, files that are replaced as a whole, and what a link leads to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpllm.base.errors import InputError
from dpllm.base.files import remove_leftovers, write_tensors, write_text
from dpllm.base.places import check_readable, check_space, file_to_write, folder_to_make


def refused(check, path: Path, says: str) -> None:
    with pytest.raises(InputError, match=says) as e:
        check(path)
    assert "\n" not in str(e.value)


@pytest.fixture
def place(tmp_path):
    """A folder with a file, folders, and links of every kind."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "x").mkdir(parents=True)
    for name, to in {"to-file": "file", "to-empty": "empty", "to-full": "full", "gone": "no/where"}.items():
        (tmp_path / name).symlink_to(to)
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_files_to_write(place):
    names = sorted(p.name for p in place.iterdir())
    assert file_to_write(place / "file") == file_to_write(place / "to-file") == place / "file"
    assert file_to_write(place / "new") == place / "new"
    for name, says in {
        "empty": "empty is a directory", "to-full": "to-full is a directory", "pipe": "not an ordinary file",
        "gone": "gone is a link to .*no/where, which does not exist", "circle": "leads in a circle",
        "no/file": "no is not a directory; .*no/file cannot be made there", "file/x": "file is not a directory",
        "n" * 300: "cannot be (made|written)",
    }.items():  # fmt: skip
        refused(file_to_write, place / name, says)
    assert sorted(p.name for p in place.iterdir()) == names, "nothing was left"


def test_folders_to_make(place):
    names = sorted(p.name for p in place.iterdir())
    assert folder_to_make(place / "new") == place / "new"
    assert folder_to_make(place / "to-empty") == place / "empty"
    for name, says in {
        "empty": "empty exists already", "to-full": "to-full exists already", "file": "file exists already",
        "to-file": "to-file exists already", "gone": "gone is a link to", "circle": "leads in a circle",
        "no/new": "no is not a directory",
    }.items():  # fmt: skip
        refused(folder_to_make, place / name, says)
    assert sorted(p.name for p in place.iterdir()) == names


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_protected_places(place):
    (place / "file").chmod(0)
    refused(check_readable, place / "file", "file cannot be read: Permission denied")
    refused(file_to_write, place / "file", "write-protected")
    place.chmod(0o555)
    refused(file_to_write, place / "new", "new cannot be made in .*: Permission denied")
    refused(folder_to_make, place / "new", "new cannot be made in .*: Permission denied")
    place.chmod(0o755)


def test_what_cannot_be_read(place):
    check_readable(place / "file")
    check_readable(place / "missing")  # for the caller to explain
    refused(check_readable, place / "empty", "empty cannot be read: Is a directory")


def test_space(tmp_path):
    check_space(tmp_path, 1)
    refused(lambda p: check_space(p, 10**18), tmp_path, "GB free, 1000000000.00 GB are needed")
    check_space(tmp_path, 10**18, held=10**18)


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_permissions_of_what_is_written(umask, tmp_path):
    """New files have those of any new file, and files that are replaced keep theirs."""
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "t", {"x": torch.ones(3)})
        write_text(tmp_path / "new", "text")
        (tmp_path / "old").write_text("old")
        (tmp_path / "old").chmod(0o640)
        write_text(tmp_path / "old", "text")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert modes == {"t": 0o666 & ~umask, "new": 0o666 & ~umask, "old": 0o640}
    assert torch.equal(load_file(tmp_path / "t")["x"], torch.ones(3))


def test_writing_through_a_link(place):
    write_text(place / "to-file", "new")
    assert (place / "to-file").is_symlink() and (place / "file").read_text() == "new"


def test_a_pipe_is_not_replaced(place):
    refused(
        lambda p: write_text(p, "new"), place / "pipe", "pipe cannot be written: it is not an ordinary file"
    )
    assert (place / "pipe").is_fifo()


def test_a_failure_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "f", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "f", "\ud800")
    assert (tmp_path / "f").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_leftovers_of_killed_processes(tmp_path):
    mine = {".p[1].12345678.tmp": True, ".p[1].123.tmp": False, "p[1]": False, ".p1.12345678.tmp": False}
    for name in mine:
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path / "p[1]")
    assert {p.name for p in tmp_path.iterdir()} == {name for name, gone in mine.items() if not gone}
