"""KVzip's scores against all keys and the whole softmax in float64, from a pass that knows no cache."""

from __future__ import annotations

import math

import pytest
import torch
from kv_cases import PROMPTS, TinyAttention, held, new_cache, pruned_read, random_ids, read

from dpllm.base.errors import InputError
from dpllm.kvzip_bridge import repetition as repeat_module
from dpllm.kvzip_bridge.interfaces import RepeatPrompts
from dpllm.kvzip_bridge.policies.kvzip import KVzip
from dpllm.kvzip_bridge.policies.kvzip_plus import KVzipPlus
from dpllm.kvzip_bridge.repetition import repetitions

CHUNK = 16
GROUPS = [(2, 2), (4, 2), (4, 1), (8, 1)]  # groups of 1, 2, 4, 8


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """A repetition of a chunk takes several forward passes."""
    monkeypatch.setattr(repeat_module, "PIECE", 7)


def context_of(model, tokens, protected=0, dtype=torch.float32, ragged=False, **kwargs):
    cache = new_cache(model, 4 if ragged else tokens + 40, dtype, ragged)
    return read(model, random_ids(tokens), cache, 0, protected, **kwargs)


def asked(context, start, end) -> torch.Tensor:
    """The ids of a repetition, by the definition."""
    ids = context.ids.tolist()
    request = [1, 2, 3] if start == context.protected else [4, 5, *ids[start - 8 : start]]
    return torch.tensor([*request, 6, *ids[start:end]])


def expected_scores(model, context, chunk, plus=False) -> torch.Tensor:
    """[P, KVH, tokens] float64; only for contexts that were read whole."""
    n, sink, group = len(context.ids), context.protected, model.heads // model.kv_heads
    scores = torch.zeros(len(model.pruned), model.kv_heads, n).double()
    for start in range(sink, n, chunk):
        end = min(start + chunk, n)
        repetition = asked(context, start, end)
        traced = model.trace(torch.cat([context.ids, repetition]), context.cache.k[0].dtype)
        columns = torch.cat(
            [torch.arange(sink), torch.arange(start, end), torch.arange(n, n + len(repetition))]
        )
        queries = torch.arange(n, n + len(repetition))
        for row, layer in enumerate(model.pruned):
            h, q, k, v = traced[layer]
            for head in range(model.heads):
                own = head // group
                logits = q[queries, head] @ k[columns, own].T * model.scale
                logits = logits.masked_fill(columns > queries[:, None], -math.inf)
                attention = logits.softmax(-1)[:, sink : sink + end - start]
                if plus:
                    w = model.weights["o"][layer][:, head * model.dim : (head + 1) * model.dim]
                    attention = (
                        attention * (v[start:end, own] @ w.T).norm(dim=-1) / h[queries].norm(dim=-1)[:, None]
                    )
                scores[row, own, start:end] = torch.maximum(scores[row, own, start:end], attention.amax(0))
    return scores


def check(policy, model, context, tolerance=1e-4):
    before = held(context)
    scores = policy.score(context)
    expected = expected_scores(model, context, policy.chunk, isinstance(policy, KVzipPlus))
    assert scores.dtype == torch.float32 and scores.shape == expected.shape
    assert (scores[..., : context.protected] == math.inf).all()
    found, true = (s[..., context.protected :].double() for s in (scores, expected))
    assert (true > 0).all()
    assert ((found - true).abs() <= tolerance * true + 1e-9).all()
    assert context.cache.length == len(context.ids)
    assert all(torch.equal(a, b) for a, b in zip(before, held(context), strict=True))


@pytest.mark.parametrize("kind", [KVzip, KVzipPlus])
@pytest.mark.parametrize("heads", GROUPS, ids=str)
@pytest.mark.parametrize("protected", [0, 5])
def test_groups(kind, heads, protected):
    model = TinyAttention(*heads)
    check(kind(CHUNK), model, context_of(model, 40, protected))


