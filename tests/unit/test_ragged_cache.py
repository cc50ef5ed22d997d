"""A pruned cache gives the attention of a dense one whose evicted pairs are masked, and the memory of what is left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpllm.kernels import reference
from dpllm.kvzip_bridge.ragged_cache import RaggedKVCache

DIM, SCALE = 8, 8**-0.5


def tokens(count: int, heads: int, kv_heads: int, seed: int = 0):
    """Random q [T, H, D], k and v [T, KVH, D]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, h, DIM, generator=generator) * 2 for h in (heads, kv_heads, kv_heads))


def masked_attention(q, k, v, kept, window=None) -> torch.Tensor:
    """float64 attention of the last T of S tokens, each head over its kept pairs [KVH, S] up to itself."""
    q, k, v = q.double(), k.double(), v.double()
    before, group = len(k) - len(q), q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for t in range(len(q)):
        for h in range(q.shape[1]):
            mask = kept[h // group].clone()
            mask[before + t + 1 :] = False
            if window is not None:
                mask[: max(0, before + t + 1 - window)] = False
            if mask.any():
                out[t, h] = (k[mask, h // group] @ q[t, h] * SCALE).softmax(0) @ v[mask, h // group]
    return out


def feed(cache: RaggedKVCache, q, k, v, sizes, window=None) -> list[torch.Tensor]:
    """Attention of tokens given in pieces of these sizes, by layer; every layer gets the same tokens."""
    outs: list[list[torch.Tensor]] = [[] for _ in cache.k]
    for a, b, c in zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        for layer, out in enumerate(outs):
            cache.write(layer, b, c)
            out.append(cache.attend(layer, a, SCALE, window, reference))
        cache.advance(len(a))
    return [torch.cat(out) for out in outs]


def pieces_of(total: int, seed: int) -> list[int]:
    rng, sizes = torch.Generator().manual_seed(seed), []
    while total:
        sizes.append(min(total, int(torch.randint(1, 6, (1,), generator=rng))))
        total -= sizes[-1]
    return sizes


@st.composite
def cases(draw):
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 8]))
    context, more = draw(st.integers(1, 14)), draw(st.integers(1, 9))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    return kv_heads, group, context, more, share, draw(st.integers(0, 3)), draw(st.integers(0, 99))


@settings(max_examples=80, deadline=None)
@given(cases())
def test_pruned_is_masked(case):
    kv_heads, group, context, more, share, room, seed = case
    q, k, v = tokens(context + more, kv_heads * group, kv_heads, seed)
    cache = RaggedKVCache(2, kv_heads, DIM, capacity=room)
    feed(cache, q[:context], k[:context], v[:context], pieces_of(context, seed))
    keep = torch.rand(2, kv_heads, context, generator=torch.Generator().manual_seed(seed)) < share
    cache.prune(keep, [None, None], room=room)
    assert cache.length == context
    assert torch.equal(cache.lengths, keep.sum(2, dtype=torch.int32))
    outs = feed(cache, q[context:], k[context:], v[context:], pieces_of(more, seed))
    for layer, out in enumerate(outs):
        kept = torch.cat([keep[layer], torch.ones(kv_heads, more, dtype=torch.bool)], dim=1)
        assert (out - masked_attention(q[context:], k, v, kept)).abs().max() < 1e-5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 3)), min_size=2, max_size=5), st.integers(0, 99))
