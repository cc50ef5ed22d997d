"""Contexts for the tests of KV policies: caches filled at random, and a tiny model of attention layers only."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpllm.kernels import reference
from dpllm.kvzip_bridge.cache import DenseKVCache
from dpllm.kvzip_bridge.interfaces import RepeatPrompts, ScoringInput
from dpllm.kvzip_bridge.model_view import ModelView
from dpllm.kvzip_bridge.query_recording import Queries, QueriesWanted, watched
from dpllm.kvzip_bridge.ragged_cache import RaggedKVCache

PROMPTS = RepeatPrompts(first=(1, 2, 3), later=(4, 5), after=(6,))
VOCABULARY = 50
NOTHING = QueriesWanted()


@dataclass
class TinyAttention:
    """Layers of nothing but attention, random, in float64; what the caches see is float32."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 8
    layers: int = 3
    rotates: tuple[bool, ...] = (True, False, True)
    pruned: tuple[int, ...] = (0, 2)
    max_positions: int = 4096
    seed: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        hidden = self.hidden_size
        shapes = {"q": self.heads * self.dim, "k": self.kv_heads * self.dim, "v": self.kv_heads * self.dim}

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weights = {n: draw(self.layers, hidden, s) * (3 / hidden**0.5) for n, s in shapes.items()}
        self.weights["o"] = draw(self.layers, hidden, self.heads * self.dim) * 0.3
        self.weights["embedding"] = draw(VOCABULARY, hidden)
        self.inv_freq = 1 / 50 ** (torch.arange(0, self.dim, 2).double() / self.dim)
        self.scale = self.dim**-0.5

    @property
    def hidden_size(self) -> int:
        return 24

    def view(self) -> ModelView:
        return ModelView(
            self.pruned, self.heads, self.kv_heads, self.dim, self.hidden_size, self.scale, self.inv_freq.float(),
            self.rotates, self.max_positions, reference, self.forward, lambda layer: self.weights["o"][layer].float(),
        )  # fmt: skip

    def projected(self, layer: int, x: Tensor, first: int) -> tuple[Tensor, ...]:
        """(attention input, q, k, v) of tokens that stand at `first` and on."""
        h = x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        q, k, v = ((h @ self.weights[n][layer]).unflatten(-1, (-1, self.dim)) for n in "qkv")
        if self.rotates[layer]:
            q, k = turn(q, self.inv_freq, first), turn(k, self.inv_freq, first)
        return h, q, k, v

    def forward(self, ids: Tensor, cache, hidden=None) -> None:
        """The decoder's side of the caches."""
        x = self.weights["embedding"][ids]
        for layer in range(self.layers):
            h, q, k, v = self.projected(layer, x, cache.length)
            if hidden is not None:
                hidden(layer, h.float())
            cache.write(layer, k.float(), v.float())
            out = cache.attend(layer, q.float(), self.scale, None, reference)
            x = x + out.flatten(1).double() @ self.weights["o"][layer].T
        cache.advance(len(ids))

    def trace(self, ids: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """(h, q, k, v) of each layer in float64, without a cache; k, v as one of `dtype` would hold them."""
        x, traced = self.weights["embedding"][ids], []
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        group = self.heads // self.kv_heads
        for layer in range(self.layers):
            h, q, k, v = self.projected(layer, x, 0)
            k, v = (t.float().to(dtype).double() for t in (k, v))
            traced.append((h, q, k, v))
            logits = torch.einsum("thd,shd->hts", q, k.repeat_interleave(group, 1)) * self.scale
            attention = logits.masked_fill(~causal, -torch.inf).softmax(-1)
            out = torch.einsum("hts,shd->thd", attention, v.repeat_interleave(group, 1))
            x = x + out.flatten(1) @ self.weights["o"][layer].T
        return traced


def turn(x: Tensor, inv_freq: Tensor, first: int) -> Tensor:
    """Rotary embedding of x [T, H, D] float64 at positions `first` and on, as complex numbers."""
    position = torch.arange(first, first + len(x)).double()
    halves = torch.complex(*x.double().chunk(2, -1))
    turned = halves * torch.exp(1j * position[:, None] * inv_freq.double())[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def random_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def new_cache(model: TinyAttention, capacity: int, dtype=torch.float32, ragged: bool = False):
    kind = RaggedKVCache if ragged else DenseKVCache
    return kind(model.layers, model.kv_heads, model.dim, capacity, dtype)


def read(
    model: TinyAttention, ids: Tensor, cache, first: int = 0, protected: int = 0,
    wants: QueriesWanted = NOTHING, pieces: int = 16, prompts: RepeatPrompts = PROMPTS,
) -> ScoringInput:  # fmt: skip
    """The context after `ids` were read: those from `first` on watched."""
    view = model.view()
    queries = Queries(wants, view)
    for piece in (*ids[cache.length : first].split(pieces), *ids[max(first, cache.length) :].split(pieces)):
        if len(piece):
            model.forward(piece, watched(cache, queries.watch) if cache.length >= first else cache)
    return ScoringInput(ids, cache, first, protected, queries, prompts, view)


def pruned_read(
    model: TinyAttention, ids: Tensor, first: int, protected: int, dtype=torch.float32, **kwargs
) -> ScoringInput:
    """A context on a ragged cache whose first part was pruned unevenly, protected positions apart."""
    cache = new_cache(model, 4, dtype, ragged=True)
    read(model, ids[:first], cache)
    keep = torch.rand(model.layers, model.kv_heads, first, generator=torch.Generator().manual_seed(3)) < 0.4
    keep[..., :protected] = True
    cache.prune(keep, [None] * model.layers, room=5)
    return read(model, ids, cache, first, protected, **kwargs)


def held(context: ScoringInput) -> list[Tensor]:
    """Copies of all pairs a cache holds."""
    cache = context.cache
    if isinstance(cache, RaggedKVCache):
        heads = range(context.model.kv_heads)
        return [t.clone() for layer in range(len(cache.k)) for h in heads for t in cache.run(layer, h)]
    return [t[:, : cache.length].clone() for t in (*cache.k, *cache.v)]
