"""A calibration that is killed in any stage continues, and nothing is lost before the profile is on disk."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import dpllm
from dpllm.base.locks import only_writer
from dpllm.calib import dp_llm
from dpllm.calib.dp_llm import DPLLMOptions
from dpllm.calib.dp_llm_averages import AveragesOptions
from dpllm.calib.runtime.profile import PROFILE_NAME, CalibrationProfile
from dpllm.prepare import calibrate as preparing
from dpllm.quant.overlay import Overlay

ASKED = {"targets": [3, 3.5], "dp_llm": True, "kv_heads": True, "samples": 2, "sequence_length": 32}
STAGES = ("saliency", "gains", "curve", "averages", "inputs", "estimators", "KV heads", "targets")


class Killed(BaseException):
    """Like a kill, it runs none of the handlers for errors."""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A DP-LLM calibration of few steps."""
    few = partial(DPLLMOptions, averages=AveragesOptions(steps=4, length=32), continued=2, tune_steps=3)
    monkeypatch.setattr(preparing, "DPLLMOptions", few)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def work_done(monkeypatch) -> dict[str, int]:
    """Counts the parts that are computed from now on."""
    counts = dict.fromkeys(("tune_averages", "fit_estimator", "head_profile"), 0)

    def counted(module, name):
        original = getattr(module, name)

        def function(*args, **options):
            counts[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(module, name, function)

    counted(dp_llm, "tune_averages")
    counted(dp_llm, "fit_estimator")
    counted(preparing, "head_profile")
    return counts


def same(a: CalibrationProfile, b: CalibrationProfile) -> bool:
    names = ("knots", "gain", "mean_loss", "resident", "curve_log2_lambda", "curve_bits", "probe", "context")
    arrays = [(getattr(a, n), getattr(b, n)) for n in names] + [(a.extra[n], b.extra[n]) for n in a.extra]
    return a.extra.keys() == b.extra.keys() and all(np.array_equal(x, y) for x, y in arrays)


def test_killed_in_every_stage(quantized, tmp_path, monkeypatch):
    counts = work_done(monkeypatch)
    undisturbed = dpllm.calibrate(quantized, out=tmp_path / "whole", **ASKED)
    expected, counts_of_one = CalibrationProfile.load(undisturbed.path), dict(counts)
    assert all(counts_of_one.values())
    counts |= dict.fromkeys(counts, 0)
    out = tmp_path / "profile"
    for stage in STAGES:

        def killed(s: str, done: int, total: int, stage: str = stage) -> None:
            if s == stage:
                raise Killed

        with pytest.raises(Killed):
            dpllm.calibrate(quantized, out=out, progress=killed, **ASKED)
        assert not out.exists() and (tmp_path / "profile.partial").is_dir()
    with (
        monkeypatch.context() as patch,
        pytest.raises(Killed),
    ):  # the profile is written, the rest not yet deleted
        patch.setattr(preparing.PartialResults, "remove", lambda self: (_ for _ in ()).throw(Killed))
        dpllm.calibrate(quantized, out=out, **ASKED)
    assert same(CalibrationProfile.load(out), expected) and (tmp_path / "profile.partial").is_dir()
    report = dpllm.calibrate(quantized, out=out, **ASKED)
    assert counts == counts_of_one, "no part was computed twice"
    assert report.targets == undisturbed.targets
    assert same(CalibrationProfile.load(out), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["profile", "whole"]


def test_one_at_a_time(quantized, tmp_path):
    """A second run is refused at once, before the model is loaded; so is a place that cannot be written."""
    stages: list[object] = []
    with only_writer(tmp_path / "p"), pytest.raises(dpllm.InputError, match="p is being written by process"):
        dpllm.calibrate(quantized, out=tmp_path / "p", progress=lambda *s: stages.append(s))
    (tmp_path / "folder").mkdir()
    (tmp_path / "gone").symlink_to("nowhere/p")
    for out, says in (("folder", "is a directory"), ("gone", "is a link to .*nowhere/p, which does not exist"),
                      ("no/p", "no is not a directory")):  # fmt: skip
        with pytest.raises(dpllm.InputError, match=says):
            dpllm.calibrate(quantized, out=tmp_path / out, progress=lambda *s: stages.append(s))
    with pytest.raises(dpllm.InputError, match="/dev/null is not an ordinary file"):
        dpllm.calibrate(quantized, out="/dev/null")
    assert not stages


def test_a_link_stays_a_link(quantized, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / PROFILE_NAME).write_bytes(b"an old one")
    (tmp_path / "p").symlink_to(tmp_path / "disk" / PROFILE_NAME)
    report = dpllm.calibrate(quantized, out=tmp_path / "p", samples=2, sequence_length=32)
    assert report.path == tmp_path / "p" and (tmp_path / "p").is_symlink()
    assert [p.name for p in (tmp_path / "disk").iterdir()] == [PROFILE_NAME]
    CalibrationProfile.load(tmp_path / "disk" / PROFILE_NAME, Overlay.open(quantized).hash)
