"""Random edits of tiny models of every family: dpllm computes what transformers computes, or refuses in one line."""

from __future__ import annotations

import json
import shutil
import tempfile
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
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES

from dpllm.base.errors import InputError
from dpllm.model.config import SUPPORTED

LAYER, HEAD, EMBEDDING = "model.layers.1.", "lm_head.weight", "model.embed_tokens.weight"
# Fields of config.json with values that are usual, odd or impossible. ... stands for a field that is absent.
FIELDS = {
    "tie_word_embeddings": [True, False, None, ...],
    "attention_bias": [True, False, ...],
    "mlp_bias": [True, False, ...],
    "head_dim": [16, 32, 8, 15, 0, None, "16", ...],
    "num_key_value_heads": [1, 2, 3, 4, 0, None, ...],
    "num_attention_heads": [4, 2, 0, True],
    "num_hidden_layers": [3, 2, 4, 0],
    "hidden_size": [64, 32, -64],
    "intermediate_size": [96, 95, None],
    "vocab_size": [96, 95, 200, ...],
    "pad_token_id": [None, -1, 2, 95, 96, 500, ...],
    "bos_token_id": [None, 500, ...],
    "eos_token_id": [None, 1, [1, 5], 500, "x", ...],
    "rms_norm_eps": [1e-6, 1e-2, 0, -1.0, None, "1e-6", ...],
    "hidden_act": ["silu", "swish", "gelu", None, ...],
    "sliding_window": [None, 1, 3, 4096, 0, -2, "3", ...],
    "use_sliding_window": [True, False, None, ...],
    "max_window_layers": [0, 1, 2, 28, ...],
    "layer_types": [None, ["full_attention"] * 3, ["sliding_attention", "full_attention", "sliding_attention"],
                    ["full_attention"], ["chunked_attention"] * 3, ...],
    "no_rope_layers": [None, [1, 0, 1], [0, 0, 0], [1], [1, 1, 0, 1], []],
    "no_rope_layer_interval": [1, 2, 0],
    "rope_theta": [1e4, 5e5, 0, None, ...],
    "rope_scaling": [None, {"type": "linear", "factor": 2.0}, {"rope_type": "linear"},
                     {"type": "dynamic", "factor": 2.0},
                     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}],
    "rope_parameters": [None, {"rope_type": "default", "rope_theta": 1e5}, {"rope_theta": 100},
                        {"rope_type": "default"},
                        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
                        {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}, []],
    "partial_rotary_factor": [0.5, 1.0],
    "max_position_embeddings": [128, 20, 0, None, ...],
    "dtype": ["float32", "bfloat16", "nothing", None],
    "torch_dtype": ["float16", "float8_e4m3fn"],
    "architectures": [["LlamaForSequenceClassification"], None],
    "quantization_config": [None, {}, {"quant_method": "awq"}],
    "auto_map": [{"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}],
    "attn_implementation": ["eager"],
    "per_layer_config": [None, {"1": {"intermediate_size": 32}}],
    "transformers_weights": [None, "model.safetensors", "other.safetensors"],
    "model_type": ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2", None],
}  # fmt: skip


def without(*endings):
    return lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(endings)}


def cast(dtype, *endings):
    return lambda tensors: {n: t.to(dtype) if n.endswith(endings) else t for n, t in tensors.items()}


def with_biases(tensors):
    names = [n for n in tensors if n.endswith("_proj.weight")]
    return tensors | {n.replace("weight", "bias"): torch.full((len(tensors[n]),), 0.25) for n in names}


def doubled_head(tensors):
    return tensors | {HEAD: tensors.get(HEAD, tensors[EMBEDDING]).flip(0).contiguous()}


