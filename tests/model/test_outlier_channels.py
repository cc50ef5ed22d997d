"""Channels a hundred times as large as their neighbours: int8 activations lose the neighbours, and this is mended."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpllm.kernels.cpu.library import CpuOptions
from dpllm.model import loading
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.prepare.quantize import quantize
from dpllm.quant.int8_cost import wide_matrices
from dpllm.quant.overlay import Overlay


@pytest.fixture(scope="module")
def planted(tiny_checkpoint, tmp_path_factory):
    """An overlay of the tiny model with outliers before q/k/v and gate/up, which the weights undo."""
    root = tmp_path_factory.mktemp("outliers")
    shutil.copytree(tiny_checkpoint, root / "model")
    tensors = {n: t.float() for n, t in load_file(root / "model" / "model.safetensors").items()}
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        inputs = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                  "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}  # fmt: skip
        for norm, matrices in inputs.items():
            tensors[f"{prefix}{norm}.weight"][[5, 40]] *= 100
            for matrix in matrices:
                tensors[f"{prefix}{matrix}.weight"][:, [5, 40]] /= 100
    save_file(tensors, root / "model" / "model.safetensors", metadata={"format": "pt"})
    return quantize(root / "model", root / "overlay", samples=8, sequence_length=64, refine="none", jobs=1)


def digits(path, accuracy: str = "balanced") -> dict[str, int]:
    decoder = load_decoder(path, LoadOptions(cpu=CpuOptions(accuracy=accuracy)))
    return {g.name: g.weight.matrix.x_digits for g in decoder.groups}


def logits(path, sequences: torch.Tensor, accuracy: str = "balanced") -> torch.Tensor:
    """Of prompts, and of decoding at 4 bits."""
    decoder = load_decoder(path, LoadOptions(cpu=CpuOptions(accuracy=accuracy), kv_dtype=torch.float32))
    four = lambda group, x: torch.full((len(x),), 4, dtype=torch.int32)  # noqa: E731
    found = []
    with torch.no_grad():
        for ids in sequences:
            found += [decoder.forward(ids), decoder.forward(ids, select=four)]
    return torch.stack(found)


def test_the_groups_with_outliers_are_found(planted, quantized):
    nats = Overlay.open(planted).int8_nats
    assert len(nats) == 21
    plain = Overlay.open(quantized).int8_nats
    assert sum(nats.values()) > 20 * sum(plain.values())
    widened = {name for name, count in digits(planted).items() if count == 2}
    assert widened == {g for g in widened if g.endswith(("qkv", "gate_up"))} != set()
    assert len(wide_matrices(nats)) >= len(widened)
    assert set(digits(planted, "fast").values()) == set(digits(planted, "exact").values()) == {0}


def test_their_loss_is_gone(planted, heldout_sequences, monkeypatch):
    ids = heldout_sequences[:4]
    exact, mended = logits(planted, ids, "exact"), logits(planted, ids)
    monkeypatch.setattr(loading, "wide_matrices", lambda nats: set())
    left = logits(planted, ids)
    assert float((mended - exact).square().mean()) < 0.02 * float((left - exact).square().mean())


def test_an_overlay_without_the_field_is_read_as_before(overlay):
    path = overlay("llama")  # made without a text
    assert Overlay.open(path).int8_nats == {}
    assert set(digits(path).values()) == {0}
