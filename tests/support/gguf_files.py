"""GGUF files made from Hugging Face checkpoints by the `gguf` package's own writer and table of names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

METADATA = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.value_length": "head_dim", "rope.dimension_count": "head_dim",
}  # fmt: skip


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to queries and keys of a Llama."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tokenizer_metadata(checkpoint: Path, pre: str = "smollm") -> dict[str, Any]:
    """The tokenizer of a checkpoint with byte-level BPE, as llama.cpp's converter writes it."""
    model = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))
    special = {t["content"]: t["id"] for t in model["added_tokens"]}
    ids = {i: t for t, i in (model["model"]["vocab"] | special).items()}
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [ids[i] for i in sorted(ids)],
        "tokenizer.ggml.token_type": [3 if ids[i] in special else 1 for i in sorted(ids)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": bool(model["post_processor"]),
    }
    names = json.loads((checkpoint / "tokenizer_config.json").read_text())
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        if name in names:
            found[f"tokenizer.ggml.{key}_token_id"] = special[names[name]]
    return found


def write_gguf(
    path: Path, checkpoint: Path, *, architecture: str = "llama", kind: Kind = Kind.F32, permute: bool = True,
    metadata: Mapping[str, Any] | None = None, tensors: Mapping[str, torch.Tensor | None] | None = None,
    pieces: int = 0,
) -> Path:  # fmt: skip
    """Writes the model in `checkpoint` as a GGUF file and returns its path (the first one of several).

    kind: of the matrices. permute: as llama.cpp's converter does with a Llama. metadata, tensors: additions and
    replacements; None leaves one out. pieces: tensors per file, 0 for one file.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    values = {f"{architecture}.{k}": config[name] for k, name in METADATA.items() if name in config}
    values[f"{architecture}.rope.freq_base"] = float(config["rope_parameters"]["rope_theta"])
    values[f"{architecture}.attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
    if (checkpoint / "tokenizer.json").exists():
        values |= tokenizer_metadata(checkpoint)
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, architecture.upper()), config["num_hidden_layers"]
    )
    found: dict[str, torch.Tensor | None] = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        if permute and "q_proj" in name:
            weight = permuted(weight, heads)
        if permute and "k_proj" in name:
            weight = permuted(weight, kv_heads)
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = weight
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=pieces)
    for key, value in (values | dict(metadata or {})).items():
        if value is not None:
            add_value(writer, key, value)
    for name, weight in (found | dict(tensors or {})).items():
        if weight is not None:
            add_tensor(writer, name, weight, kind)
    return finished(writer, path)


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds a metadata value with the type that fits it."""
    adders: dict[type, Callable] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    adders[type(value)](key, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, weight: torch.Tensor, kind: Kind) -> None:
    """Adds a tensor: a matrix in the given type, a vector in float32."""
    values = weight.float().numpy()
    if values.ndim == 1 or kind == Kind.F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def finished(writer: gguf.GGUFWriter, path: Path) -> Path:
    """Writes everything, and returns the (first) file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0]


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file by the package's own reader and its own dequantisation."""
    reader = gguf.GGUFReader(path)
    return {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