EDITS = {
    "base names": lambda t: {n.removeprefix("model."): v for n, v in t.items()},
    "names twice prefixed": lambda t: {f"model.{n}": v for n, v in t.items()},
    "one name bare": lambda t: {n.removeprefix("model.") if n == EMBEDDING else n: v for n, v in t.items()},
    "extra tensors": lambda t: t | {"visual.x": torch.ones(2), f"{LAYER}self_attn.rotary_emb.inv_freq": torch.ones(8)},
    "extra layer": lambda t: t | {n.replace(".1.", ".9."): v.clone() for n, v in t.items() if LAYER in n},
    "no head": without("lm_head.weight"),
    "no embedding": without("embed_tokens.weight"),
    "no norm": without("model.norm.weight"),
    "no matrix": without("1.mlp.down_proj.weight"),
    "no biases": without(".bias"),
    "one bias less": without("1.self_attn.k_proj.bias"),
    "biases": with_biases,
    "own head": doubled_head,
    "copied head": lambda t: t | {HEAD: t[EMBEDDING].clone()},
    "larger embedding": lambda t: t | {EMBEDDING: torch.cat([t[EMBEDDING], t[EMBEDDING][:4]])},
    "float16": cast(torch.float16, "weight", "bias"),
    "bfloat16": cast(torch.bfloat16, "weight"),
    "float64": cast(torch.float64, "weight", "bias"),
    "float8": cast(torch.float8_e4m3fn, "_proj.weight"),
    "int8 norm": cast(torch.int8, "model.norm.weight"),
    "complex": cast(torch.complex64, "model.norm.weight"),
    "scalar norm": lambda t: t | {"model.norm.weight": torch.ones(1)},
}  # fmt: skip


@st.composite
def changes(draw):
    """A family, some fields of config.json, some edits of the tensors, and whether there are shards."""
    fields = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=2, unique=True))
    return (
        draw(st.sampled_from(sorted(ARCHITECTURES))),
        {f: draw(st.sampled_from(FIELDS[f])) for f in fields},
        draw(st.lists(st.sampled_from(sorted(EDITS)), max_size=2, unique=True)),
        draw(st.sampled_from(["single", "single", "shards", "shards and a wrong index"])),
    )


def apply(model: Path, fields: dict, edits: list[str], layout: str) -> None:
    edit_config(model, **{f: v for f, v in fields.items() if v is not ...})
    edit_config(model, remove=tuple(f for f, v in fields.items() if v is ...))
    for edit in edits:
        edit_tensors(model, EDITS[edit])
    if layout != "single":
        split(model, listed={"x": "model-00001-of-00002.safetensors"} if "wrong" in layout else None)


def check(checkpoints: Path, change) -> None:
    name, fields, edits, layout = change
    with tempfile.TemporaryDirectory() as folder:
        model = Path(shutil.copytree(checkpoints / name, Path(folder) / "model"))
        try:
            apply(model, fields, edits, layout)
        except KeyError:  # an edit of a tensor that an earlier edit took away
            return
        size = json.loads((model / "config.json").read_text()).get("vocab_size")
        ids = torch.tensor([5, 9, 3, 3, 20, 11, 7, 40, 8, 31, 2, 60]) % (
            size if isinstance(size, int) else 96
        )
        try:
            ours = decoder_logits(model, ids)
        except InputError as e:
            assert str(e) and "\n" not in str(e)
            return
        expected = expected_logits(model, ids)
        assert torch.isfinite(expected).all(), change
        assert same(ours, expected), change
        assert same(fisher_logits(model, ids), expected), change


OPTIONS = {
    "deadline": None, "derandomize": True, "database": None, "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}  # fmt: skip


@settings(max_examples=25, **OPTIONS)
@given(change=changes())
def test_a_model_is_read_as_transformers_reads_it(checkpoints, change):
    check(checkpoints, change)


@pytest.mark.slow
@settings(max_examples=400, **OPTIONS)
@given(change=changes())
def test_many_models_are_read_as_transformers_reads_them(checkpoints, change):
    check(checkpoints, change)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_each_field_and_each_edit_alone(checkpoints, name):
    for field, values in FIELDS.items():
        for value in values:
            check(checkpoints, (name, {field: value}, [], "single"))
    for edit in EDITS:
        check(checkpoints, (name, {}, [edit], "single"))


def test_the_families_are_all_walked(checkpoints):
    kinds = {json.loads((checkpoints / n / "config.json").read_text())["model_type"] for n in ARCHITECTURES}
    assert kinds == set(SUPPORTED)
