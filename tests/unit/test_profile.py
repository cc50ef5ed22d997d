"""The calibration profile: kept as it was, refused when it is not, one line for whoever meets it."""

from __future__ import annotations

import dataclasses
import resource
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from synthetic_profiles import example_profile

from dpllm.base.errors import InputError
from dpllm.calib.runtime import profile as module
from dpllm.calib.runtime.profile import CalibrationProfile, merge


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    example_profile().save(path)
    return path


def assert_same(a: CalibrationProfile, b: CalibrationProfile) -> None:
    for field in dataclasses.fields(CalibrationProfile):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "diagonals":
            assert len(x) == len(y)
            for one, other in zip(x, y, strict=True):
                np.testing.assert_array_equal(one, other, strict=True)
        elif field.name == "extra":
            assert x.keys() == y.keys()
            for name in x:
                np.testing.assert_array_equal(x[name], y[name], strict=True)
        elif isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, y, strict=True)
        else:
            assert x == y, field.name


def refused(path, overlay_hash=None) -> str:
    with pytest.raises(InputError) as e:
        CalibrationProfile.load(path, overlay_hash)
    message = str(e.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    return message


def test_round_trip(saved):
    assert_same(CalibrationProfile.load(saved), example_profile())
    assert_same(CalibrationProfile.load(saved, "a" * 64), example_profile())


def test_saving_leaves_one_file_and_overwrites(tmp_path):
    path = tmp_path / "p.safetensors"
    example_profile().save(path)
    other = example_profile(granularity="linear")
    other.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]
    assert_same(CalibrationProfile.load(path), other)


