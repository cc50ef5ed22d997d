"""Models in GGUF files: the same model as the checkpoint that they were made from, and refused where it is not."""

from __future__ import annotations

import json
import math
import shutil
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from command_line import FAST, edit_json
from gguf import GGMLQuantizationType as Kind
from gguf_files import dequantized, finished, permuted, write_gguf
from safetensors.torch import load_file, save_file
from tiny_models import build_model
from transformers import AutoModelForCausalLM

import dpllm
from dpllm import reference
from dpllm.base.errors import InputError
from dpllm.base.text import load_tokenizer
from dpllm.context.saved import model_hash
from dpllm.kernels.reference import dequantize
from dpllm.model.config import ModelConfig
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.quant.gguf import folder as folders
from dpllm.quant.gguf import rope, types
from dpllm.quant.gguf.config import describe
from dpllm.quant.gguf.metadata import Metadata
from dpllm.quant.gguf.model import GGUF_LINK, GgufModel
from dpllm.quant.overlay import Overlay
from dpllm.quant.resolve import resolve_model
from dpllm.quant.source import ModelSource

TEXT = 'class Stack:\n    """A stack of 12 items, é."""\n\n    def push(self, item):\n        self.items.append(item)\n'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Folders that stand for GGUF files are made here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dpllm" / "gguf"


@pytest.fixture(scope="module")
def reference_gguf(tmp_path_factory) -> Path:
    """The reference model, which has learnt something, in 8 bits."""
    path = tmp_path_factory.mktemp("gguf") / "reference.gguf"
    return write_gguf(path, reference.model_path(), kind=Kind.Q8_0)


@pytest.fixture
def trusting(monkeypatch):
    """Random models are taken, although their loss is that of guessing."""
    monkeypatch.setattr(folders, "is_sane", lambda found, vocabulary: True)


def independent_logits(gguf_file: Path, checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of transformers' model, filled with the package's own reading of the file."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config, found = model.config, dequantized(gguf_file)
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for name, values in found.items():
        parts, weight = name.split("."), torch.tensor(values)
        for part, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
            if part in parts:  # row h, 2 i + s is row h, s * half + i
                rows = torch.arange(weight.shape[0])
                weight = weight[torch.argsort(permuted(rows, heads))]
        prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        state[prefix + names[parts[-2]] + ".weight"] = weight
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    with torch.no_grad():
        return model(ids).logits[0]


def logits_of(where: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_decoder(where, LoadOptions(backend="reference")).forward(ids)


def test_logits_are_those_of_an_independent_reading(reference_gguf):
    where = resolve_model(str(reference_gguf))
    ids = load_tokenizer(where)(TEXT, return_tensors="pt")["input_ids"]
    expected = independent_logits(reference_gguf, reference.model_path(), ids)
    assert (logits_of(where, ids[0]) - expected).abs().max() < 1e-3 < expected.std()


FAMILIES = {
    "llama": ("llama", {}, {}),
    "llama-biased": ("llama", {}, {}),
    "smollm": ("llama", {}, {}),
    "mistral": ("llama", {}, {}),
    "mistral-window": ("llama", {}, {"llama.attention.sliding_window": 7}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "num_hidden_layers": 4}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
}


def make_checkpoint(root: Path, tokenizer_from: Path, name: str, **options) -> Path:
    """A random model of 384 tokens with the tokenizer of another checkpoint."""
    build_model(name, vocab_size=384, max_position_embeddings=512, **options).save_pretrained(root / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / file, root / name / file)
    return root / name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_the_checkpoint_it_was_made_from(name, tiny_checkpoint, tmp_path, trusting):
    architecture, options, metadata = FAMILIES[name]
    checkpoint = make_checkpoint(tmp_path, tiny_checkpoint, name, **options)
    permute = "qwen" not in name
    file = write_gguf(
        tmp_path / "m.gguf", checkpoint, architecture=architecture, permute=permute, metadata=metadata
    )
    ids = torch.randint(3, 384, (24,), generator=torch.Generator().manual_seed(3))
    where = resolve_model(str(file))
    assert json.loads((where / GGUF_LINK).read_text())["permuted"] in ((True, False) if permute else (False,))
    expected = logits_of(checkpoint, ids)
    found = GgufModel.read(file)
    readers = found.readers(describe(found.header, found.tensors), permuted=permute)
    for tensor, values in load_file(checkpoint / "model.safetensors").items():
        assert torch.equal(readers[tensor].read(tensor), values), tensor
    edit_json(where / GGUF_LINK, permuted=permute)  # the loss of a random model cannot tell
    assert (logits_of(where, ids) - expected).abs().max() < 1e-4 < expected.std()
    assert ModelConfig.read(where).windows == ModelConfig.read(checkpoint).windows


def test_llama_3_scaling_is_found_in_its_tensor(tiny_checkpoint, tmp_path, trusting):
    """The converter writes divisors instead of the four parameters."""
    checkpoint = make_checkpoint(tmp_path, tiny_checkpoint, "llama3-rope")
    scaled, theta = ModelConfig.read(checkpoint).inv_freq, 10_000.0
    plain = 1 / theta ** (torch.arange(0, 32, 2) / 32)
    file = write_gguf(tmp_path / "m.gguf", checkpoint, tensors={"rope_freqs.weight": plain / scaled})
    torch.testing.assert_close(ModelConfig.read(resolve_model(str(file))).inv_freq, scaled, rtol=2e-3, atol=0)


@pytest.mark.parametrize("factor, original, head", [(8.0, 8192, 128), (32.0, 8192, 64), (16.0, 5000, 128)])
def test_llama_3_parameters_are_recovered(factor, original, head):
    meta = Metadata(Path("m.gguf"), {"general.architecture": "llama", "llama.rope.freq_base": 500_000.0})
    wave = 2 * math.pi * 500_000.0 ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    smooth = ((original / wave - 1) / 3).clamp(0, 1)
    divisors = (1 / ((1 - smooth) / factor + smooth)).float()
    found = rope.llama3_parameters(meta.path, 500_000.0, divisors.double().numpy())
    assert found["factor"] == factor and found["original_max_position_embeddings"] == pytest.approx(
        original, rel=1e-3
    )
    assert found["high_freq_factor"] / found["low_freq_factor"] == pytest.approx(4, rel=1e-3)


def test_divisors_of_another_formula_are_refused():
    with pytest.raises(InputError, match="Llama 3's formula"):
        rope.llama3_parameters(Path("m.gguf"), 10_000.0, np.linspace(1, 4, 32))


@pytest.mark.parametrize(
    "stated, expected",
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"scaling.type": "none", "scaling.factor": 4.0}, {"rope_type": "default"}),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32768},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
    ],
)
def test_scaling_of_rotary_embedding_is_kept(stated, expected):
    values = {"general.architecture": "qwen2"} | {f"qwen2.rope.{k}": v for k, v in stated.items()}
    found = rope.rope_parameters(Metadata(Path("m.gguf"), values), 64, None)
    assert found == {"rope_theta": 10_000.0} | expected


