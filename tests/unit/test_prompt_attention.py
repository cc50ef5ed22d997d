"""Attention of many tokens, and the peaks that KVzip scores with: every backend against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_cases import ISAS, kernels_of, widths_of
from hypothesis import given, settings
from hypothesis import strategies as st

from dpllm.kernels import reference
from dpllm.kernels.cpu.library import STORAGE

BACKENDS = ["reference", *ISAS]


def backend(name: str):
    return reference if name == "reference" else kernels_of(name)


class Runs:
    """Runs of a flat cache with NaN between them, and queries whose own pairs are each run's last."""

    def __init__(
        self, before: list[int], tokens: int, group: int, dim: int, dtype=torch.float32, seed: int = 0
    ):
        rng = np.random.default_rng(seed)
        self.tokens, self.group, self.dim = tokens, group, dim
        self.lengths = [n + tokens for n in before]
        self.starts = [int(s) for s in np.cumsum([3, *(n + 2 for n in self.lengths[:-1])])]
        slots = self.starts[-1] + self.lengths[-1] + 1
        self.q = torch.from_numpy(rng.normal(size=(tokens, len(before) * group, dim))).float()
        self.k, self.v = (torch.full((slots, dim), torch.nan, dtype=dtype) for _ in range(2))
        for start, n in zip(self.starts, self.lengths, strict=True):
            for t in (self.k, self.v):
                t[start : start + n] = torch.from_numpy(rng.normal(size=(n, dim))).to(dtype)

    def attend(self, kernels, window: int | None = None) -> torch.Tensor:
        runs = torch.tensor(self.starts), widths_of(*self.lengths)
        return kernels.prompt_attention(self.q, self.k, self.v, *runs, 0.3, window)

    def expected(self, window: int | None = None) -> np.ndarray:
        """Softmax attention in float64, one query at a time."""
        q, k, v = (t.double().numpy() for t in (self.q, self.k, self.v))
        out = np.zeros(q.shape)
        for h in range(q.shape[1]):
            start, n = self.starts[h // self.group], self.lengths[h // self.group]
            for t in range(self.tokens):
                own = n - self.tokens + t + 1
                first = 0 if window is None else max(0, own - window)
                scores = k[start + first : start + own] @ q[t, h] * 0.3
                weights = np.exp(scores - scores.max())
                out[t, h] = weights / weights.sum() @ v[start + first : start + own]
        return out


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.nan_to_num(np.abs(found.double().numpy() - expected), nan=np.inf).max())


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(BACKENDS),
    before=st.lists(st.integers(0, 210), min_size=1, max_size=3),
    tokens=st.integers(1, 70),
    group=st.sampled_from([1, 2, 3, 4, 8]),
    dim=st.sampled_from([2, 6, 16, 20, 64]),
    window=st.sampled_from([None, 1, 7, 64, 100]),
    dtype=st.sampled_from(list(STORAGE)),
)
def test_prompt_attention(name, before, tokens, group, dim, window, dtype):
    runs = Runs(before, tokens, group, dim, dtype)
    assert error(runs.attend(backend(name), window), runs.expected(window)) < 1e-5


@pytest.mark.parametrize("name", BACKENDS)
def test_large_heads_and_sharp_scores(name):
    runs = Runs([1000, 0], 130, 4, 128, torch.float16)
    assert error(runs.attend(backend(name)), runs.expected()) < 1e-5
    runs.q *= 1e3
    assert error(runs.attend(backend(name)), runs.expected()) < 1e-2


@pytest.mark.parametrize("name", ISAS)
def test_threads_change_nothing(name):
    runs = Runs([300, 5, 77], 90, 2, 64, torch.float16)
    one = runs.attend(kernels_of(name))
    assert all(torch.equal(runs.attend(kernels_of(name, "exact", threads)), one) for threads in (2, 3, 8))
    k = torch.randn(3, 400, 64, generator=torch.Generator().manual_seed(0)).half()
    peaks = kernels_of(name).attention_peaks(runs.q, k, slice(4, 300), 0.3)
    assert torch.equal(kernels_of(name, "exact", 3).attention_peaks(runs.q, k, slice(4, 300), 0.3), peaks)


