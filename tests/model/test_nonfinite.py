"""Numbers that are not finite, or would not be in float16: found, named, and never printed as text or NaN."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from command_line import FAST, SMALL
from safetensors.torch import load_file, save_file

from dpllm.base.errors import InputError
from dpllm.decode.cpu_step import NativeStep
from dpllm.evaluation.evaluate import evaluate
from dpllm.kernels import reference
from dpllm.kvzip_bridge.ragged_cache import RaggedKVCache
from dpllm.model import pair_range
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.model.nonfinite import all_finite
from dpllm.opening import open_engine
from dpllm.policies.fixed import StaticPolicy
from dpllm.quant.overlay import Overlay
from dpllm.quant.quantize import Quantizer
from dpllm.quant.quantize_plan import QuantizeOptions
from dpllm.quant.source import ModelSource

TEXT = "def f(x):\n    return x\n" * 12


def changed(checkpoint, out, **factors: float):
    """A copy of a checkpoint. factors: of the tensors whose names end with the key ('.' as '__')."""
    shutil.copytree(checkpoint, out)
    tensors = load_file(out / "model.safetensors")
    for end, factor in factors.items():
        for name in [n for n in tensors if n.endswith(end.replace("__", "."))]:
            tensors[name] = tensors[name].float() * factor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def stored(checkpoint, out):
    return Quantizer(ModelSource.open(checkpoint), out, QuantizeOptions(), documents=None).run()


@pytest.fixture(scope="module")
def wide(tiny_checkpoint, tmp_path_factory):
    """An overlay whose values exceed float16, though its logits are ordinary."""
    root = tmp_path_factory.mktemp("wide")
    model = changed(tiny_checkpoint, root / "model", v_proj__weight=2e5, o_proj__weight=1 / 2e5)
    return stored(model, root / "overlay")


@pytest.fixture(scope="module")
def broken(tiny_checkpoint, tmp_path_factory):
    """(checkpoint, overlay) of a model whose head overflows float32."""
    root = tmp_path_factory.mktemp("broken")
    model = changed(tiny_checkpoint, root / "model", model__norm__weight=1e38, lm_head__weight=1e3)
    return model, stored(model, root / "overlay")


# -- the type of the cache ----------------------------------------------------------------------------------------


def test_values_beyond_float16_get_a_wider_cache(wide, quantized, ok):
    usual = load_decoder(quantized)
    assert (usual.kv_dtype, usual.notes) == (torch.float16, ())
    engine = open_engine(wide)
    assert engine.decoder.kv_dtype == torch.float32
    exact = open_engine(wide, options=LoadOptions(kv_dtype=torch.float32))
    assert engine.generate(TEXT, max_new_tokens=8).text == exact.generate(TEXT, max_new_tokens=8).text != ""
    said = ok("generate", "--overlay", wide, "--max-new-tokens", "2", TEXT)
    assert said.err.count("float16") == 1 and "layer 0" in said.err


@pytest.mark.parametrize("granularity", ["fused", "linear"])
@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen3", "smollm3"])
def test_the_bound_is_reached_and_never_passed(name, granularity, overlay, monkeypatch):
    """The largest key or value is that of the input that points along a row; rotations turn two equal elements."""
    path = overlay(name)
    decoder, stored_ = load_decoder(path, LoadOptions(granularity=granularity)), Overlay.open(path)
    largest = 0.0
    for layer in decoder.layers:
        norm, turned = layer.input_norm, math.sqrt(2) if decoder.config.uses_rope[layer.index] else 1.0
        for part, factor in (("k_proj", turned), ("v_proj", 1.0)):
            full = f"model.layers.{layer.index}.self_attn.{part}"
            if part == "k_proj" and layer.k_norm is not None:
                largest = max(
                    largest, factor * math.sqrt(len(layer.k_norm)) * float(layer.k_norm.abs().max())
                )
                continue
            bias = stored_.read(f"{full}.bias").abs() if stored_.has(f"{full}.bias") else torch.zeros(1)
            for bits in range(2, 7):
                rows = reference.dequantize(stored_.linear(full), bits) * norm
                along = (
                    rows / rows.norm(dim=1, keepdim=True) * math.sqrt(rows.shape[1])
                )  # as the norm gives it
                largest = max(largest, factor * float(((along * rows).sum(1) + bias).max()))
    for limit, wanted in ((1.001 * largest, torch.float16), (0.999 * largest, torch.float32)):
        monkeypatch.setattr(pair_range, "HALF_MOST", limit)
        assert load_decoder(path, LoadOptions(granularity=granularity)).kv_dtype == wanted


def test_a_saved_context_that_is_not_finite_is_refused(quantized, tmp_path):
    engine = open_engine(quantized)
    context = engine.read(TEXT, keep=1.0)
    assert isinstance(context.cache, RaggedKVCache)
    context.cache.v[1][0, 0] = torch.inf
    context.save(tmp_path / "saved")
    with pytest.raises(InputError, match=r"not finite\. Build"):
        type(context).load(tmp_path / "saved", engine)


# -- logits -------------------------------------------------------------------------------------------------------


def narrow(path):
    """The overlay with a cache that cannot hold its values."""
    return open_engine(path, options=LoadOptions(kv_dtype=torch.float16))


def test_overflowing_pairs_are_the_named_cause(wide):
    engine = narrow(wide)
    says = "attention of layer 0 is not finite: .* reach .*e.05, and a cache of float16 holds 65504"
    for call in (
        lambda: engine.generate(TEXT).text,
        lambda: engine.generate(TEXT, temperature=1.0).text,
        lambda: engine.score(TEXT),
        lambda: engine.read(TEXT),
    ):
        with pytest.raises(InputError, match=says):
            call()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_every_step_finds_them_and_leaves_the_cache(wide, backend):
    options = LoadOptions(kv_dtype=torch.float16, backend=backend)
    engine = open_engine(wide, options=options)
    step, cache = engine.new_step(), engine.decoder.new_cache(8)
    assert isinstance(step, NativeStep) == (backend is None)
    with pytest.raises(InputError, match="attention of layer"):
        for token in engine.prompts.prompt_ids(TEXT)[:8]:
            before = cache.length
            step(token, cache, engine.policy.begin_text())
    assert cache.length == before


def test_side_by_side_finds_them(wide):
    """The texts of a policy that learns are decoded together where there is no native step."""
    engine = open_engine(wide, options=LoadOptions(kv_dtype=torch.float16, backend="reference"))
    policy = StaticPolicy(engine.planes.tolist())
    policy.stepwise = True
    ids = engine.prompts.prompt_ids(TEXT)
    with pytest.raises(InputError, match="attention of layer"):
        evaluate(engine.decoder, policy, 6.0, [ids, ids[:40]])


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ({"model__norm__weight": 1e38}, "head's product is not finite"),
        ({"layers__1__mlp__up_proj__weight": 3e38}, "product of 'model.layers.1.gate_up' is not finite"),
        ({"layers__2__mlp__down_proj__weight": 3e37, "layers__2__mlp__up_proj__weight": 3e3}, "layers.2.down' is not"),
        ({"1__mlp__up_proj__weight": 1e20, "1__mlp__gate_proj__weight": 1e20}, "gate and up in layer 1"),
    ],
)  # fmt: skip
def test_the_first_fault_is_named(tiny_checkpoint, tmp_path, factors, says):
    engine = open_engine(changed(tiny_checkpoint, tmp_path / "model", **factors))
    with pytest.raises(InputError, match=f"NaN or infinite logits. .*{says}"):
        engine.score(TEXT)


def test_every_command_refuses_in_one_line(broken, refused, tmp_path):
    model, overlay = broken
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    says = "NaN or infinite logits.*head"
    refused("generate", "--overlay", model, TEXT, says=says)
    refused("generate", "--overlay", overlay, TEXT, "--json", says=says)
    refused("generate", "--overlay", overlay, TEXT, "--temperature", "1", says=says)
    refused(
        "eval", text, "--overlay", overlay, "--policy", "uniform", "--target-bits", "4", "--json", says=says
    )
    refused("context", "build", text, "--overlay", overlay, "-o", tmp_path / "c", says=says, alone=False)
    refused("calibrate", overlay, *SMALL, says=says, alone=False)
    refused(
        "quantize", model, tmp_path / "out", *SMALL, says="gradient at the head is not finite", alone=False
    )
    assert not (tmp_path / "c").exists()


def test_weights_that_are_not_finite_are_named_when_quantising(tiny_checkpoint, refused, tmp_path):
    model = changed(tiny_checkpoint, tmp_path / "model", layers__1__self_attn__q_proj__weight=math.inf)
    refused("quantize", model, tmp_path / "out", *FAST, says="model.layers.1.self_attn.q_proj.weight' holds NaN",
            alone=False)  # fmt: skip


def test_a_perplexity_beyond_floats_is_said(tiny_checkpoint, ok, tmp_path):
    """Logits of thousands are finite, and so is their loss."""
    model = changed(tiny_checkpoint, tmp_path / "model", model__norm__weight=1e5)
    path = stored(model, tmp_path / "overlay")
    (tmp_path / "text.txt").write_text(TEXT)
    options = ("eval", tmp_path / "text.txt", "--overlay", path, "--policy", "uniform", "--target-bits", "4")
    shown = ok(*options).out
    assert " inf " in shown and "floats)" in shown

    def refuse(word: str):
        raise AssertionError(word)

    (found,) = json.loads(ok(*options, "--json").out, parse_constant=refuse)["results"]
    assert found["perplexity"] is None and found["nll_mean"] > 710 and "infinite" in found["perplexity_is"]


def test_finiteness_of_tensors():
    assert all_finite(torch.zeros(0)) and all_finite(torch.tensor([1.0, -2.0]))
    for bad in (math.nan, math.inf, -math.inf):
        assert not all_finite(torch.tensor([0.0, bad, 1.0]))
