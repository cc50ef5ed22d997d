"""Every policy's scores against its formula, computed plainly in float64 from all keys at once."""

from __future__ import annotations

import math

import pytest
import torch
from kv_cases import TinyAttention, held, new_cache, pruned_read, random_ids, read, turn

from dpllm.base.errors import InputError
from dpllm.kvzip_bridge import budget
from dpllm.kvzip_bridge.policies import KV_POLICIES, common, make_kv_policy
from dpllm.kvzip_bridge.policies.expected_attention import ExpectedAttention, expected_logits
from dpllm.kvzip_bridge.policies.random import Random
from dpllm.kvzip_bridge.policies.snapkv import SnapKV
from dpllm.kvzip_bridge.policies.whole_heads import WholeHeads
from dpllm.kvzip_bridge.query_recording import QueriesWanted

GROUPS = [(1, 1), (4, 2), (4, 1), (8, 1), (6, 6)]  # query heads, KV heads
# tokens, first scored position, protected positions
SHAPES = [(60, 0, 0), (60, 0, 7), (61, 20, 20), (60, 20, 6), (6, 0, 2), (3, 0, 3), (33, 30, 6)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that short contexts have several."""
    monkeypatch.setattr(common, "COLUMNS", 7)


def context_of(wants, heads=(4, 2), shape=(60, 0, 7), dtype=torch.float32):
    """On a dense cache, or, where the scoring starts later, on one whose beginning was pruned unevenly."""
    tokens, first, protected = shape
    model = TinyAttention(*heads, seed=tokens)
    if first:
        return model, pruned_read(model, random_ids(tokens), first, protected, dtype, wants=wants)
    cache = new_cache(model, tokens + 80, dtype)
    return model, read(model, random_ids(tokens), cache, first, protected, wants)


def keys_and_values(context, layer):
    """float64 [KVH, ., D] of the protected prefix and the scored positions, and their positions."""
    before = min(context.first, context.protected)
    parts = [(0, before)] if before else []
    parts.append((context.first, len(context.ids)))
    pairs = [context.cache.pairs(layer, a, b) for a, b in parts]
    position = torch.cat([torch.arange(a, b) for a, b in parts])
    return (
        torch.cat([k for k, _ in pairs], 1).double(),
        torch.cat([v for _, v in pairs], 1).double(),
        position,
    )


def check(context, scores, expected, tolerance=2e-4):
    """expected: [P, KVH, tokens] without protected positions."""
    protected = max(0, context.protected - context.first)
    assert scores.dtype == torch.float32 and scores.shape == expected.shape
    assert (scores[..., :protected] == math.inf).all()
    assert torch.equal(scores[..., protected:].isposinf(), expected[..., protected:].isposinf())
    finite = ~expected.isposinf()
    finite[..., :protected] = False
    found, true = scores[finite].double(), expected[finite].double()
    assert ((found - true).abs() <= tolerance * true.abs() + 1e-7).all()


def snapkv(context, window, pool):
    """[P, KVH, tokens] by definition: one query and one key at a time would be the same."""
    rows, tokens = [], context.tokens
    w = min(window, tokens)
    for layer in context.model.layers:
        k, _, position = keys_and_values(context, layer)
        q = context.queries.latest(layer)[-w:].double()
        at = torch.arange(len(context.ids) - w, len(context.ids))
        group = context.model.heads // context.model.kv_heads
        logits = torch.einsum("whd,hnd->whn", q, k.repeat_interleave(group, 0)) * context.model.scale
        logits = logits.masked_fill((position > at[:, None])[:, None], -math.inf)
        votes = logits.softmax(-1).mean(0).unflatten(0, (-1, group)).mean(1)[:, -tokens:][:, : tokens - w]
        padded = torch.nn.functional.pad(votes, (pool // 2, pool // 2))
        pooled = (
            torch.stack([padded[:, i : i + pool].sum(-1) / pool for i in range(tokens - w)], -1)
            if tokens > w
            else votes
        )
        forced = 2 + torch.arange(w).double()
        rows.append(torch.cat([pooled, forced.expand(len(k), -1)], -1))
    return torch.stack(rows)


@pytest.mark.parametrize("heads", GROUPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_snapkv(shape, heads):
    policy = SnapKV(window=9, pool=5)
    _, context = context_of(policy.wants, heads, shape)
    check(context, policy.score(context), snapkv(context, 9, 5))


@pytest.mark.parametrize("window", [1, 8, 64])
@pytest.mark.parametrize("pool", [1, 3])
def test_snapkv_options_and_bf16(window, pool):
    policy = SnapKV(window, pool)
    _, context = context_of(policy.wants, dtype=torch.bfloat16)
    check(context, policy.score(context), snapkv(context, window, pool))


@pytest.mark.parametrize("name", ["pyramidkv", "adakv"])
def test_the_same_scores_spread_otherwise(name):
    policy = make_kv_policy(name, window=9)
    _, context = context_of(policy.wants)
    scores = policy.score(context)
    check(context, scores, snapkv(context, 9, 5))
    expected = {"pyramidkv": budget.pyramid(scores, 111, 9), "adakv": budget.with_safeguard(scores, 111)}
    assert torch.equal(policy.allocate(scores, 111), expected[name])


def expected_attention(context, model, plain, future, floor):
    """plain: float64 queries before rotation by layer, [n, H, D], of the watched positions."""
    rows, tokens = [], len(context.ids)
    group = context.model.heads // context.model.kv_heads
    for layer, q in zip(context.model.layers, plain, strict=True):
        k, v, position = keys_and_values(context, layer)
        k, v = k[:, position >= 4], v[:, position >= 4]
        q = q[max(0, 4 - context.first) :]
        mean = q.mean(0) if len(q) else torch.zeros(q.shape[1:]).double()
        apart = (q - mean).transpose(0, 1)
        covariance = apart.mT @ apart / max(1, len(q))
        if model.rotates[layer]:
            identity = (
                torch.eye(model.dim).double()[:, None].expand(-1, future, -1)
            )  # basis vectors at all positions
            turned = [turn(e[:, None], model.inv_freq, tokens)[:, 0].mean(0) for e in identity]
            rotation = torch.stack(turned, -1)
            mean, covariance = mean @ rotation.T, rotation @ covariance @ rotation.T
        out = torch.zeros(len(k), context.tokens).double()
        out[:, : max(0, min(context.tokens, 4 - context.first))] = math.inf
        for h in range(len(k)):
            total = 0
            for g in range(h * group, (h + 1) * group):
                logits = k[h] @ mean[g] * model.scale
                logits = logits + torch.einsum("nd,de,ne->n", k[h], covariance[g], k[h]) * model.scale**2 / 2
                total = total + logits.softmax(0) / group
            values = (total + floor) * v[h].norm(dim=-1)
            scored = (position[position >= 4] >= context.first).nonzero()[:, 0]
            if len(scored):
                out[h, -len(scored) :] = values[scored]
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("heads", GROUPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expected_attention(shape, heads):
    policy = ExpectedAttention(future=20, floor=0.05)
    model, context = context_of(QueriesWanted(last=100, statistics=True), heads, shape)
    plain = []
    for layer in context.model.layers:
        q = context.queries.latest(layer).double()  # all of those that were watched
        if model.rotates[layer]:
            a, b = turn(q, -model.inv_freq, context.first).chunk(2, -1)
            q = torch.cat([a, b], -1)
        plain.append(q)
    check(context, policy.score(context), expected_attention(context, model, plain, 20, 0.05))


def test_expected_attention_is_what_normal_queries_pay():
    """The formula's closed form against a sample of queries of that mean and covariance."""
    generator = torch.Generator().manual_seed(0)
    mean, root, k = (torch.randn(*s, generator=generator).double() * 0.3 for s in ((1, 6), (6, 6), (5, 6)))
    q = mean + torch.randn(400_000, 6, generator=generator).double() @ root.T
    paid = (q @ k.T).exp().mean(0).log()
    assert torch.allclose(expected_logits(mean, (root @ root.T)[None] / 2, k)[0], paid, atol=0.03)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_knorm(shape):
    policy = make_kv_policy("knorm")
    _, context = context_of(policy.wants, shape=shape, dtype=torch.bfloat16)
    pairs = [context.cache.pairs(layer, context.first, len(context.ids)) for layer in context.model.layers]
    check(
        context, policy.score(context), torch.stack([-k.double().square().sum(-1).sqrt() for k, _ in pairs])
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_recent(shape):
    policy = make_kv_policy("recent")
    _, context = context_of(policy.wants, shape=shape)
    scores, (tokens, first, protected) = policy.score(context), shape
    count = min(context.tokens, 8)
    kept = policy.allocate(scores, count * scores.shape[0] * scores.shape[1])
    forced = [p for p in range(first, tokens) if p < max(4, protected)][:count]
    others = [p for p in range(first, tokens) if p not in forced]
    expected = sorted(forced + others[len(others) - (count - len(forced)) :])
    for head in kept.flatten(0, 1):
        assert (first + head.nonzero()[:, 0]).tolist() == expected


def test_random_is_the_same_for_any_division_of_the_text():
    policy = Random(seed=5)
    _, whole = context_of(policy.wants, shape=(60, 0, 0))
    _, part = context_of(policy.wants, shape=(60, 20, 0))
    scores = policy.score(whole)
    assert torch.equal(scores[..., 20:], policy.score(part))
    assert not torch.equal(scores, Random(seed=6).score(whole))
    assert scores.min() >= 0 and scores.max() < 1 and len(scores.unique()) > 0.99 * scores.numel()
    assert torch.equal(policy.allocate(scores, 60), budget.per_head(scores, 60))


def test_keep_all():
    policy = make_kv_policy("keep-all")
    _, context = context_of(policy.wants)
    scores = policy.score(context)
    assert policy.allocate(scores, scores.numel()).all()
    with pytest.raises(InputError, match="keeps all 240 pairs"):
        policy.allocate(scores, scores.numel() - 1)


def test_heads():
    profile = torch.tensor([[0.5, 0.1], [0.9, 0.3]])
    policy = make_kv_policy("whole-heads", profile=profile)
    assert isinstance(make_kv_policy("heads", profile=profile), WholeHeads), "an alias"
    _, context = context_of(policy.wants, shape=(60, 0, 7))
    scores = policy.score(context)
    assert (scores[..., :7] == math.inf).all()
    assert torch.equal(scores[..., 7:], profile[..., None].expand(-1, -1, 53))
    kept = policy.allocate(scores, 7 * 4 + 2 * 53)
    assert kept.sum(-1).tolist() == [[60, 7], [60, 7]]


def test_a_profile_of_another_model():
    _, context = context_of(QueriesWanted())
    with pytest.raises(InputError, match=r"\[3, 2\].*\[2, 2\]"):
        WholeHeads(torch.rand(3, 2)).score(context)
    with pytest.raises(InputError, match="needs a profile"):
        make_kv_policy("whole-heads")


@pytest.mark.parametrize("name", sorted(KV_POLICIES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_contract(name, shape):
    """Names, shapes, protected positions, exact counts; the cache is left as it was."""
    options = {"profile": torch.rand(2, 2)} if name == "whole-heads" else {}
    policy = make_kv_policy(name, **options)
    assert policy.name == name and policy.scratch >= 0
    _, context = context_of(policy.wants, shape=shape, dtype=torch.bfloat16)
    before = held(context)
    scores = policy.score(context)
    assert scores.shape == (2, 2, context.tokens) and scores.dtype == torch.float32
    assert context.cache.length == len(context.ids)
    assert all(torch.equal(a, b) for a, b in zip(before, held(context), strict=True))
    protected = max(0, context.protected - context.first)
    for pairs in {4 * protected + 1, scores.numel()} if name != "keep-all" else {scores.numel()}:
        mask = policy.allocate(scores, min(pairs, scores.numel()))
        assert int(mask.sum()) == min(pairs, scores.numel())
        assert mask[..., :protected].all()


def test_a_name_that_does_not_exist():
    with pytest.raises(InputError, match=r"'h2o'\. Choose one of: keep-all, random, .*kvzip\+"):
        make_kv_policy("h2o")
