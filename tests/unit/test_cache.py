"""The dense cache gives the attention that the definition gives, however its tokens came in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpllm.kernels import reference
from dpllm.kernels.reference import causal_attention
from dpllm.kvzip_bridge.cache import DenseKVCache

LAYERS, DIM, SCALE = 2, 8, 8**-0.5


def tokens(count: int, heads: int, kv_heads: int, seed: int = 0):
    """Random q [T, H, D], k and v [T, KVH, D]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, h, DIM, generator=generator) * 2 for h in (heads, kv_heads, kv_heads))


def plain_attention(q, k, v, window) -> torch.Tensor:
    """The definition, in float64, one query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for t in range(len(q)):
        first = 0 if window is None else max(0, t + 1 - window)
        for h in range(q.shape[1]):
            keys, values = k[first : t + 1, h // group], v[first : t + 1, h // group]
            out[t, h] = ((keys @ q[t, h]) * SCALE).softmax(0) @ values
    return out


def run(cache: DenseKVCache, layer: int, q, k, v, sizes, window=None) -> torch.Tensor:
    """Attention of all tokens, given to the cache in pieces of these sizes."""
    outs = []
    for piece in zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        cache.write(layer, *piece[1:])
        outs.append(cache.attend(layer, piece[0], SCALE, window, reference))
        cache.advance(len(piece[0]))
    return torch.cat(outs)


@st.composite
def pieces(draw):
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return sizes, kv_heads * group, kv_heads, draw(st.none() | st.integers(1, 12)), draw(st.integers(0, 99))


@settings(max_examples=60, deadline=None)
@given(pieces())
def test_any_chunking_is_plain_attention(case):
    sizes, heads, kv_heads, window, seed = case
    q, k, v = tokens(sum(sizes), heads, kv_heads, seed)
    cache = DenseKVCache(LAYERS, kv_heads, DIM, sum(sizes))
    out = run(cache, 1, q, k, v, sizes, window)
    assert cache.length == sum(sizes)
    assert (out - plain_attention(q, k, v, window)).abs().max() < 1e-5


@pytest.mark.parametrize("window", [None, 1, 4])
def test_without_a_cache(window):
    q, k, v = tokens(11, 6, 2)
    out = causal_attention(q, k.transpose(0, 1), v.transpose(0, 1), SCALE, window)
    assert (out - plain_attention(q, k, v, window)).abs().max() < 1e-5


def test_query_heads_read_their_own_kv_head():
    q, k, v = tokens(5, 4, 2)
    other = v.clone()
    other[:, 1] += 1
    base = run(DenseKVCache(1, 2, DIM, 5), 0, q, k, v, [4, 1])
    moved = run(DenseKVCache(1, 2, DIM, 5), 0, q, k, other, [4, 1])
    assert torch.equal(base[:, :2], moved[:, :2])
    assert torch.allclose(base[:, 2:] + 1, moved[:, 2:], atol=1e-5)


def test_layers_do_not_mix():
    q, k, v = tokens(6, 2, 2)
    cache = DenseKVCache(LAYERS, 2, DIM, 6)
    cache.write(0, k, v)
    cache.write(1, k * 0, v + 3)
    out = cache.attend(0, q, SCALE, None, reference)
    assert (out - plain_attention(q, k, v, None)).abs().max() < 1e-5


def test_rewind_forgets():
    q, k, v = tokens(9, 4, 2)
    cache = DenseKVCache(1, 2, DIM, 9)
    run(cache, 0, q[:6], k[:6], v[:6], [6])
    cache.rewind(4)
    assert cache.length == 4
    fresh = tokens(9, 4, 2, seed=1)
    joined = [torch.cat([a[:4], b[4:]]) for a, b in zip((q, k, v), fresh, strict=True)]
    out = run(cache, 0, *(t[4:] for t in fresh), [1, 3, 1])
    assert (out - plain_attention(*joined, None)[4:]).abs().max() < 1e-5


@pytest.mark.parametrize("length", [-1, 4])
def test_rewind_only_backwards(length):
    cache = DenseKVCache(1, 1, DIM, 8)
    cache.advance(3)
    with pytest.raises(ValueError, match="cannot rewind"):
        cache.rewind(length)
    assert cache.length == 3


def test_overflow_is_refused_and_changes_nothing():
    _, k, v = tokens(5, 1, 1)
    cache = DenseKVCache(1, 1, DIM, 4)
    cache.write(0, k[:3], v[:3])
    cache.advance(3)
    kept = torch.stack(cache.k)
    with pytest.raises(ValueError, match="holds 4 tokens; 5"):
        cache.write(0, k[3:], v[3:])
    assert cache.length == 3
    assert torch.equal(torch.stack(cache.k), kept)
    cache.write(0, k[3:4], v[3:4])


def test_bytes_count_what_is_held():
    cache = DenseKVCache(3, 2, DIM, 100, dtype=torch.float16)
    assert cache.nbytes == 0
    cache.advance(5)
    assert cache.nbytes == 5 * 3 * 2 * DIM * 2 * 2  # tokens, layers, heads, dim, keys and values, bytes