def test_unknown_scaling_is_refused():
    values = {"general.architecture": "llama", "llama.rope.scaling.type": "longrope"}
    with pytest.raises(InputError, match="longrope"):
        rope.rope_parameters(Metadata(Path("m.gguf"), values), 64, None)


def test_rows_in_the_other_order_are_recognised_by_the_loss(tmp_path):
    """A file whose converter left queries and keys alone calls itself 'llama' too."""
    for permute in (True, False):
        file = write_gguf(tmp_path / f"{permute}.gguf", reference.model_path(), permute=permute)
        where = resolve_model(str(file))
        assert json.loads((where / GGUF_LINK).read_text())["permuted"] is permute
        original = ModelSource.open(reference.model_path())
        name = "model.layers.3.self_attn.k_proj.weight"
        assert torch.equal(ModelSource.open(where).read(name), original.read(name).float())


def test_nonsense_is_refused_and_leaves_nothing(tiny_checkpoint, tmp_path, cache):
    file = write_gguf(tmp_path / "random.gguf", tiny_checkpoint)
    with pytest.raises(InputError, match="loss on plain text"):
        resolve_model(str(file))
    assert list(cache.iterdir()) == []


def test_the_second_use_reads_no_weight(reference_gguf, monkeypatch):
    where = resolve_model(str(reference_gguf))
    monkeypatch.setattr(folders, "losses", lambda *a: pytest.fail("the loss was computed again"))
    assert resolve_model(str(reference_gguf)) == where