@contextmanager
def no_room(limit: int):
    """Files cannot grow beyond `limit` bytes, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_profile(tmp_path):
    path = tmp_path / "p.safetensors"
    example_profile().save(path)
    with no_room(1000), pytest.raises(InputError, match="cannot be written") as e:
        example_profile(granularity="linear").save(path)
    assert len(str(e.value).splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]
    assert CalibrationProfile.load(path).granularity == "fused"


def test_another_overlays_profile(saved):
    message = refused(saved, "b" * 64)
    assert "another overlay" in message and "dpllm calibrate" in message


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_changed_bytes_are_noticed(saved, tmp_path_factory, data):
    content = bytearray(saved.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(content)
    try:
        loaded = CalibrationProfile.load(path)
    except InputError as e:
        assert len(str(e).splitlines()) == 1
    else:  # a space of the header's padding became another kind of blank, or a flip was flipped back
        assert_same(loaded, example_profile())


def test_every_tensor_byte_counts(saved, tmp_path):
    content = saved.read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    path = tmp_path / "p.safetensors"
    for at in range(data, len(content), 61):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert "damaged" in refused(path)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1, exclude_max=True))
def test_truncated(saved, tmp_path_factory, share):
    content = saved.read_bytes()
    path = tmp_path_factory.getbasetemp() / "truncated.safetensors"
    path.write_bytes(content[: int(share * len(content))])
    refused(path)


def test_newer_version(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    newer = module.PROFILE_VERSION + 1
    with monkeypatch.context() as patch:
        patch.setattr(module, "PROFILE_VERSION", newer)
        example_profile().save(path)
    assert f"version {newer}" in refused(path)


@pytest.mark.parametrize("metadata", [None, {"dpllm_profile": "[]"}, {"dpllm_profile": "{"}, {"other": "x"}])
def test_foreign_safetensors(tmp_path, metadata):
    path = tmp_path / "p.safetensors"
    save_file({"x": torch.zeros(3)}, path, metadata=metadata)
    assert "is not an intact calibration profile" in refused(path)


def test_no_file(tmp_path):
    assert "does not exist" in refused(tmp_path / "p.safetensors")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder")


def test_targets_within_range_have_a_lambda():
    profile = example_profile()
    assert profile.target_range() == (2.0, 5.0)
    lambdas = [profile.lambda_for(t) for t in np.linspace(2, 5, 31)]
    assert all(a > b for a, b in pairwise(lambdas))
    assert np.log2(profile.lambda_for(3.5)) == pytest.approx(-10 - 2)  # the middle of the curve for 5 planes


@pytest.mark.parametrize("target", [1.99, 5.01, -1.0, float("nan"), float("inf")])
def test_targets_out_of_range(target):
    with pytest.raises(InputError, match="out of reach") as e:
        example_profile().lambda_for(target)
    assert len(str(e.value).splitlines()) == 1


def test_each_number_of_resident_planes_has_its_range():
    profile = example_profile()
    assert profile.target_range(4) == (2.0, 4.0)
    assert np.log2(profile.lambda_for(3.0, 4)) == pytest.approx(-10 - 1)
    with pytest.raises(InputError, match="out of reach"):
        profile.lambda_for(4.5, 4)


def test_estimator_bytes():
    assert example_profile().estimator_bytes() == 2 * (32 + 33 + 34) + 2 * 32


# -- budgets and merging ----------------------------------------------------------------------------------


def budgeted(name: str, planes: list[int], **fields) -> CalibrationProfile:
    base = example_profile()
    return dataclasses.replace(
        base,
        resident=np.concatenate([base.resident, [planes]]),
        curve_log2_lambda=np.concatenate([base.curve_log2_lambda, base.curve_log2_lambda[-1:] - sum(planes)]),
        curve_bits=np.concatenate([base.curve_bits, base.curve_bits[-1:]]),
        origin={"budgets": {name: len(base.resident)}},
        **fields,
    )


def test_a_budget_is_found_by_its_name_and_by_its_planes():
    profile = budgeted("4.2", [5, 4, 3])
    assert profile.budget(4.2).tolist() == [5, 4, 3]
    assert profile.budget(4).tolist() == [4, 4, 4]
    assert profile.lambda_for(3.5, np.asarray([5, 4, 3])) != profile.lambda_for(3.5)
    with pytest.raises(InputError, match=r"no budget of 4.3.*stored: 4.2.*--memory-bits 4.3") as e:
        profile.budget(4.3)
    assert len(str(e.value).splitlines()) == 1
    with pytest.raises(InputError, match="no targets for the planes that are resident"):
        profile.lambda_for(3.5, np.asarray([5, 3, 3]))


def test_thresholds_stop_at_each_groups_planes():
    profile = budgeted("4.2", [5, 4, 2])
    thresholds = profile.thresholds(0.0, profile.budget(4.2))
    signal = np.full((3, 1), 100.0)
    assert (2 + (signal[:, :, None] > thresholds[:, None, :]).sum(2)).ravel().tolist() == [5, 4, 2]


def test_merging_keeps_every_budget_and_policy(tmp_path):
    one = budgeted("4.2", [5, 4, 3], extra={"a": np.arange(3.0)})
    other = budgeted("3.9", [3, 5, 4], extra={"a": np.zeros(3), "b": np.ones(2)})
    merged = merge(one, other)
    assert merged.budget(4.2).tolist() == [5, 4, 3] and merged.budget(3.9).tolist() == [3, 5, 4]
    for profile in (one, other):
        planes = profile.resident[-1]
        assert merged.lambda_for(3.3, planes) == profile.lambda_for(3.3, planes)
    assert merged.extra["a"].tolist() == [0, 1, 2] and merged.extra["b"].tolist() == [1, 1]
    assert len(merged.resident) == len(one.resident) + 1, "what both have is kept once"
    merged.save(tmp_path / "p.safetensors")
    assert_same(CalibrationProfile.load(tmp_path / "p.safetensors"), merged)


def test_what_cannot_be_merged():
    one = example_profile()
    with pytest.raises(InputError, match="cannot be merged"):
        merge(one, example_profile(granularity="linear"))
    with pytest.raises(InputError, match="cannot be merged"):
        merge(one, example_profile(overlay_hash="b" * 64))
    with pytest.raises(InputError, match="different measurements"):
        merge(one, dataclasses.replace(one, gain=one.gain * 2))
