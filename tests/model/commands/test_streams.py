"""Standard streams that are closed or full, size limits, and places that may not be read or written."""

from __future__ import annotations

import errno
import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Result, complaint

from dpllm.base.errors import InputError
from dpllm.commands import main as entry
from dpllm.commands.streams import ClosedStream, NamedStream, TolerantStream, read_stdin, read_stdin_line


def shell(line: str, *words: object, before: str = "") -> Result:
    """Runs `dpllm` in a shell; the words are $1, $2 and so on in the line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = f'{before} "{sys.executable}" -m dpllm {line}'
    done = subprocess.run(["sh", "-c", script, "sh", *map(str, words)], capture_output=True, env=environment)
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def test_closed_streams(quantized):
    said = complaint(shell('generate x --overlay "$1" --max-new-tokens 3 >&-', quantized), alone=True)
    assert "standard output is closed" in said
    said = complaint(shell('generate - --overlay "$1" <&-', quantized), alone=True)
    assert "standard input is closed" in said


def test_all_streams_closed_at_once(tiny_checkpoint, tmp_path):
    """A job that answers with a file needs none of them, and nothing is printed into its files."""
    arguments = ("quantize", '"$1" "$2" --fisher none --jobs 1 <&- >&- 2>&-')
    assert shell(" ".join(arguments), tiny_checkpoint, tmp_path / "out").code == 0
    assert shell('inspect "$1" --verify', tmp_path / "out").code == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_streams(quantized):
    said = complaint(shell('inspect "$1" > /dev/full', quantized), alone=True)
    assert "standard output cannot be" in said and "No space left" in said and "Free space" in said
    answer = shell('inspect "$1" --json 2> /dev/full', quantized)
    assert answer.code == 0 and answer.json, "a full log does not end the work"


def test_standard_input_that_cannot_be_read(quantized, tmp_path):
    said = complaint(shell('generate - --overlay "$1" 0> "$2"', quantized, tmp_path / "x"), alone=True)
    assert "standard input cannot be read" in said


@pytest.fixture
def failing(monkeypatch, capsys):
    """Runs the command's entry point around work that raises."""

    def run(error: BaseException) -> Result:
        def work(standalone_mode: bool) -> None:
            raise error

        monkeypatch.setattr(entry, "app", work)
        with pytest.raises(SystemExit) as ended:
            entry.main()
        captured = capsys.readouterr()
        return Result(ended.value.code, "", captured.err)

    return run


@pytest.mark.parametrize(
    ("number", "way_out"),
    [(errno.ENOSPC, "Free space"), (errno.EFBIG, "Free space"), (errno.EDQUOT, "Free space"),
     (errno.EACCES, "permissions"), (errno.EROFS, "permissions"), (errno.ENOTDIR, "try again"),
     (errno.EIO, "try again"), (errno.ENAMETOOLONG, "try again"), (errno.ELOOP, "try again")],
)  # fmt: skip
def test_every_error_of_the_system_is_one_line(number, way_out, failing):
    said = complaint(failing(OSError(number, os.strerror(number), "a/file")), alone=True)
    assert said.startswith(f"dpllm: a/file cannot be read or written: {os.strerror(number)}.")
    assert way_out in said


def test_the_stream_that_fails_is_named(monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(entry, "app", lambda standalone_mode: 0)
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(SystemExit):
        entry.main()
    assert capsys.readouterr().err.startswith(
        "dpllm: standard output cannot be read or written: No space left"
    )


def test_a_reader_that_has_gone(failing):
    assert failing(BrokenPipeError(errno.EPIPE, "Broken pipe")) == Result(1, "", "")


def test_errors_of_the_program_stay_errors(monkeypatch):
    def work(standalone_mode: bool) -> None:
        raise OSError("of a library, without a number")

    monkeypatch.setattr(entry, "app", work)
    with pytest.raises(OSError, match="without a number"):
        entry.main()


def test_closed_and_tolerant_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdin", ClosedStream("input"))
    for read in (read_stdin, read_stdin_line):
        with pytest.raises(InputError, match="standard input is closed"):
            read()

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def flush(self) -> None:
            raise OSError(errno.EIO, "Input/output error")

    tolerant = TolerantStream(Broken())
    assert tolerant.write("text") == 4
    tolerant.flush()
    assert tolerant.isatty() is False
    for use in (lambda: NamedStream(Broken()).write("text"), NamedStream(Broken()).flush):
        with pytest.raises(OSError, match="standard output"):
            use()


def test_output_beyond_the_size_limit(quantized, tmp_path, ok, refused):
    """The profile's parts, the profile, and a context: each says which file was too large."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "n.txt").write_text("The bees live in the attic. " * 8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        refused(
            "context", "build", tmp_path / "n.txt", "-o", tmp_path / "c", "--overlay", quantized,
            says="cannot be written: .*[Ll]arge", alone=False,
        )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["n.txt"]


def test_a_context_that_another_process_builds(quantized, tmp_path, refused):
    from dpllm.base.locks import only_writer

    (tmp_path / "n.txt").write_text("The bees live in the attic.")
    arguments = (
        "context",
        "build",
        tmp_path / "n.txt",
        "-o",
        tmp_path / "sub" / "c",
        "--overlay",
        quantized,
    )
    (tmp_path / "sub").mkdir()
    with only_writer(tmp_path / "sub" / "c"):
        refused(*arguments, says="c is being written by process")
    (tmp_path / "gone").symlink_to("no/where")
    refused(*arguments[:4], tmp_path / "gone", "--overlay", quantized, says="gone is a link to")


UNPRIVILEGED = "setpriv --inh-caps=-all --bounding-set=-all"


@pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["sh", "-c", f"{UNPRIVILEGED} true"], capture_output=True).returncode,
    reason="needs root and setpriv, to become a user who may not do everything",
)
def test_files_without_permission(quantized, tiny_checkpoint, tmp_path):
    (tmp_path / "n.txt").write_text("The bees live in the attic.")
    (tmp_path / "secret.txt").write_text("x" * 99)
    (tmp_path / "ro").mkdir()
    (tmp_path / "secret.txt").chmod(0)
    (tmp_path / "ro").chmod(0o555)
    build = 'context build "$1/n.txt" -o "$1/ro/c" --overlay "$2"'
    said = complaint(shell(build, tmp_path, quantized, before=UNPRIVILEGED), alone=True)
    assert "ro: Permission denied" in said
    said = complaint(
        shell('eval "$1/secret.txt" --overlay "$2"', tmp_path, quantized, before=UNPRIVILEGED), True
    )
    assert "secret.txt cannot be read: Permission denied" in said and "UTF-8" not in said
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_checkpoint.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "model.safetensors").chmod(0)
    said = complaint(shell('inspect "$1"', model, before=UNPRIVILEGED), alone=True)
    assert "model.safetensors cannot be read: Permission denied" in said and "missing" not in said