def test_a_replaced_file_is_checked_again(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", reference.model_path(), kind=Kind.Q8_0)
    before = resolve_model(str(file))
    file.unlink()
    write_gguf(file, reference.model_path(), kind=Kind.F16)
    with pytest.raises(InputError, match="changed"):
        ModelSource.open(before)
    assert resolve_model(str(file)) != before


def test_parts_of_a_split_file_are_one_model(reference_gguf, tmp_path):
    first = write_gguf(tmp_path / "m.gguf", reference.model_path(), kind=Kind.Q8_0, pieces=30)
    names = sorted(p.name for p in tmp_path.glob("*.gguf"))
    assert len(names) == 3
    whole = ModelSource.open(resolve_model(str(reference_gguf)))
    for given in (first, tmp_path / names[2]):
        split = ModelSource.open(resolve_model(str(given)))
        assert set(split.names()) == set(whole.names())
        assert all(torch.equal(split.read(n), whole.read(n)) for n in whole.names())
    (tmp_path / names[1]).unlink()
    with pytest.raises(InputError, match=f"{names[1]} is missing"):
        resolve_model(str(first))


def test_a_file_in_the_cache_of_the_hub_is_found_by_its_id(reference_gguf, tmp_path, monkeypatch):
    """The cache holds links to nameless files."""
    hub = tmp_path / "models--someone--Small-GGUF"
    for folder in ("blobs", "refs", "snapshots/0a1b/q8"):
        (hub / folder).mkdir(parents=True)
    (hub / "refs" / "main").write_text("0a1b")
    shutil.copy(reference_gguf, hub / "blobs" / "1234")
    (hub / "snapshots" / "0a1b" / "q8" / "m.gguf").symlink_to(hub / "blobs" / "1234")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    where = resolve_model("someone/Small-GGUF/q8/m.gguf")
    assert where.name.startswith("m-") and ModelSource.open(where).note
    assert resolve_model(str(hub / "snapshots" / "0a1b" / "q8" / "m.gguf")) == where
    for missing in ("someone/Small-GGUF/other.gguf", "someone/Else/m.gguf", "folder/m.gguf", "m.gguf"):
        with pytest.raises(InputError, match=missing.rpartition("/")[2]):
            resolve_model(missing)


def test_quantize_generate_and_inspect(reference_gguf, tmp_path, ok):
    done = ok("quantize", str(reference_gguf), str(tmp_path / "overlay"), *FAST)
    assert "quantised itself (Q8_0; 8.5 bits" in done.err
    overlay = Overlay.open(tmp_path / "overlay")
    assert overlay.config["model_type"] == "llama"
    tokens = load_tokenizer(tmp_path / "overlay")(TEXT)["input_ids"]
    assert tokens == load_tokenizer(reference.model_path())(TEXT)["input_ids"]
    prompt = ("--max-new-tokens", "8", "--json", "import os\n")
    said = ok("generate", "--overlay", str(reference_gguf), *prompt)
    expected = ok("generate", "--overlay", str(reference.model_path()), *prompt)
    assert said.json["text"] == expected.json["text"]
    facts = ok("inspect", str(reference_gguf), "--json").json
    assert facts["kind"] == "gguf" and facts["architecture"] == "llama" and facts["types"]["Q8_0"] > 7e6


def test_load_takes_a_gguf_file_and_its_contexts_are_bound_to_it(reference_gguf, tmp_path):
    engine = dpllm.load(reference_gguf)
    other = write_gguf(tmp_path / "other.gguf", reference.model_path(), kind=Kind.Q4_0)
    assert engine.generate("import os\n", max_new_tokens=4).text
    assert model_hash(engine.path) == model_hash(resolve_model(str(reference_gguf)))
    assert model_hash(engine.path) != model_hash(resolve_model(str(other)))


def test_a_missing_package_is_named(reference_gguf, monkeypatch):
    types.gguf_package.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="pip install gguf"):
        resolve_model(str(reference_gguf))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"metadata": {"general.type": "adapter"}}, "adapter"),
        ({"metadata": {"general.type": "mmproj"}}, "projector"),
        ({"metadata": {"general.type": "vocab"}}, "vocab"),
        ({"metadata": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"metadata": {"llama.block_count": 4}}, "blk.3.attn_norm.weight"),
        ({"metadata": {"llama.block_count": 2}}, "blk.2"),
        ({"metadata": {"llama.block_count": 2_000_000_000}}, "block_count"),
        ({"metadata": {"llama.embedding_length": 128}}, "shape"),
        ({"metadata": {"llama.attention.head_count": "four"}}, "head_count"),
        ({"metadata": {"llama.attention.head_count": None}}, "head_count"),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, "heads of keys"),
        ({"metadata": {"llama.attention.layer_norm_rms_epsilon": float("nan")}}, "epsilon"),
        ({"metadata": {"llama.rope.dimension_count": 8}}, "dimension_count"),
        ({"metadata": {"tokenizer.ggml.model": "bert"}}, "bert"),
        ({"metadata": {"tokenizer.ggml.pre": "klingon"}}, "klingon"),
        ({"metadata": {"tokenizer.ggml.pre": None}}, "tokenizer.ggml.pre"),
        ({"metadata": {"tokenizer.ggml.tokens": None}}, "tokens"),
        ({"metadata": {"tokenizer.ggml.tokens": ["a", "b"]}}, "do not fit"),
        ({"metadata": {"tokenizer.ggml.merges": ["no-pair"]}}, "merge"),
        ({"metadata": {"tokenizer.ggml.merges": ["unheard of"]}}, "tokenizer"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 99_999}}, "eos_token_id"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "blk.1.ffn_up.weight"),
        ({"tensors": {"token_embd.weight": None}}, "token_embd.weight"),
        ({"tensors": {"output_norm.weight": torch.ones(128)}}, "output_norm.weight"),
        ({"tensors": {"blk.0.post_ffw_norm.weight": torch.ones(64)}}, "post_ffw_norm"),
        ({"tensors": {"rope_freqs.weight": torch.ones(7)}}, "rope_freqs"),
        ({"tensors": {"rope_freqs.weight": torch.zeros(8)}}, "divisors"),
    ],
)
def test_what_is_not_a_model_here_is_refused_before_work(
    change, named, tiny_checkpoint, tmp_path, monkeypatch
):
    file = write_gguf(tmp_path / "bad.gguf", tiny_checkpoint, **change)
    monkeypatch.setattr(folders, "losses", lambda *a: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=named) as refused:
        resolve_model(str(file))
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_another_architecture_is_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "g.gguf", "gemma3")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    with pytest.raises(InputError, match=r"'gemma3' is not supported.*qwen3"):
        resolve_model(str(finished(writer, tmp_path / "g.gguf")))