@pytest.mark.parametrize("kind", [KVzip, KVzipPlus])
@pytest.mark.parametrize("scored", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
@pytest.mark.parametrize("ragged", [False, True])
def test_lengths(kind, scored, ragged):
    model = TinyAttention(seed=scored)
    check(kind(CHUNK), model, context_of(model, 3 + scored, 3, ragged=ragged))


@pytest.mark.parametrize("kind", [KVzip, KVzipPlus])
def test_a_cache_of_bf16(kind):
    model = TinyAttention()
    check(kind(CHUNK), model, context_of(model, 40, 5, torch.bfloat16), tolerance=2e-2)


def test_tokens_without_an_input_have_no_say():
    model = TinyAttention()
    for empty in (4, 5):
        model.weights["embedding"][empty] = 0
    context = context_of(model, 40, 5)
    assert (context.ids == 4).any()
    scores = KVzipPlus(CHUNK).score(context)[..., 5:]
    assert scores.isfinite().all() and scores.max() < 10


def test_pieces_change_nothing(monkeypatch):
    model = TinyAttention()
    context = context_of(model, 40, 5)
    scores = KVzipPlus(CHUNK).score(context)
    for size in (1, 1000):
        monkeypatch.setattr(repeat_module, "PIECE", size)
        assert torch.allclose(KVzipPlus(CHUNK).score(context), scores, rtol=1e-4)


def test_a_context_that_is_all_protected():
    model = TinyAttention()
    assert (KVzip().score(context_of(model, 6, 6)) == math.inf).all()


@pytest.mark.parametrize(("first", "protected"), [(20, 20), (20, 6), (20, 0)])
def test_a_context_whose_beginning_was_pruned(first, protected):
    """The keys are those that are held: the same scores from what the cache is asked for by position."""
    model = TinyAttention()
    context = pruned_read(model, random_ids(50), first, protected)
    before, policy = held(context), KVzip(CHUNK)
    scores = policy.score(context)
    assert all(torch.equal(a, b) for a, b in zip(before, held(context), strict=True))
    assert (
        scores.shape == (2, 2, 30) and scores.isfinite().all() and (scores > 0).all() and (scores <= 1).all()
    )
    parts = repetitions(context, CHUNK)
    assert [(r.start, r.end) for r in parts] == [(20, 36), (36, 50)]
    beginning = [1, 2, 3] if first == protected else [4, 5, *context.ids[12:20].tolist()]
    assert parts[0].ids.tolist() == [*beginning, 6, *context.ids[20:36].tolist()]


def test_the_layers_of_one_kind_alone_are_scored_from_the_kept_keys():
    """Layer 0's queries do not depend on what was pruned, so its scores can be computed from a whole trace."""
    model = TinyAttention(pruned=(0,))
    context = pruned_read(model, random_ids(50), 20, 20)
    expected = expected_scores(model, context, CHUNK)[..., 20:]
    assert torch.allclose(KVzip(CHUNK).score(context).double(), expected, rtol=1e-4)


# -- what is asked ---------------------------------------------------------------------------------------------


def test_requests():
    context = context_of(TinyAttention(), 40, 3)
    parts = repetitions(context, CHUNK)
    assert [(r.start, r.end) for r in parts] == [(3, 19), (19, 35), (35, 40)]
    for r in parts:
        assert torch.equal(r.ids, asked(context, r.start, r.end))
        assert r.ids.dtype == torch.int64


def test_a_cue_is_never_longer_than_the_text():
    context = context_of(TinyAttention(), 10, 0)
    assert repetitions(context, 3)[1].ids.tolist() == [
        4,
        5,
        *context.ids[:3].tolist(),
        6,
        *context.ids[3:6].tolist(),
    ]


def test_prompts_may_be_empty():
    model = TinyAttention()
    context = context_of(model, 20, 3, prompts=RepeatPrompts((), (), ()))
    assert repetitions(context, 64)[0].ids.tolist() == context.ids[3:].tolist()
    assert KVzip(64).score(context).shape == (2, 2, 20)


@pytest.mark.parametrize("positions", [40 + 8 + 2 + 1 + CHUNK, 70])
def test_the_last_position_is_used(positions):
    KVzip(CHUNK).score(context_of(TinyAttention(max_positions=positions), 40, 3))


def test_too_few_positions():
    context = context_of(TinyAttention(max_positions=84), 40, 3)
    with pytest.raises(
        InputError, match=r"40 tokens and 48 tokens to repeat it exceed the 84 positions.*chunk of 33 tok"
    ):
        KVzip(40).score(context)
    assert context.cache.length == 40
    KVzip(33).score(context)  # as the message says


def test_positions_that_no_chunk_fits():
    context = context_of(TinyAttention(max_positions=50), 40, 3)
    with pytest.raises(InputError, match=r"positions of this model by 17\. Shorten the context"):
        KVzip(CHUNK).score(context)


# -- what goes wrong -------------------------------------------------------------------------------------------


class Failing(TinyAttention):
    """Stops in the middle of a forward pass after the context."""

    def forward(self, ids, cache, hidden=None):
        if cache.length == 40 + 7:
            ids, broken = ids[:2], True
        else:
            broken = False
        super().forward(ids, cache, hidden)
        if broken:
            raise LookupError("no more")


@pytest.mark.parametrize("ragged", [False, True])
def test_a_forward_that_raises_leaves_the_cache_as_it_was(ragged):
    context = context_of(Failing(), 40, 3, ragged=ragged)
    before = held(context)
    with pytest.raises(LookupError, match="no more"):
        KVzip(CHUNK).score(context)
    assert context.cache.length == 40
    assert all(torch.equal(a, b) for a, b in zip(before, held(context), strict=True))


def test_prompts_of_the_cases_are_told_apart():
    assert len({PROMPTS.first, PROMPTS.later, PROMPTS.after}) == 3
