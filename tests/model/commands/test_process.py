"""The command as a process of its own: pipes, Ctrl-C, and a run that is continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from command_line import FAST, Result, complaint
from tiny_models import build_model

from dpllm.base.errors import InputError
from dpllm.commands import main as entry


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
    monkeypatch.setattr(entry, "app", work)
    try:
        with pytest.raises(SystemExit) as ended:
            entry.main()
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
