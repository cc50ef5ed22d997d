"""Makes the contents of config.json from the metadata of a GGUF file, and checks its tensors against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpllm.base.errors import InputError
from dpllm.quant.gguf.families import FAMILIES, OUTER, Family, Wanted
from dpllm.quant.gguf.header import Header, StoredTensor
from dpllm.quant.gguf.metadata import Metadata
from dpllm.quant.gguf.rope import ROPE_FREQUENCIES, rope_parameters

# Tokens that end a text in llama.cpp, where the file's vocabulary has them as control tokens.
END_TOKENS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<|end_of_text|>", "<EOT>", "<|end_of_turn|>",
)  # fmt: skip
CONTROL = 3  # token_type


@dataclass(frozen=True)
class Part:
    """Where the values of one tensor of the model are: file, place, and what is undone (families.py)."""

    path: Path
    stored: StoredTensor
    change: str | None


@dataclass(frozen=True)
class Described:
    """A model as its header describes it: config.json as an object, and the parts by the names of the HF model."""

    family: Family
    config: dict[str, Any]
    parts: dict[str, Part]


def describe(header: Header, parts: Mapping[str, tuple[Path, StoredTensor]]) -> Described:
    """Makes the configuration of a model and finds its tensors.

    header: of the first file. parts: file and place of every tensor, over all files of the model. Raises InputError
    for something other than a model that dpllm runs, and for tensors that are missing, misshapen or left over.
    """
    meta = Metadata(header.path, header.metadata)
    family = _family(meta)
    sizes = _sizes(meta, parts)
    layers = meta.whole(_key(meta, "block_count"), most=len(parts))
    wanted = dict(OUTER)
    for n in range(layers):
        for stored, tensor in family.layer.items():
            wanted[f"blk.{n}.{stored}"] = tensor._replace(name=f"model.layers.{n}.{tensor.name}")
    found = _matched(header.path, wanted, parts, sizes)
    config = _config(meta, family, sizes, layers, parts)
    return Described(family, config, found)


def _key(meta: Metadata, name: str) -> str:
    """The metadata key of an architecture's own value."""
    return f"{meta.text('general.architecture')}.{name}"


def _family(meta: Metadata) -> Family:
    """The family of the file. Raises InputError for files that hold something else than a model, and by name for
    architectures that do not run."""
    architecture, kind = meta.text("general.architecture"), meta.text("general.type", "model")
    if kind == "adapter":
        raise InputError(
            f"{meta.path} is an adapter (LoRA), not a model. Give the model, merged with the adapter."
        )
    if kind == "mmproj" or architecture in ("clip", "mmproj"):
        raise InputError(
            f"{meta.path} is a multimodal projector, not a model. Give the file of the text model."
        )
    if kind != "model":
        raise InputError(f"{meta.path} holds '{kind}', not a model. Give the file of the model.")
    if architecture not in FAMILIES:
        raise InputError(
            f"{meta.path}: architecture '{architecture}' is not supported. dpllm reads GGUF files of: "
            f"{', '.join(FAMILIES)} (Mistral, SmolLM and SmolLM2 are 'llama')."
        )
    if meta.whole(f"{architecture}.expert_count", 0, least=0):
        raise InputError(
            f"{meta.path} is a mixture of experts, which dpllm does not run. Give a dense model."
        )
    return FAMILIES[architecture]


