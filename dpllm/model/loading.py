"""Loads a decoder from a plain Hugging Face checkpoint or from an overlay, whole or only some of its planes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.base.machine import usable_cores
from dpllm.kernels.backend import Backend, choose_backend
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.kernels.weight import Int8Weight, QuantizedWeight
from dpllm.model.config import ModelConfig
from dpllm.model.decoder import Decoder, Group, Layer
from dpllm.model.memory import check_memory, resident_bytes
from dpllm.model.pair_range import PairRange
from dpllm.quant.checkpoint import Checkpoint, quantization_method
from dpllm.quant.int8_cost import wide_matrices
from dpllm.quant.overlay import QUANT_METHOD, Overlay
from dpllm.quant.source import ModelSource, read_json

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
O_PROJ = "self_attn.o_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"


@dataclass(frozen=True)
class LoadOptions:
    """Options for loading a decoder.

    resident_bits: the number of planes to read and hold, for every matrix or by group name; None: all. granularity:
    'fused' decides once for q/k/v and once for gate/up, 'linear' decides once per matrix. backend, cpu: see
    kernels/backend.py. device, dtype: where and in which type the model computes. kv_dtype: the storage type of keys
    and values; None: see `cache_dtype`, or float32 where some text could exceed float16.
    """

    resident_bits: int | Mapping[str, int] | None = None
    granularity: str = "fused"
    backend: str | None = None
    cpu: CpuOptions = field(default_factory=CpuOptions)
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None

    def cache_dtype(self, backend: Backend, quantized: bool = True) -> torch.dtype:
        """Returns kv_dtype if given; else float16 for native kernels, which widen it for free, or `dtype` if exact."""
        half = quantized and backend.cpu is not None and self.cpu.accuracy != "exact"
        return self.kv_dtype or (torch.float16 if half else self.dtype)


def is_overlay(path: Path) -> bool:
    """Tells whether a directory holds an overlay. Raises InputError for a quantisation method that is not read."""
    config = read_json(path / "config.json")
    given = config.get("quantization_config")
    if isinstance(given, dict) and given.get("quant_method") == QUANT_METHOD:
        return True
    quantization_method(config, path)
    return False


def load_decoder(path: Path, options: LoadOptions = LoadOptions()) -> Decoder:
    """Reads the model in a directory. With `resident_bits`, only the resident planes and tables are read.

    Raises InputError where the files are incomplete or do not fit together, where `resident_bits` are not stored, or
    where the memory is too small."""
    backend = choose_backend(options.backend, options.device, options.cpu)
    config = ModelConfig.read(path)
    source: Any = Overlay.open(path) if is_overlay(path) else Checkpoint(ModelSource.open(path))
    if isinstance(source, Overlay) and options.resident_bits is not None:
        lo, hi = source.bits
        wanted = options.resident_bits
        for bits in wanted.values() if isinstance(wanted, Mapping) else [wanted]:
            if not lo <= bits <= hi:
                raise InputError(f"resident_bits={bits} is not available: {path} stores {lo} to {hi} bits.")
    if isinstance(source, Overlay) and options.device == "cpu":
        asked = options.resident_bits
        widest = max(asked.values()) if isinstance(asked, Mapping) else asked or source.bits[1]
        check_memory(path, {b: resident_bytes(source, b) for b in range(source.bits[0], widest + 1)})
    return _Builder(config, source, backend, options).build()


def make_group(
    name: str, weight: QuantizedWeight, bias: Tensor | None, backend: Backend, device: str
) -> Group:
    """Makes a quantised group, whose weight is prepared for the backend."""
    widths = range(weight.seed_bits, weight.resident_bits + 1)
    return Group(
        name, backend.prepare(weight, device), bias,
        seed_bits=weight.seed_bits, resident_bits=weight.resident_bits,
        weights=weight.out_features * weight.in_features, bytes_at=tuple(weight.nbytes(b) for b in widths),
    )  # fmt: skip


class _Builder:
    """Builds groups and layers from the tensors of a checkpoint or overlay."""

    def __init__(self, config: ModelConfig, source: Any, backend: Backend, options: LoadOptions):
        self.config, self.source, self.backend, self.options = config, source, backend, options
        self.overlay = source if isinstance(source, Overlay) else None
        self.ranges = None if self.overlay is None else PairRange(self.overlay, config)
        choose = self.overlay is not None and options.cpu.accuracy == "balanced"
        self.wide = wide_matrices(source.int8_nats) if choose else set()
        self.names = {name for name, _ in source.entries()} if self.overlay else set(source.names())

    def build(self) -> Decoder:
        """Reads every tensor and returns the decoder."""
        with ThreadPoolExecutor(usable_cores()) as pool:  # checksums and copies release the interpreter lock
            layers = list(pool.map(self.layer, range(self.config.num_layers)))
        embedding, head = self.embedding_and_head()
        norm = self.tensor("model.norm.weight", (self.config.hidden_size,))
        kv_dtype, notes = self.cache_type(layers)
        decoder = Decoder(
            self.config,
            self.backend,
            layers,
            embedding,
            norm,
            head,
            dtype=self.options.dtype,
            kv_dtype=kv_dtype,
        )
        decoder.notes = notes
        decoder.bytes_read = self.source.bytes_read
        return decoder

    def cache_type(self, layers: Sequence[Layer]) -> tuple[torch.dtype, tuple[str, ...]]:
        """The storage type of keys and values, and a note where it is not the usual one."""
        options = self.options
        usual = options.cache_dtype(self.backend, self.overlay is not None)
        if self.ranges is None or options.kv_dtype is not None or usual != torch.float16:
            return usual, ()
        held = options.resident_bits
        for layer in layers:
            planes = held[layer.qkv[0].name] if isinstance(held, Mapping) else held
            if self.ranges.exceeds(layer, planes):
                return torch.float32, (
                    f"the cache is float32, twice as large: keys or values of layer {layer.index} can exceed float16",
                )
        return usual, ()

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        t = self.source.read(name)
        if tuple(t.shape) != shape:
            raise InputError(
                f"{self.source.path}: tensor '{name}' has shape {list(t.shape)}, config.json implies {list(shape)}."
            )
        return t.to(self.options.device, self.options.dtype)

    def layer(self, index: int) -> Layer:
        c, prefix = self.config, f"model.layers.{index}."
        heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        hidden, inner = c.hidden_size, c.intermediate_size

        def norm(name: str, size: int) -> Tensor:
            return self.tensor(f"{prefix}{name}.weight", (size,))

        return Layer(
            index=index,
            input_norm=norm("input_layernorm", hidden),
            qkv=self.groups(prefix, "qkv", QKV, (heads, kv, kv), hidden),
            o=self.groups(prefix, "o", (O_PROJ,), (hidden,), heads)[0],
            post_norm=norm("post_attention_layernorm", hidden),
            gate_up=self.groups(prefix, "gate_up", GATE_UP, (inner, inner), hidden),
            down=self.groups(prefix, "down", (DOWN,), (hidden,), inner)[0],
            q_norm=norm("self_attn.q_norm", c.head_dim) if c.qk_norm else None,
            k_norm=norm("self_attn.k_norm", c.head_dim) if c.qk_norm else None,
        )

    def groups(
        self, prefix: str, name: str, parts: tuple[str, ...], rows: tuple[int, ...], columns: int
    ) -> list[Group]:
        """Makes one fused group of the matrices, or one group for each at granularity 'linear'."""
        full = [prefix + p for p in parts]
        if self.options.granularity == "linear":
            return [self.group(f, [f], [r], columns) for f, r in zip(full, rows, strict=True)]
        return [self.group(prefix + name, full, list(rows), columns)]

    def group(self, name: str, parts: list[str], rows: list[int], columns: int) -> Group:
        biases = [
            self.tensor(f"{p}.bias", (r,)) if f"{p}.bias" in self.names else None
            for p, r in zip(parts, rows, strict=True)
        ]
        bias = None
        if any(b is not None for b in biases):
            where: Any = {"dtype": self.options.dtype, "device": self.options.device}
            filled = [torch.zeros(r, **where) if b is None else b for b, r in zip(biases, rows, strict=True)]
            bias = torch.cat(filled)
        if self.overlay is None:
            dense = [self.tensor(f"{p}.weight", (r, columns)) for p, r in zip(parts, rows, strict=True)]
            return Group(name, torch.cat(dense) if len(dense) > 1 else dense[0], bias)
        for part, r in zip(parts, rows, strict=True):
            self.check_shape(part, (r, columns))
        held = self.options.resident_bits
        weight = self.overlay.stacked(parts, held[name] if isinstance(held, Mapping) else held)
        if self.ranges is not None:
            self.ranges.add(parts, rows, weight)
        group = make_group(name, weight, bias, self.backend, self.options.device)
        if self.backend.cpu is not None and self.wide.intersection(parts):
            group.weight.matrix.x_digits = 2
        return group

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        assert self.overlay is not None
        layout = self.overlay.linears.get(name)
        if layout is None or layout.shape != shape:
            found = None if layout is None else list(layout.shape)
            raise InputError(
                f"{self.overlay.path}: matrix '{name}' is {found}, config.json implies {list(shape)}."
            )

    def embedding_and_head(self) -> tuple[Any, Any]:
        c = self.config
        shape, device = (c.vocab_size, c.hidden_size), self.options.device
        head: Any = None
        if self.overlay is not None and self.overlay.has("lm_head.int8"):
            head = self.overlay.int8("lm_head").to(device)
            if tuple(head.values.shape) != shape:
                raise InputError(
                    f"{self.overlay.path}: 'lm_head' is {list(head.values.shape)}, config.json implies {list(shape)}."
                )
        elif self.overlay is not None and "lm_head" in self.overlay.linears:
            head = self.backend.prepare(self.overlay.linear("lm_head"), device)
        if "model.embed_tokens.weight" in self.names:
            embedding: Any = self.tensor("model.embed_tokens.weight", shape)
        else:
            embedding = head
        if head is None:
            head = self.tensor("lm_head.weight", shape) if "lm_head.weight" in self.names else embedding
        if not isinstance(embedding, (Tensor, Int8Weight)):
            raise InputError(
                f"{self.source.path} has no tensor 'model.embed_tokens.weight'. Copy the model again."
            )
        return embedding, head
