"""Weights are read by the rules of transformers 5, in decoder and Fisher pass alike; the rest is one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from edited_models import (
    decoder_logits,
    edit_config,
    edit_tensors,
    expected_logits,
    fisher_logits,
    same,
    split,
)

from dpllm.base.errors import InputError
from dpllm.model.config import ModelConfig
from dpllm.model.loading import load_decoder
from dpllm.quant.checkpoint import Checkpoint, dequantise, tiles
from dpllm.quant.quantize import Quantizer
from dpllm.quant.quantize_plan import QuantizeOptions
from dpllm.quant.source import ModelSource

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}


@pytest.fixture
def model(checkpoints, tmp_path):
    """A factory of checkpoints to edit."""

    def copy(name="llama"):
        return shutil.copytree(checkpoints / name, tmp_path / name)

    return copy


def check_equal(path):
    """The decoder, the Fisher pass and an overlay of this checkpoint are the model that transformers loads."""
    expected = expected_logits(path)
    assert same(decoder_logits(path), expected)
    assert same(fisher_logits(path), expected)
    overlay = path.parent / f"{path.name}-overlay"
    Quantizer(ModelSource.open(path), overlay, QuantizeOptions(bits=(2, 8)), documents=None).run()
    found = decoder_logits(overlay)
    assert (found - expected).std() < 0.1 * expected.std(), "8 bits must be close to the model"


def refusal(path):
    """The line that says why a checkpoint cannot be read; the same one for every reader."""
    lines = []
    for read in (load_decoder, lambda p: Checkpoint(ModelSource.open(p))):
        with pytest.raises(InputError) as e:
            read(path)
        lines.append(str(e.value))
    assert lines[0] == lines[1]
    assert "\n" not in lines[0]
    return lines[0]


def rename(change):
    return lambda tensors: {change(n): t for n, t in tensors.items()}


# -- heads and ties ------------------------------------------------------------------------------------------


def test_a_tied_model_with_another_head_uses_the_head(model, caplog):
    path = model()
    edit_config(path, tie_word_embeddings=True)
    check_equal(path)
    assert "The stored head is used" in caplog.text
    assert "lm_head.int8" in dict(ModelSource.open(path.parent / "llama-overlay").files)


def test_a_tied_model_that_stores_both_alike_is_tied(model, caplog):
    path = model()
    edit_config(path, tie_word_embeddings=True)
    edit_tensors(path, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    check_equal(path)
    assert Checkpoint(ModelSource.open(path)).tied and not caplog.text


@pytest.mark.parametrize("kept", [HEAD, EMBEDDING])
def test_a_tied_model_may_store_either(model, kept):
    path = model()
    edit_config(path, tie_word_embeddings=True)
    edit_tensors(path, lambda t: {n: v for n, v in t.items() if n not in (HEAD, EMBEDDING) or n == kept})
    check_equal(path)


@pytest.mark.parametrize("lost", [HEAD, EMBEDDING])
def test_an_untied_model_needs_both(model, lost):
    path = model()
    edit_tensors(path, lambda t: {n: v for n, v in t.items() if n != lost})
    assert f"has no tensor '{lost}', which its config.json calls for" in refusal(path)


# -- biases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-biased", "qwen3", "mistral", "smollm3"])
def test_biases_that_config_denies_are_left_out(model, name):
    path = model(name)
    edit_config(path, attention_bias=False, mlp_bias=False)

    def add(tensors):
        for n in [n for n in tensors if n.endswith("_proj.weight")]:
            tensors[n.replace("weight", "bias")] = torch.full((len(tensors[n]),), 0.5)

    edit_tensors(path, add)
    check_equal(path)


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias"])
def test_biases_that_are_not_stored_are_refused(model, field):
    path = model()
    edit_config(path, **{field: True})
    assert "_proj.bias' (" in refusal(path)


# -- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm", "qwen3", "smollm3"])
def test_base_model_checkpoints(model, name):
    path = model(name)
    edit_tensors(path, rename(lambda n: n.removeprefix("model.")))
    check_equal(path)


def test_a_base_model_without_a_head_is_refused(model):
    path = model()
    edit_tensors(path, lambda t: {n.removeprefix("model."): v for n, v in t.items() if n != HEAD})
    assert "has no tensor 'lm_head.weight'" in refusal(path)


def test_names_with_a_prefix_too_many(model):
    path = model()
    edit_tensors(path, rename(lambda n: f"model.{n}"))
    check_equal(path)


def test_one_parameter_under_two_names_is_refused(model):
    path = model()
    edit_tensors(path, lambda t: t.update({"norm.weight": torch.ones(64)}))
    assert "holds 'model.norm.weight' twice" in refusal(path)


def test_tensors_that_are_not_the_model_are_left_out(model):
    path = model()
    extra = {"visual.patch.weight": torch.ones(3, 3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
             "model.layers.7.mlp.up_proj.weight": torch.full((2, 2), torch.nan)}  # fmt: skip
    edit_tensors(path, lambda t: t.update(extra))
    check_equal(path)
    assert set(Checkpoint(ModelSource.open(path)).unused()) == set(extra)
    assert not set(extra) & set(ModelSource.open(path.parent / "llama-overlay").files)


# -- types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8],
)
def test_types_are_cast(model, dtype):
    path = model()
    wide = 1 if dtype.is_floating_point else 40  # whole numbers keep something of the weights
    edit_tensors(path, lambda t: {n: (v * wide).to(dtype) for n, v in t.items()})
    check_equal(path)


def test_types_that_transformers_does_not_cast_are_refused(model):
    path = model()
    edit_tensors(path, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.complex64)}))
    assert "is stored as C64, which dpllm does not read" in refusal(path)


def test_values_beyond_float32_are_refused(model):
    path = model()
    edit_tensors(
        path, lambda t: t.update({"model.norm.weight": torch.full((64,), 1e300, dtype=torch.float64)})
    )
    with pytest.raises(InputError, match="beyond float32"):
        load_decoder(path)


def store_float8(path, suffix, method, scale_of):
    """Stores the projections as float8 with scales, and returns the tensors that they stand for."""
    meant = {}

    def edit(tensors):
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            scale = scale_of(tensors[name])
            spread = scale
            if scale.ndim == 2:
                rows, columns = (s // g for s, g in zip(tensors[name].shape, scale.shape, strict=True))
                spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            tensors[name] = (tensors[name] / spread).to(torch.float8_e4m3fn)
            meant[name] = tensors[name].float() * spread
            tensors[name + suffix] = scale
        return dict(tensors)

    edit_tensors(path, edit)
    edit_config(path, quantization_config=method)
    return meant


def blocks(weight):
    n, k = weight.shape
    return weight.abs().reshape(n // 16, 16, k // 32, 32).amax((1, 3)) / 448


def row(weight):
    return weight.abs().amax(1, keepdim=True) / 448


@pytest.mark.parametrize(
    ("suffix", "method", "scale_of"),
    [
        ("_scale_inv", FP8, blocks),
        ("_scale_inv", {"quant_method": "fp8"}, lambda w: w.abs().max() / 448),
        ("_scale", {"quant_method": "compressed-tensors", "format": "float-quantized"}, row),
        ("_scale", {"quant_method": "fbgemm_fp8"}, row),
        ("_scale", {"quant_method": "compressed-tensors"}, lambda w: w.abs().max()[None] / 448),
    ],
)
def test_float8_with_scales_is_dequantised(model, suffix, method, scale_of):
    path, plain = model(), model("smollm")
    shutil.rmtree(plain)
    shutil.copytree(path, plain)
    meant = store_float8(path, suffix, method, scale_of)
    edit_tensors(plain, lambda t: t.update(meant))
    expected = expected_logits(plain)
    assert same(decoder_logits(path), expected)
    assert same(fisher_logits(path), expected)


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        (None, {}, "has no quantization_config that says so"),
        ({"quant_method": "gptq"}, {}, "quantised by 'gptq', which dpllm does not read"),
        ("fp8", {}, "config.json is not valid"),
        (FP8 | {"weight_block_size": [32, 32]}, {}, "dpllm does not apply them"),
        (FP8 | {"weight_block_size": "x"}, {}, "dpllm does not apply them"),
        (FP8, {"o_proj.weight_scale_inv": torch.ones(3, 2)}, "dpllm does not apply them"),
        (FP8, {"o_proj.weight_scale_inv": torch.ones(4, 2, dtype=torch.uint8)}, "dpllm does not apply them"),
        (FP8, {"o_proj.weight_scale_inv": None}, "is not float8 values with one tensor of scales"),
        (FP8, {"o_proj.weight_zero_point": torch.ones(1)}, "is not float8 values with one tensor of scales"),
        (FP8, {"o_proj.weight": None}, "dpllm reads such checkpoints only as float8"),
        (FP8, {"o_proj.weight": torch.ones(64, 64)}, "is not float8 values with one tensor of scales"),
    ],
)
def test_float8_that_cannot_be_dequantised_is_refused_by_name(model, method, change, says):
    path = model()
    store_float8(path, "_scale_inv", method, blocks)
    changed = {f"model.layers.1.self_attn.{n}": t for n, t in change.items()}
    edit_tensors(path, lambda t: {n: v for n, v in (t | changed).items() if v is not None})
    with pytest.raises(InputError, match=says):
        load_decoder(path)


def test_a_null_quantization_is_none(model):
    path = model()
    edit_config(path, quantization_config=None)
    check_equal(path)


def test_a_grid_tiles_a_matrix():
    assert tiles([4, 6], [2, 3], None) and tiles([4, 6], [2, 3], [2, 2]) and tiles([4, 6], [1, 3], [128, 2])
    assert not tiles([4, 6], [3, 3], None) and not tiles([4, 6], [2, 3], [2, 3]) and not tiles([4], [4], None)
    values = torch.arange(8.0).reshape(2, 4).to(torch.float8_e4m3fn)
    found = dequantise(values, torch.tensor([[1.0, 10.0], [2.0, 100.0]]))
    assert found.tolist() == [[0, 1, 20, 30], [8, 10, 600, 700]]


# -- files ---------------------------------------------------------------------------------------------------


def test_shards(model):
    path = model()
    split(path)
    check_equal(path)


def test_a_single_file_comes_before_an_index(model):
    path = model()
    shutil.copyfile(path / "model.safetensors", path / "whole")
    edit_tensors(path, lambda t: {n: v + 1 for n, v in t.items()})
    split(path)
    (path / "whole").rename(path / "model.safetensors")
    check_equal(path)


def test_the_file_that_config_names(model):
    path = model()
    (path / "model.safetensors").rename(path / "other.safetensors")
    edit_config(path, transformers_weights="other.safetensors")
    check_equal(path)
    edit_config(path, transformers_weights="../llama/other.safetensors")
    assert "transformers_weights is" in refusal(path)


def test_harmless_disagreements_of_index_and_shards_load(model):
    path = model("smollm")
    edit_tensors(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    split(path, listed={"lm_head.weight": "model-00001-of-00002.safetensors"})
    index = json.loads((path / "model.safetensors.index.json").read_text())
    for unlisted in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.norm.weight"):
        del index["weight_map"][unlisted]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    check_equal(path)


def test_a_tensor_that_the_index_places_wrongly_is_read(model):
    path = model()
    split(path)
    index = path / "model.safetensors.index.json"
    swapped = (
        index.read_text().replace("-00001-", "-x-").replace("-00002-", "-00001-").replace("-x-", "-00002-")
    )
    index.write_text(swapped)
    check_equal(path)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"model.norm.weight": ["a"]}, r"lists tensor 'model\.norm\.weight' in \['a'\]"),
        ({"model.norm.weight": None}, "in None, which is not the name of a file"),
        ({}, "has no 'weight_map' that lists tensors"),
        ([1], "has no 'weight_map' that lists tensors"),
        (None, "has no 'weight_map' that lists tensors"),
        ({"model.norm.weight": "gone.safetensors"}, r"gone\.safetensors is missing"),
        ({"model.norm.weight": "config.json"}, r"config\.json is damaged or not a safetensors file"),
    ],
)
def test_an_index_that_cannot_be_followed(model, weight_map, says):
    path = model()
    split(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=says):
        load_decoder(path)


def test_a_listed_tensor_that_its_shard_lacks(model):
    path = model()
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(path, lambda t: {n: v for n, v in t.items() if n != name})
    split(path, listed={name: "model-00002-of-00002.safetensors"})
    assert (
        f"model-00002-of-00002.safetensors has no tensor '{name}', although the index lists it there"
        in refusal(path)
    )


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: p.rename(p.with_name("other.safetensors")), "holds other.safetensors, but neither"),
        (
            lambda p: (p.unlink(), p.symlink_to("../blobs/gone")),
            "is a link to ../blobs/gone, which does not exist",
        ),
        (
            lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "git lfs pull",
        ),
        (lambda p: (p.unlink(), p.mkdir()), "neither model.safetensors nor"),
        (lambda p: p.with_name("adapter_config.json").write_text("{}"), "holds an adapter"),
    ],
)
def test_files_that_are_not_weights(model, damage, says):
    path = model()
    damage(path / "model.safetensors")
    assert says in refusal(path)


def test_a_shard_that_is_a_folder_or_forbidden_is_not_called_missing(model, monkeypatch):
    path = model()
    split(path)
    shard = path / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.mkdir()
    assert "cannot be read: Is a directory" in refusal(path)
    opened = Path.open

    def forbid(file, *arguments, **options):
        if file == shard:
            raise PermissionError(13, "Permission denied")
        return opened(file, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbid)
    assert "cannot be read: Permission denied" in refusal(path)


def test_the_config_of_an_overlay_still_reads(tiny_overlay):
    assert ModelConfig.read(tiny_overlay).eos_ids == (1,)