def test_pruned_again_and_again(rounds, seed):
    """Blocks that are read, and pruned each before the next: what is dropped once stays out."""
    total = sum(n for n, _ in rounds)
    q, k, v = tokens(total, 4, 2, seed)
    cache, done, rng = RaggedKVCache(1, 2, DIM, 0), 0, torch.Generator().manual_seed(seed)
    kept = torch.ones(2, total, dtype=torch.bool)
    for n, room in rounds:
        piece = slice(done, done + n)
        out = feed(cache, q[piece], k[piece], v[piece], pieces_of(n, seed))[0]
        assert (
            out - masked_attention(q[piece], k[: done + n], v[: done + n], kept[:, : done + n])
        ).abs().max() < 1e-5
        keep = torch.rand(1, 2, n, generator=rng) < 0.5
        kept[:, piece] = keep[0]
        cache.prune(keep, [None], room)
        done += n
        for h in range(2):
            assert cache.kept[0][h].tolist() == kept[h, :done].nonzero()[:, 0].tolist()
    held = 2 * int(kept.sum()) * DIM * 4
    assert cache.nbytes == held
    assert cache.allocated_nbytes == held + 2 * 2 * rounds[-1][1] * DIM * 4, (
        "what is kept, and the slack asked for"
    )


def test_all_kept_is_the_same_bit_for_bit():
    q, k, v = tokens(12, 8, 2)
    plain, pruned = (RaggedKVCache(1, 2, DIM, 20) for _ in range(2))
    for cache in (plain, pruned):
        feed(cache, q[:9], k[:9], v[:9], [5, 4])
    pruned.prune(torch.ones(1, 2, 9, dtype=torch.bool), [None], room=5)
    rest = (q[9:], k[9:], v[9:], [1, 2])
    assert torch.equal(feed(plain, *rest)[0], feed(pruned, *rest)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    q, k, v = (t.to(dtype).float() for t in tokens(10, 4, 2))
    cache = RaggedKVCache(1, 2, DIM, 10, dtype)
    feed(cache, q[:8], k[:8], v[:8], [8])
    keep = torch.rand(1, 2, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    cache.prune(keep, [None])
    out = feed(cache, q[8:], k[8:], v[8:], [1, 1])[0]
    kept = torch.cat([keep[0], torch.ones(2, 2, dtype=torch.bool)], dim=1)
    assert (out - masked_attention(q[8:], k, v, kept)).abs().max() < 1e-5, (
        "the pairs are exact, the sums in float32"
    )
    assert cache.k[0].dtype == dtype


def test_a_sliding_window_keeps_what_it_sees():
    window, q, k, v = 4, *tokens(14, 4, 2)
    cache = RaggedKVCache(2, 2, DIM, 4)
    feed(cache, q[:10], k[:10], v[:10], [10], window)
    cache.prune(torch.zeros(2, 2, 10, dtype=torch.bool), [window, None])
    assert cache.lengths.tolist() == [[4, 4], [0, 0]]
    out = feed(cache, q[10:], k[10:], v[10:], [1, 3], window)[0]
    assert (
        out - masked_attention(q[10:], k, v, torch.ones(2, 14, dtype=torch.bool), window)
    ).abs().max() < 1e-5
    cache.prune(torch.zeros(2, 2, 4, dtype=torch.bool), [window, None])
    assert [p.tolist() for p in cache.kept[0]] == [[10, 11, 12, 13]] * 2


def pruned_cache(capacity: int = 12) -> RaggedKVCache:
    q, k, v = tokens(9, 4, 2)
    cache = RaggedKVCache(2, 2, DIM, capacity)
    feed(cache, q, k, v, [9])
    keep = torch.rand(2, 2, 9, generator=torch.Generator().manual_seed(3)) < 0.6
    cache.prune(keep, [None, None], room=2)
    return cache


def contents(cache: RaggedKVCache) -> list[torch.Tensor]:
    return [t.clone() for layer in range(2) for h in range(2) for t in cache.run(layer, h)]


def test_rewinding_leaves_the_context_as_it_was():
    cache, question = pruned_cache(), tokens(7, 4, 2, seed=5)
    before, first = contents(cache), feed(cache, *question, [4, 1, 1, 1])
    cache.rewind(9)
    assert cache.length == 9
    assert all(map(torch.equal, contents(cache), before))
    assert all(map(torch.equal, feed(cache, *question, [4, 1, 1, 1]), first)), "asked again: the same answer"
    with pytest.raises(ValueError, match="the pruned part ends at 9"):
        cache.rewind(8)
    with pytest.raises(ValueError, match="cannot rewind"):
        cache.rewind(17)


def test_forks_go_their_own_way():
    cache, one, other = pruned_cache(), tokens(3, 4, 2, seed=5), tokens(3, 4, 2, seed=6)
    fork = cache.fork(room=1)
    expected = feed(pruned_cache(), *other, [3])
    before = contents(cache)
    feed(cache, *one, [1, 2])
    assert all(map(torch.equal, feed(fork, *other, [3]), expected))
    cache.rewind(9)
    assert all(map(torch.equal, contents(cache), before))
    assert (fork.length, fork.base) == (12, 9)


def test_appending_within_the_slack_moves_nothing():
    cache = pruned_cache()
    places = [t.data_ptr() for t in (*cache.k, *cache.v)]
    feed(cache, *tokens(2, 4, 2), [1, 1])
    assert [t.data_ptr() for t in (*cache.k, *cache.v)] == places
    feed(cache, *tokens(1, 4, 2), [1])
    assert cache.length == 12
    assert [t.data_ptr() for t in (*cache.k, *cache.v)] != places


def test_growing_copies_seldom():
    cache, moves = RaggedKVCache(1, 1, DIM, 0), 0
    for _ in range(600):
        place = cache.k[0].data_ptr(), cache.k[0].shape
        feed(cache, *tokens(1, 1, 1), [1])
        moves += place != (cache.k[0].data_ptr(), cache.k[0].shape)
    assert moves <= 6


def test_slack_of_a_long_question_is_given_back():
    cache = pruned_cache()
    context = [t.clone() for layer in range(2) for h in range(2) for t in cache.run(layer, h)]
    at, small = cache.length, cache.allocated_nbytes
    q, k, v = tokens(200, 4, 2, seed=1)
    feed(cache, q, k, v, [200])
    cache.trim(4)
    assert cache.length == at + 200, "what is held stays"
    cache.rewind(at)
    large = cache.allocated_nbytes
    cache.trim(4)
    assert cache.allocated_nbytes <= small + 2 * 4 * 2 * DIM * 4 * 2 < large
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            context, [t for layer in range(2) for h in range(2) for t in cache.run(layer, h)], strict=True
        )
    )
    before = cache.k[0].data_ptr()
    cache.trim(4)
    assert cache.k[0].data_ptr() == before, "little slack is left alone"
    feed(cache, q[:9], k[:9], v[:9], [9])
    assert cache.length == at + 9


