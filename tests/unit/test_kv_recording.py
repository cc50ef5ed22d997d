"""What is recorded of the queries does not depend on how the text came in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cases import turn

from dpllm.kernels import reference
from dpllm.kvzip_bridge.cache import DenseKVCache
from dpllm.kvzip_bridge.query_recording import Queries, QueriesWanted, WatchedCache

HEADS, DIM = 3, 8
INV_FREQ = 1 / 100 ** (torch.arange(0, DIM, 2) / DIM)
MODEL = SimpleNamespace(layers=(0, 2), inv_freq=INV_FREQ, rotates=(True, True, False))


def plain_queries(tokens: int, seed: int = 0) -> torch.Tensor:
    """Before rotation, float64; with a mean and directions that belong together."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HEADS, DIM, generator=generator, dtype=torch.float64)
    x[..., 1] += 0.8 * x[..., 0]
    return x + torch.randn(HEADS, DIM, generator=generator, dtype=torch.float64)


def record(wanted, plain, sizes, start=0) -> Queries:
    queries, position = Queries(wanted, MODEL), start
    for piece in plain.split(sizes):
        for layer in range(3):
            q = turn(piece, INV_FREQ, position) if MODEL.rotates[layer] else piece
            queries.watch(layer, q.float(), position)
        position += len(piece)
    return queries


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 12), st.sampled_from([0, 2, 4, 300])
)
def test_any_chunking(sizes, last, start):
    plain = plain_queries(sum(sizes))
    queries = record(QueriesWanted(last, statistics=True), plain, sizes, start)
    for layer, shown in ((0, turn(plain, INV_FREQ, start)), (2, plain)):
        latest = queries.latest(layer)
        assert latest.dtype == torch.float32
        assert torch.equal(latest, shown[-last:].float())
        counted = plain[max(0, 4 - start) :]
        assert queries.count(layer) == len(counted)
        if len(counted):
            assert torch.allclose(queries.mean(layer).double(), counted.mean(0), atol=1e-4)
            apart = (counted - counted.mean(0)).transpose(0, 1)
            assert torch.allclose(
                queries.covariance(layer).double(), apart.mT @ apart / len(counted), atol=2e-4
            )


def test_a_text_of_sinks_alone():
    queries = record(QueriesWanted(statistics=True), plain_queries(3), [2, 1])
    assert queries.count(0) == 0
    assert not queries.mean(0).any() and not queries.covariance(0).any()
    assert queries.mean(0).shape == (HEADS, DIM) and queries.covariance(0).shape == (HEADS, DIM, DIM)


def test_a_mean_far_from_zero():
    """Sums of squares in float32 would lose the covariance altogether."""
    plain = plain_queries(3000) + 3000
    covariance = record(QueriesWanted(statistics=True), plain, 100).covariance(2).double()
    apart = (plain[4:] - plain[4:].mean(0)).transpose(0, 1)
    assert torch.allclose(covariance, apart.mT @ apart / 2996, rtol=1e-2, atol=1e-3)


def test_nothing_wanted_looks_at_nothing():
    queries = Queries(QueriesWanted(), MODEL)
    queries.watch(0, None, 0)
    for seen in (queries.latest, queries.mean, queries.covariance):
        with pytest.raises(KeyError):
            seen(0)


def test_layers_that_are_not_pruned_are_not_recorded():
    queries = record(QueriesWanted(5, statistics=True), plain_queries(9), 9)
    with pytest.raises(KeyError):
        queries.latest(1)
    with pytest.raises(KeyError):
        queries.mean(1)


def test_only_what_is_wanted_is_recorded():
    with pytest.raises(KeyError):
        record(QueriesWanted(last=3), plain_queries(9), 9).mean(0)
    with pytest.raises(KeyError):
        record(QueriesWanted(statistics=True), plain_queries(9), 9).latest(0)


def test_what_is_kept_is_no_view():
    q = plain_queries(6).float()
    queries = Queries(QueriesWanted(last=4), MODEL)
    queries.watch(2, q, 0)
    expected = q[-4:].clone()
    q.zero_()
    assert torch.equal(queries.latest(2), expected)


def test_a_watched_cache_shows_queries_and_passes_the_rest_on():
    cache, seen = DenseKVCache(1, HEADS, DIM, 10), []
    watched = WatchedCache(cache, lambda layer, q, position: seen.append((layer, q, position)))
    for piece in plain_queries(7).float().split([4, 3]):
        watched.write(0, piece, piece)
        out = watched.attend(0, piece, 1.0, None, reference)
        assert torch.equal(out, cache.attend(0, piece, 1.0, None, reference))
        watched.advance(len(piece))
    assert watched.length == cache.length == 7
    assert [(layer, len(q), position) for layer, q, position in seen] == [(0, 4, 0), (0, 3, 4)]
    watched.rewind(2)
    assert cache.length == 2
