"""Texts, checkpoints, overlays and profiles that cannot be used: one clear line, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import FAST, SMALL, contents, edit_json, flip, shard_of
from safetensors.torch import load_file, save_file

from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.quant.quantize import Quantizer
from dpllm.quant.quantize_plan import QuantizeOptions
from dpllm.quant.source import ModelSource


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n \n", "is empty"),
        ("latin.txt", "café".encode("latin-1"), "not UTF-8"),
        ("binary.txt", bytes(range(256)), "not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("bad.jsonl", b'{"body": "a"}\n', "line 1"),
    ],
)
def test_data_that_is_no_text(refused, tiny_checkpoint, overlay, tmp_path, name, content, says):
    data = tmp_path / name
    if content is not None:
        data.write_bytes(content)
    before = contents(tmp_path)
    refused("quantize", tiny_checkpoint, tmp_path / "out", "--data", data, says=says)
    refused("calibrate", overlay, "--data", data, says=says)
    refused("eval", data, "--overlay", overlay, says=says)
    assert contents(tmp_path) == before


def test_data_that_is_too_short(refused, ok, tiny_checkpoint, overlay, tmp_path):
    (tmp_path / "short.txt").write_text("x = 1\n")
    before = contents(overlay)
    refused("calibrate", overlay, "--data", tmp_path / "short.txt", says="at least 511 are needed")
    assert contents(overlay) == before
    arguments = ("quantize", tiny_checkpoint, tmp_path / "out")
    refused(*arguments, "--data", tmp_path / "short.txt", says="at least 511 are needed", alone=False)
    assert not (tmp_path / "out").exists()
    ok(*arguments, *SMALL)  # the corrected command works


@pytest.mark.parametrize(
    ("model", "says"),
    [("no/such/dir", "is not a directory, and not a hub id"), ("owner/no-such-model", "could not be downloaded"),
     (__file__, "is a file")],
)  # fmt: skip
def test_models_that_are_not_there(refused, tmp_path, model, says):
    refused("quantize", model, tmp_path / "out", says=says)
    assert list(tmp_path.iterdir()) == []


def damage(checkpoint: Path, how: str) -> None:
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    content = weights.read_bytes()
    if how == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif how == "garbage":
        weights.write_bytes(b"not at all" * 99)
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "foreign":
        save_file({"some.tensor": torch.zeros(3)}, weights)
    elif how in ("incomplete", "no final norm"):
        tensors = load_file(weights)
        del tensors["model.norm.weight" if how == "no final norm" else "model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights)
    elif how == "pickled":
        weights.rename(checkpoint / "pytorch_model.bin")
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "broken config":
        config.write_text("{")
    elif how == "config of another size":
        edit_json(config, hidden_size=128)
    elif how == "impossible config":
        edit_json(config, hidden_size="wide")
    elif how == "unknown type":
        edit_json(config, model_type="gpt2")
    elif how == "unknown activation":
        edit_json(config, hidden_act="gelu")
    elif how == "unknown rope":
        edit_json(config, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    elif how == "quantised elsewhere":
        edit_json(config, quantization_config={"quant_method": "gptq", "bits": 4})


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "damaged or not a safetensors"),
        ("garbage", "damaged or not a safetensors"),
        ("empty", "damaged or not a safetensors"),
        ("foreign", "has no tensor 'model.embed_tokens.weight' .29 more"),
        ("incomplete", r"has no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        ("no final norm", "has no tensor 'model.norm.weight'"),
        ("pickled", "pickled weights only"),
        ("no weights", "no .*safetensors"),
        ("no config", "config.json is missing"),
        ("broken config", "cannot be read as JSON"),
        ("config of another size", "has shape .*implies"),
        ("impossible config", "is not valid"),
        ("unknown type", "'gpt2' is not supported.*llama"),
        ("unknown activation", "'gelu' is not supported"),
        ("unknown rope", "'dynamic' is not supported"),
        ("quantised elsewhere", "is quantised"),
    ],
)
def test_checkpoints_that_cannot_be_used(refused, checkpoint, tmp_path, how, says):
    damage(checkpoint, how)
    before = contents(tmp_path)
    refused("quantize", checkpoint, tmp_path / "out", says=says)
    refused("generate", "x", "--overlay", checkpoint, says=says)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(refused, checkpoint, tmp_path, value):
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = value
    save_file(tensors, checkpoint / "model.safetensors")
    refused(
        "quantize", checkpoint, tmp_path / "out", *FAST, says=f"{name}' holds NaN or infinite", alone=False
    )
    again = ("quantize", checkpoint, tmp_path / "out", *SMALL, "--restart")
    refused(*again, says="holds NaN or infinite", alone=False)
    refused("generate", "x", "--overlay", checkpoint, says="holds NaN or infinite")
    refused("inspect", checkpoint, "--verify", says="holds NaN or infinite", alone=False)
    assert not (tmp_path / "out").exists()


def test_no_tokenizer(refused, checkpoint, tmp_path):
    (checkpoint / "tokenizer.json").write_text("{")
    for command in (("quantize", checkpoint, tmp_path / "out"), ("generate", "x", "--overlay", checkpoint)):
        refused(*command, says="tokenizer in .* cannot be loaded")
    (checkpoint / "tokenizer.json").unlink()
    for command in (("quantize", checkpoint, tmp_path / "out"), ("generate", "x", "--overlay", checkpoint)):
        refused(*command, says="no tokenizer.json")


def test_what_needs_an_overlay_says_so(refused, tiny_checkpoint):
    refused("calibrate", tiny_checkpoint, says="is not a dpllm overlay")
    refused("eval", "--overlay", tiny_checkpoint, says="is not quantised")
    refused("generate", "x", "--overlay", tiny_checkpoint, "--target-bits", 3, says="is not quantised")
    refused("generate", "x", "--overlay", tiny_checkpoint, "--bits", 3, says="is not quantised")
    refused("generate", "x", "--overlay", tiny_checkpoint, "--resident-bits", 3, says="is not quantised")
    refused("generate", "x", "--overlay", tiny_checkpoint, "--max-memory", "1GB", says="is not quantised")


def test_overlays_that_are_not_there(refused, tmp_path):
    nowhere = tmp_path / "nowhere"
    refused("generate", "x", "--overlay", nowhere, says="is not a directory")
    refused("generate", "x", "--overlay", nowhere, "--max-memory", "1GB", says="is not a directory")
    refused("eval", "--overlay", nowhere, says="is not a directory")
    refused("calibrate", nowhere, says="is not a directory")
    refused("inspect", nowhere, says="does not exist")
    refused("inspect", tmp_path, says="config.json is missing")


def test_an_overlay_of_a_newer_format(refused, overlay):
    quantization = json.loads((overlay / "config.json").read_text())["quantization_config"]
    edit_json(overlay / "config.json", quantization_config=quantization | {"format_version": 2})
    for command in (("generate", "x", "--overlay"), ("eval", "--overlay"), ("calibrate",), ("inspect",)):
        refused(*command, overlay, says="format_version is 2, this dpllm reads 1")


@pytest.mark.parametrize("how", ["truncated", "garbage", "foreign", "flipped", "removed", "swapped"])
def test_damaged_overlays(refused, overlay, how):
    tensor = "model.layers.1.mlp.up_proj.planes.0"
    path, _ = shard_of(overlay, tensor)
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-7])
    elif how == "garbage":
        path.write_bytes(b"\x00" * len(content))
    elif how == "foreign":
        save_file({"x": torch.zeros(2)}, path)
    elif how == "flipped":
        flip(overlay, tensor)
    elif how == "removed":
        path.unlink()
    else:
        other, _ = shard_of(overlay, "model.layers.0.mlp.up_proj.planes.0")
        path.write_bytes(other.read_bytes())
    before = contents(overlay)
    for command in (("generate", "x", "--overlay"), ("eval", "--overlay"), ("calibrate",)):
        refused(*command, overlay, says=re.escape(path.name))
    refused("inspect", overlay, "--verify", says=re.escape(path.name), alone=False)
    assert contents(overlay) == before


def test_an_altered_side_file(refused, overlay):
    edit_json(overlay / "config.json", max_position_embeddings=9)
    refused("generate", "x", "--overlay", overlay, says="config.json was altered")


def test_a_profile_of_another_overlay(refused, overlay):
    path = overlay / "profile.safetensors"
    replace(CalibrationProfile.load(path), overlay_hash="0" * 64).save(path)
    for command in (("generate", "x", "--overlay"), ("eval", "--overlay"), ("inspect",)):
        refused(*command, overlay, says="calibrated for another overlay.*dpllm calibrate")


def test_damaged_profiles(refused, ok, overlay):
    path = overlay / "profile.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-1], b"", b"x" * 99, content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]):
        path.write_bytes(damaged)
        refused("generate", "x", "--overlay", overlay, says="profile.*Run: dpllm calibrate")
        refused("inspect", path, says="profile.*Run: dpllm calibrate")
    ok("calibrate", overlay, *SMALL)  # as it says
    ok("generate", "x", "--overlay", overlay, "--max-new-tokens", 2)


def test_policies_that_need_a_profile(refused, ok, overlay):
    (overlay / "profile.safetensors").unlink()
    for policy in ("static", "rate-distortion"):
        refused(
            "generate",
            "x",
            "--overlay",
            overlay,
            "--policy",
            policy,
            "--target-bits",
            3,
            says="Run: dpllm calibrate",
        )
    refused("eval", "--overlay", overlay, says="Run: dpllm calibrate")
    assert ok("generate", "x", "--overlay", overlay, "--json").json["effective_bits"] == 6


def test_a_tokenizer_larger_than_its_model(refused, tiny_checkpoint, tmp_path):
    """The same line in every command, before any work."""
    model, overlay, text = tmp_path / "model", tmp_path / "overlay", tmp_path / "text.txt"
    shutil.copytree(tiny_checkpoint, model)
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    edit_json(model / "config.json", vocab_size=300)
    Quantizer(ModelSource.open(model), overlay, QuantizeOptions(), documents=None).run()
    text.write_text("def value(self):\n    return self.value\n" * 200)
    says = r"the tokenizer in .* gives token 3\d\d; the model knows 300"
    before = contents(tmp_path)
    refused("quantize", model, tmp_path / "out", "--data", text, *SMALL, says=says)
    refused("calibrate", overlay, "--data", text, *SMALL, says=says)
    refused("eval", text, "--overlay", overlay, "--policy", "uniform", "--target-bits", 3, says=says)
    refused("generate", "def value(self):", "--overlay", overlay, says=says)
    refused("generate", "def value(self):", "--overlay", model, says=says)
    refused("context", "build", text, "--out", tmp_path / "context", "--overlay", overlay, says=says)
    assert contents(tmp_path) == before