def test_pairs_of_a_beginning_and_of_the_tail():
    q, k, v = tokens(12, 4, 2)
    cache = RaggedKVCache(1, 2, DIM, 12)
    feed(cache, q[:8], k[:8], v[:8], [8])
    assert torch.equal(cache.pairs(0, 2, 5)[0], k[2:5].transpose(0, 1))
    keep = torch.tensor([[[1, 1, 0, 1, 0, 0, 0, 1], [1, 1, 1, 0, 0, 0, 0, 0]]]).bool()
    cache.prune(keep, [None])
    feed(cache, q[8:], k[8:], v[8:], [4])
    assert torch.equal(cache.pairs(0, 0, 2)[1], v[:2].transpose(0, 1))
    assert torch.equal(cache.pairs(0, 9, 12)[0], k[9:12].transpose(0, 1))
    for first, last in ((0, 3), (2, 4), (7, 9)):
        with pytest.raises(ValueError, match="were pruned"):
            cache.pairs(0, first, last)


@pytest.mark.parametrize("keep", [torch.ones(2, 2, 8, dtype=torch.bool), torch.ones(2, 2, 9)])
def test_a_mask_that_does_not_fit(keep):
    q, k, v = tokens(9, 4, 2)
    cache = RaggedKVCache(2, 2, DIM, 9)
    feed(cache, q, k, v, [9])
    with pytest.raises(ValueError, match=r"a mask bool \[2, 2, 9\] is needed"):
        cache.prune(keep, [None, None])
