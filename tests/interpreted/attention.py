"""The Triton kernels of decode attention, through the interpreter, against float64 and against the torch definitions.

Not collected by itself: tests/unit/test_step_kernels.py runs it together with step_kernels.py.
"""

from __future__ import annotations

import pytest
import torch
from step_cases import HALF, assert_signals, attention_exact, cache_of, fill, policy_table, rng, site_of

from dpllm.kernels import reference
from dpllm.kernels.gpu_step import definition as step_reference
from dpllm.kernels.gpu_step import tables
from dpllm.kernels.gpu_step.tables import Heads
from dpllm.kernels.triton import attention

LENGTHS = [
    ([5, 1, 300, 64, 0, 129], 4), ([700, 33], 7), ([0, 0], 2), ([1], 8), ([64, 64, 64], 1), ([0, 2000, 3, 0], 2),
]  # fmt: skip


@pytest.mark.parametrize(("lengths", "group"), LENGTHS)
def test_ragged_attention(lengths, group):
    q, k, v, start, length = fill(lengths, group, 64, torch.float32)
    found = attention.decode_attention(q, k, v, start, length, 0.125)
    exact = attention_exact(q, k, v, start, length, 0.125)
    assert (found.double() - exact).abs().max() < 1e-5
    for h, n in enumerate(lengths):
        if n == 0:
            assert (found[h * group : (h + 1) * group] == 0).all()


@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_attention_types_and_head_sizes(dim, dtype):
    q, k, v, start, length = fill([70, 0, 131], 2, dim, dtype)
    if dtype == torch.bfloat16:  # the interpreter cannot multiply it; read in float32 it can be
        q = q.float()
    found = attention.decode_attention(q, k, v, start, length, dim**-0.5)
    assert found.dtype == q.dtype
    exact = attention_exact(q, k, v, start, length, dim**-0.5)
    assert (found.double() - exact).abs().max() < 4 * HALF[dtype]


def test_a_cache_narrower_than_the_query():
    q, k, v, start, length = fill([70, 9], 2, 32, torch.float16)
    q = q.float()
    out = torch.empty_like(q)
    found = attention.decode_attention(q, k, v, start, length, 0.2, out)
    assert found is out
    assert (found.double() - attention_exact(q, k, v, start, length, 0.2)).abs().max() < 1e-5


@pytest.mark.parametrize("programs", [1, 3, 9])
def test_any_number_of_programs_shares_the_blocks(programs, monkeypatch):
    monkeypatch.setattr(attention, "program_count", lambda device: programs)
    q, k, v, start, length = fill([150, 0, 64, 65, 1, 330], 3, 16, torch.float32)
    found = attention.decode_attention(q, k, v, start, length, 0.3)
    assert (found.double() - attention_exact(q, k, v, start, length, 0.3)).abs().max() < 1e-5


def test_what_is_no_number_stays_with_its_head():
    q, k, v, start, length = fill([90, 90, 90, 90], 2, 16, torch.float32)
    k[int(start[0]) + 80, 3] = float("nan")
    v[int(start[1]) + 2, 5] = float("inf")
    k[int(start[2]) : int(start[2]) + 64] = 0
    k[int(start[2]) : int(start[2]) + 64, 0] = -3e38  # scores of -inf or inf: whole blocks of them
    q[4:6, 0] = torch.tensor([1e3, 1e3])
    found = attention.decode_attention(q, k, v, start, length, 1.0)
    expected = reference.decode_attention(q, k, v, start, length, 1.0)
    assert found[:2].isnan().all()
    assert found[2:4, 5].isinf().all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_scores_of_minus_infinity_alone_are_no_number():
    q, k, v, start, length = fill([3], 1, 16, torch.float32)
    k[:] = 0
    k[int(start[0]) : int(start[0]) + 3, 0], q[0, 0] = -3e38, 1e3
    assert attention.decode_attention(q, k, v, start, length, 1.0).isnan().all()


@pytest.mark.parametrize(
    ("dim", "norms", "rotates", "dtype", "window", "fed"),
    [
        (16, False, True, torch.float32, 0, 0), (16, False, True, torch.float32, 7, 1),
        (16, False, True, torch.float16, 70, 2), (64, True, True, torch.float16, 0, 1),
        (80, True, True, torch.float32, 0, 2), (80, True, True, torch.float16, 70, 0),
        (32, True, False, torch.float32, 7, 1), (16, False, False, torch.float16, 0, 2),
    ],
)  # fmt: skip
def test_attention_of_a_step(dim, norms, rotates, dtype, window, fed):
    """After pairs appended since the table was written: the new pair, what attention gives, and the signals of the
    groups that look at that."""
    lengths, group, since = [100, 0, 65], 3, 4
    caches = [cache_of(lengths, group, dim, dtype, since)[1] for _ in range(2)]
    qkv = torch.randn(1, (3 * group + 6) * dim, generator=rng(3)).to(dtype)
    weights = tuple(torch.randn(dim, generator=rng(i)).to(dtype) for i in (4, 5)) if norms else None
    angle = torch.rand(dim // 2, generator=rng(6)) * 6
    heads = Heads(dim, 1e-5, weights, (angle.cos(), angle.sin()) if rotates else None, window)
    columns = 3 * group * dim
    site, before = site_of(*(2, 0)[:fed], columns=columns * (fed > 0)), caches[0].k[0].clone()
    results = []
    for ops, cache in zip((attention, step_reference), caches, strict=True):
        table = policy_table([columns] * 3, tables.WEIGHTED)
        results.append((ops.attend(qkv, heads, cache, 0, site, table), table))
    (found, table), (expected, other) = results
    assert found.shape == expected.shape == (1, columns)
    assert (found.double() - expected.double()).abs().max() < 4 * HALF[dtype]
    assert_signals(table, other, site, max(1e-4, 2 * HALF[dtype]))
    slots = caches[0].start[0] + torch.tensor(lengths) + since
    for a, b in ((caches[0].k[0], caches[1].k[0]), (caches[0].v[0], caches[1].v[0])):
        torch.testing.assert_close(a, b, rtol=2 * HALF[dtype], atol=4 * HALF[dtype], equal_nan=True)
    changed = (caches[0].k[0] != before) & ~(caches[0].k[0].isnan() & before.isnan())
    assert changed.any(1).nonzero()[:, 0].tolist() == slots.tolist(), "nothing else was written"


@pytest.mark.parametrize("programs", [1, 2, 7])
def test_whoever_reads_the_last_blocks_appends(programs, monkeypatch):
    """However the blocks are shared out; a cache of another type than what is computed in."""
    monkeypatch.setattr(attention, "program_count", lambda device: programs)
    results = []
    for ops in (attention, step_reference):
        _, cache = cache_of([63, 64, 0, 127, 128], 2, 16, torch.float16, since=0)
        cache.k[0].normal_(generator=rng(1)), cache.v[0].normal_(generator=rng(2))
        qkv = torch.randn(1, 20 * 16, generator=rng(3))
        table = policy_table([160])
        out = ops.attend(qkv, Heads(16, 1e-5), cache, 0, site_of(), table)
        results.append((out, cache.k[0], cache.v[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