def importance(columns: int) -> np.ndarray:
    """Sums of squares of which some columns matter far more than others."""
    return (np.arange(columns) % 7 == 0).astype(np.float32) * 300 + 1


def imatrix_files(checkpoint: Path, folder: Path) -> tuple[Path, Path]:
    """An importance matrix for a checkpoint in the two formats of llama.cpp."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    entries = {
        names.get_name(name, try_suffixes=(".weight",)): importance(weight.shape[1])
        for name, weight in load_file(checkpoint / "model.safetensors").items()
        if "proj.weight" in name
    }
    writer = gguf.GGUFWriter(folder / "imatrix.gguf", "llama")
    writer.add_type("imatrix")
    old = struct.pack("<i", len(entries))
    for name, values in entries.items():
        writer.add_tensor(f"{name}.in_sum2", values[None])
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 100, np.float32))
        old += struct.pack(f"<i{len(name)}sii", len(name), name.encode(), 1, len(values)) + values.tobytes()
    (folder / "imatrix.dat").write_bytes(old + struct.pack("<i", 100))
    return finished(writer, folder / "imatrix.gguf"), folder / "imatrix.dat"


def test_an_imatrix_lowers_the_error_of_columns_that_matter(tiny_checkpoint, tmp_path, ok):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    for name in (n for n in weights if "proj.weight" in n):
        weights[name][:, ::7] *= 0.05  # the columns that matter, which uniform k-means would forget
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    original = ModelSource.open(checkpoint)
    names = [n.removesuffix(".weight") for n in original.names() if "proj.weight" in n]
    errors, found = {}, {}
    for file in (None, *imatrix_files(checkpoint, tmp_path)):
        out = tmp_path / f"out-{len(errors)}"
        ok("quantize", checkpoint, out, *FAST, *(() if file is None else ("--imatrix", file)))
        overlay = Overlay.open(out)
        errors[file] = 0.0
        for name in names:
            held = dequantize(overlay.linear(name), 3)
            miss = (held - original.read(f"{name}.weight").float()) ** 2
            errors[file] += float((miss * torch.from_numpy(importance(miss.shape[1]))).sum())
        found[file] = overlay.linear(names[0]).lut
        assert ("imatrix_sha256" in overlay.quantization) is (file is not None)
    plain, new, old = errors
    assert errors[new] < 0.6 * errors[plain] and errors[old] == errors[new]
    assert torch.equal(found[old], found[new])


@pytest.mark.parametrize(
    "content, named",
    [
        (b"", "not an imatrix"),
        (struct.pack("<ii", 1, 2**30), "not an imatrix"),
        (struct.pack("<ii1sii", 1, 1, b"a", 1, 2**30), "not an imatrix"),
        (struct.pack("<ii1siif", 1, 1, b"a", 1, 1, 1.0), "no importance"),
        (struct.pack("<ii19siif", 1, 19, b"blk.0.attn_q.weight", 1, 1, math.nan), "mean squares"),
        (
            struct.pack("<ii19siif", 1, 19, b"blk.0.attn_q.weight", 1, 1, 1.0),
            "1 values for the 64 columns|0 values",
        ),
    ],
)
def test_another_imatrix_is_refused(content, named, tiny_checkpoint, tmp_path, refused):
    (tmp_path / "i.dat").write_bytes(content)
    refused("quantize", tiny_checkpoint, tmp_path / "o", *FAST, "--imatrix", tmp_path / "i.dat", says=named)
    assert not (tmp_path / "o.partial").exists()


def test_an_imatrix_is_not_mixed_with_gradients(tiny_checkpoint, tmp_path, refused):
    refused(
        "quantize", tiny_checkpoint, tmp_path / "o", "--imatrix", tmp_path / "i.dat", says="--fisher none"
    )