@pytest.mark.parametrize("name", BACKENDS)
def test_nan_stays_with_the_head_that_reads_it(name):
    runs = Runs([100, 20], 9, 2, 16)
    clean = runs.attend(backend(name))
    runs.k[runs.starts[1] + 3, 5] = torch.nan
    found = runs.attend(backend(name))
    assert torch.isnan(found[:, 2:]).all()
    assert torch.equal(found[:, :2], clean[:, :2])


@pytest.mark.parametrize("name", BACKENDS)
def test_any_layout_and_dtype_of_queries(name):
    runs = Runs([40, 3], 5, 2, 16, torch.float16)
    expected = runs.attend(backend(name))
    runs.q = runs.q.transpose(0, 2).contiguous().transpose(0, 2)
    assert error(runs.attend(backend(name)), expected.double().numpy()) < 1e-6
    runs.q = runs.q.half()
    found = runs.attend(backend(name))
    assert found.dtype == torch.float16
    assert error(found, expected.double().numpy()) < 5e-3


# -- peaks ---------------------------------------------------------------------------------------------------


def peaks_expected(q, k, columns: slice, scale: float, cost) -> np.ndarray:
    """[KVH, G, columns], in float64."""
    queries, keys = q.double().numpy(), k.double().numpy()
    tokens, heads, group = len(q), q.shape[1], q.shape[1] // len(k)
    out = np.full((heads, columns.stop - columns.start), -np.inf)
    for h in range(heads):
        for t in range(tokens):
            seen = keys[h // group, : keys.shape[1] - tokens + t + 1] @ queries[t, h] * scale
            less = (
                seen.max() + np.log(np.exp(seen - seen.max()).sum()) + (0 if cost is None else float(cost[t]))
            )
            out[h] = np.maximum(out[h], seen[columns] - less)
    return out.reshape(len(k), group, -1)


@settings(deadline=None, max_examples=100)
@given(
    name=st.sampled_from(BACKENDS),
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 8]), st.sampled_from([2, 20, 64])),
    tokens=st.integers(1, 140),
    before=st.integers(1, 230),
    dtype=st.sampled_from(list(STORAGE)),
    costly=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attention_peaks(name, shape, tokens, before, dtype, costly, seed):
    heads, group, dim = shape
    rng = np.random.default_rng(seed)
    q = torch.from_numpy(rng.normal(size=(tokens, heads * group, dim)) * 3).float()
    k = torch.from_numpy(rng.normal(size=(heads, before + tokens, dim))).to(dtype)
    first = int(rng.integers(before))
    columns = slice(first, int(rng.integers(first, before)) + 1)
    cost = torch.from_numpy(rng.normal(size=tokens)).float() if costly else None
    found = backend(name).attention_peaks(q, k, columns, 0.3, cost)
    assert found.shape == (heads, group, columns.stop - first) and found.dtype == torch.float32
    assert error(found, peaks_expected(q, k, columns, 0.3, cost)) < 1e-4


@pytest.mark.parametrize("name", BACKENDS)
def test_tokens_without_a_say(name):
    rng = torch.Generator().manual_seed(1)
    q, k = torch.randn(70, 2, 8, generator=rng), torch.randn(2, 100, 8, generator=rng)
    q[68] = 5 * k[:, 10]
    found = backend(name).attention_peaks(q, k, slice(3, 30), 1.0, torch.zeros(70))
    cost = torch.zeros(70)
    cost[66:] = torch.inf
    nan = q.clone()
    nan[66:] = torch.nan
    without = backend(name).attention_peaks(q[:66], k[:, :96], slice(3, 30), 1.0)
    for said in (
        backend(name).attention_peaks(q, k, slice(3, 30), 1.0, cost),
        backend(name).attention_peaks(nan, k, slice(3, 30), 1.0),
    ):
        assert error(said, without.double().numpy()) < 1e-5
    assert (found >= without - 1e-5).all() and not torch.equal(found, without)


@pytest.mark.parametrize("name", ISAS)
def test_columns_that_are_the_tokens_own_are_refused(name):
    with pytest.raises(ValueError, match="before the tokens' own"):
        kernels_of(name).attention_peaks(torch.randn(4, 2, 8), torch.randn(2, 10, 8), slice(0, 7), 1.0)