def _sizes(meta: Metadata, parts: Mapping[str, tuple[Path, StoredTensor]]) -> dict[str, int]:
    """The sizes that shapes of tensors are made of (families.Wanted)."""
    heads, hidden = meta.whole(_key(meta, "attention.head_count")), meta.whole(_key(meta, "embedding_length"))
    kv_heads = meta.whole(_key(meta, "attention.head_count_kv"), heads)
    head = meta.whole(_key(meta, "attention.key_length"), hidden // heads or None)
    if heads % kv_heads or head % 2:
        raise InputError(
            f"{meta.path}: {heads} heads of {head} values with {kv_heads} heads of keys are not a model. "
            "Get another conversion."
        )
    for other in ("attention.value_length", "rope.dimension_count"):
        if meta.whole(_key(meta, other), head) != head:
            raise InputError(
                f"{meta.path}: metadata '{_key(meta, other)}' is {meta.values[_key(meta, other)]}, but heads have "
                f"{head} values; such a model is not supported."
            )
    if "token_embd.weight" not in parts:
        raise InputError(
            f"{meta.path} has no tensor 'token_embd.weight': it is not a whole model. Get the model."
        )
    return {
        "hidden": hidden, "head": head, "queries": heads * head, "keys": kv_heads * head,
        "inner": meta.whole(_key(meta, "feed_forward_length")),
        "vocabulary": parts["token_embd.weight"][1].shape[0],
        "heads": heads, "kv_heads": kv_heads,
    }  # fmt: skip


def _matched(
    path: Path, wanted: Mapping[str, Wanted], parts: Mapping[str, tuple[Path, StoredTensor]], sizes: Mapping[str, int]
) -> dict[str, Part]:  # fmt: skip
    """The parts by the model's own names. Raises InputError unless the file holds what is wanted, and nothing else."""
    if extra := sorted(set(parts) - set(wanted) - {ROPE_FREQUENCIES}):
        raise InputError(
            f"{path} holds tensor '{extra[0]}', which a model of this architecture does not have in dpllm. Leaving it "
            "out would change the model, so it is refused."
        )
    found = {}
    for stored, tensor in wanted.items():
        if stored not in parts:
            if tensor.optional:
                continue
            raise InputError(
                f"{path} has no tensor '{stored}', which its metadata call for. Download it again."
            )
        where, place = parts[stored]
        shape = tuple(sizes[s] for s in tensor.shape)
        if place.shape != shape:
            raise InputError(
                f"{where}: tensor '{stored}' has shape {list(place.shape)}, the metadata imply {list(shape)}. "
                "Get another conversion."
            )
        found[tensor.name] = Part(where, place, tensor.change)
    return found


def _config(
    meta: Metadata, family: Family, sizes: Mapping[str, int], layers: int,
    parts: Mapping[str, tuple[Path, StoredTensor]],
) -> dict[str, Any]:  # fmt: skip
    config = {
        "model_type": family.model_type,
        "hidden_act": "silu",
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["inner"],
        "num_hidden_layers": layers,
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["head"],
        "vocab_size": sizes["vocabulary"],
        "rms_norm_eps": meta.real(_key(meta, "attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": meta.whole(_key(meta, "context_length")),
        "tie_word_embeddings": "output.weight" not in parts,
        "rope_parameters": rope_parameters(meta, sizes["head"], parts.get(ROPE_FREQUENCIES)),
        "dtype": "float32",
        **family.extra,
        **{flag: f"blk.0.{stored}" in parts for flag, stored in family.biases.items()},
    }
    window = meta.whole(_key(meta, "attention.sliding_window"), 0, least=0)
    if (
        window and family.model_type == "llama"
    ):  # transformers' Llama has no window; its Mistral is a Llama with one
        config |= {"model_type": "mistral", "sliding_window": window}
    return config | token_ids(meta, sizes["vocabulary"])


def token_ids(meta: Metadata, vocabulary: int) -> dict[str, Any]:
    """The ids of special tokens, as config.json names them."""
    most = vocabulary - 1
    ids: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in meta:
            ids[f"{name}_token_id"] = meta.whole(f"tokenizer.ggml.{key}_token_id", least=0, most=most)
    tokens, kinds = meta.texts("tokenizer.ggml.tokens"), meta.numbers("tokenizer.ggml.token_type", [])
    ends = [ids["eos_token_id"]] if "eos_token_id" in ids else []
    if "tokenizer.ggml.eot_token_id" in meta:
        ends.append(meta.whole("tokenizer.ggml.eot_token_id", least=0, most=most))
    ends += [i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
             if kind == CONTROL and token in END_TOKENS and i <= most]  # fmt: skip
    ends = list(dict.fromkeys(ends))
    return ids | {"eos_token_id": ends if len(ends) != 1 else ends[0]}
