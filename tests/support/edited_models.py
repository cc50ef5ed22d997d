"""Checkpoints that were edited, and their logits by transformers and by dpllm."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpllm.model.loading import load_decoder
from dpllm.quant.layerwise import LayerwiseModel, call_layer
from dpllm.quant.source import INDEX, SINGLE, ModelSource

TOLERANCE = 1e-4
IDS = torch.tensor([5, 9, 3, 3, 20, 11, 7, 40, 8, 31, 2, 60, 17, 5, 9, 13])


def edit_tensors(model: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> None:
    """Saves the single file again after `edit` changed its tensors in place or returned others."""
    tensors = load_file(model / SINGLE)
    tensors = edit(tensors) or tensors
    save_file({n: t.contiguous() for n, t in tensors.items()}, model / SINGLE, {"format": "pt"})


def edit_config(model: Path, remove: tuple[str, ...] = (), **changes) -> None:
    """Writes config.json again with some fields changed or removed."""
    fields = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k not in remove}))


def split(model: Path, shards: int = 2, listed: Mapping[str, object] | None = None) -> None:
    """Makes shards and an index of the single file. listed: other entries of the index."""
    tensors = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    places: dict[str, object] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in sorted(tensors)[i::shards]}
        save_file(part, model / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places | dict(listed or {})}))


@torch.no_grad()
def expected_logits(model: Path, ids: Tensor = IDS) -> Tensor:
    """Logits [T, vocabulary] by transformers in float32. Raises AssertionError where it fills in random numbers."""
    loaded, info = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    return loaded.eval()(ids[None]).logits[0]


@torch.no_grad()
def decoder_logits(model: Path, ids: Tensor = IDS) -> Tensor:
    """Logits [T, vocabulary] by the decoder that generates."""
    return load_decoder(model).forward(ids)


@torch.no_grad()
def fisher_logits(model: Path, ids: Tensor = IDS) -> Tensor:
    """Logits [T, vocabulary] by the modules that the Fisher pass computes with."""
    layers = LayerwiseModel(ModelSource.open(model))
    hidden, arguments = layers.embed(ids[None])
    for i in range(len(layers)):
        hidden = call_layer(layers.load_layer(i), hidden, arguments[i])
    weight = layers.source.read("model.norm.weight").float()
    normed = torch.nn.functional.rms_norm(hidden[0], weight.shape, weight, layers.config.rms_norm_eps)
    return normed @ layers.source.read(layers.head_weight()).float().T


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether logits are equal but for rounding."""
    return bool((found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max())))
