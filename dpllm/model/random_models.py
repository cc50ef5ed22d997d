"""Makes models of well-known shapes with random weights, to measure speed and memory without a download.

Speed and memory do not depend on the values of weights. The text of such a model is noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.kernels.backend import choose_backend
from dpllm.kernels.weight import MAX_TABLE_BITS, MIN_BITS, WORD, Int8Weight, QuantizedWeight, empty_planes
from dpllm.model.config import ModelConfig
from dpllm.model.decoder import Decoder, Group, Layer
from dpllm.model.loading import LoadOptions, make_group


def _llama(
    hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, vocab: int
) -> ModelConfig:
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return ModelConfig(
        model_type="llama", hidden_size=hidden, intermediate_size=intermediate, num_layers=layers,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, vocab_size=vocab, rms_eps=1e-5,
        max_positions=131072, qk_norm=False, windows=(None,) * layers, uses_rope=(True,) * layers,
        inv_freq=1.0 / 500000.0**exponent, rope_scale=1.0, eos_ids=(),
    )  # fmt: skip


SHAPES = {
    "tiny": _llama(256, 8, 768, 4, 2, 64, 4096),  # the shape of the bundled reference model
    "1.1B": _llama(2048, 16, 8192, 32, 8, 64, 32000),
    "3B": _llama(3072, 28, 8192, 24, 8, 128, 128256),  # Llama-3.2-3B
    "8B": _llama(4096, 32, 14336, 32, 8, 128, 128256),  # Llama-3-8B
}


def shape(name: str) -> ModelConfig:
    """Returns a shape by its name. Raises InputError for an unknown name."""
    if name not in SHAPES:
        raise InputError(
            f"'{name}' is neither a directory nor a known shape. Choose one of: {', '.join(SHAPES)}."
        )
    return SHAPES[name]


def shape_resident_bytes(c: ModelConfig, bits: int) -> int:
    """Planes, tables and head of a model of this shape, in bytes."""
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    h, inner = c.hidden_size, c.intermediate_size
    rows = [(heads + 2 * kv, h), (h, heads), (2 * inner, h), (h, inner)]
    entries = sum(2**b for b in range(MIN_BITS, bits + 1))
    layer = sum(n * (k * bits // 8 + 2 * entries + 4 * bits) for n, k in rows)
    return c.num_layers * layer + 2 * c.vocab_size * h


def random_decoder(
    config: ModelConfig, bits: int, options: LoadOptions | None = None, seed: int = 0
) -> Decoder:
    """Returns a decoder whose matrices hold `bits` random planes (2 to 8), with int8 embedding and head."""
    options = options or LoadOptions()
    backend = choose_backend(options.backend, options.device, options.cpu)
    rng = torch.Generator(options.device).manual_seed(seed)
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size

    def group(layer: int, name: str, rows: int, columns: int) -> Group:
        weight = _random_weight(rows, columns, bits, rng)
        return make_group(f"model.layers.{layer}.{name}", weight, None, backend, options.device)

    ones = torch.ones(hidden, dtype=options.dtype, device=options.device)
    layers = [
        Layer(
            index=i, input_norm=ones, post_norm=ones, qkv=[group(i, "qkv", heads + 2 * kv, hidden)],
            o=group(i, "o", hidden, heads), gate_up=[group(i, "gate_up", 2 * inner, hidden)],
            down=group(i, "down", hidden, inner),
        )
        for i in range(config.num_layers)
    ]  # fmt: skip
    embedding, head = (_random_int8(config.vocab_size, hidden, rng) for _ in range(2))
    return Decoder(
        config,
        backend,
        layers,
        embedding,
        ones,
        head,
        dtype=options.dtype,
        kv_dtype=options.cache_dtype(backend),
    )


def _random_weight(rows: int, columns: int, bits: int, rng: torch.Generator) -> QuantizedWeight:
    """Returns planes of random bits, with tables of sorted normal values of the size that is typical for a row."""
    size, on = (bits, rows, -(-columns // WORD)), rng.device
    planes = empty_planes(size) if on.type == "cpu" else torch.empty(size, dtype=torch.int32, device=on)
    planes.random_(-(2**31), 2**31 - 1, generator=rng)
    widths = range(MIN_BITS, min(bits, MAX_TABLE_BITS) + 1)
    tables = [torch.randn(rows, 2**b, generator=rng, device=on).sort(1).values for b in widths]
    return QuantizedWeight(planes, (torch.cat(tables, 1) * columns**-0.5).half(), columns, MIN_BITS)


def _random_int8(rows: int, columns: int, rng: torch.Generator) -> Int8Weight:
    values = torch.empty(rows, columns, dtype=torch.int8, device=rng.device).random_(-127, 128, generator=rng)
    return Int8Weight(values, _scales(rows, columns).to(rng.device))


def _scales(rows: int, columns: int) -> Tensor:
    return torch.full((rows,), columns**-0.5 / 73).half()  # 73 is the root mean square of the values
