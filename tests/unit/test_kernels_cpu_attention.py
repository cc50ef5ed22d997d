"""Native selection and decode attention against exact arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_cases import ISAS, each_isa, kernels_of, needs_library, widths_of
from hypothesis import given, settings
from hypothesis import strategies as st

from dpllm.kernels import reference
from dpllm.kernels.cpu.library import STORAGE

pytestmark = needs_library

CACHES = pytest.mark.parametrize("dtype", STORAGE, ids=str)


# -- selection ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=120)
@given(
    isa=st.sampled_from(ISAS or ["none"]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    steps=st.integers(0, 6),
    seed_bits=st.integers(2, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_select_equals_reference(isa, rows, columns, steps, seed_bits, seed):
    """On integers, which float32 adds exactly: an error equal to a threshold does not exceed it."""
    rng = np.random.default_rng(seed)
    signal = torch.from_numpy(rng.integers(-20, 21, (rows, columns))).float()
    diagonal = torch.from_numpy(rng.integers(0, 51, columns)).half()
    errors = (signal.double() ** 2 @ diagonal.double()).numpy()
    drawn = np.concatenate([rng.choice(errors, steps), errors.max() * rng.uniform(-0.1, 1.1, steps).round(2)])
    thresholds = torch.from_numpy(np.sort(rng.permutation(drawn)[:steps]).astype(np.float32))
    bits = kernels_of(isa).select(signal, diagonal, thresholds, seed_bits)
    assert bits.dtype == torch.int32
    assert bits.tolist() == [seed_bits + int((e > thresholds.double().numpy()).sum()) for e in errors]
    assert torch.equal(bits, reference.select(signal, diagonal, thresholds, seed_bits))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@each_isa
def test_select_survives_any_signal(isa, value):
    signal = torch.ones(3, 40)
    signal[1, 2] = value
    bits = kernels_of(isa).select(signal, torch.ones(40), torch.tensor([1.0, 39.0, 41.0]), 3)
    assert bits[[0, 2]].tolist() == [5, 5]
    assert 3 <= bits[1] <= 6
    assert bits[1] == 6 or np.isnan(value)


def test_select_of_other_inputs():
    signal, diagonal = torch.arange(120.0).view(3, 40), torch.ones(40)
    thresholds = torch.tensor([5e4, 2e5, 3e5])
    expected = reference.select(signal, diagonal, thresholds, 2)
    assert len(expected.unique()) > 1
    for other in (signal.double(), signal.half(), signal.T.contiguous().T):
        assert torch.equal(kernels_of().select(other, diagonal, thresholds, 2), expected)
    with pytest.raises(ValueError, match="not match"):
        kernels_of().select(signal, torch.ones(41), thresholds, 2)


# -- decode attention ---------------------------------------------------------------------------------------


class Cache:
    """Ragged runs with NaN between them, which nobody may read."""

    def __init__(self, starts, lengths, dim: int, dtype: torch.dtype, group: int, sharpness: float = 1.0):
        rng = np.random.default_rng(dim + group)
        self.starts, self.lengths = starts, lengths
        slots = max(s + n for s, n in zip(starts, lengths, strict=True)) + 3
        self.q = torch.from_numpy(rng.normal(size=(len(starts) * group, dim)) * sharpness).float()
        self.k, self.v = (torch.full((slots, dim), torch.nan, dtype=dtype) for _ in range(2))
        for start, n in zip(starts, lengths, strict=True):
            for t in (self.k, self.v):
                t[start : start + n] = torch.from_numpy(rng.normal(size=(n, dim))).to(dtype)

    def attend(self, kernels, **options) -> torch.Tensor:
        runs = torch.tensor(self.starts), widths_of(*self.lengths)
        return kernels.decode_attention(self.q, self.k, self.v, *runs, 0.3, **options)

    def expected(self) -> np.ndarray:
        """Softmax attention in float64, one query head at a time."""
        q, k, v = (t.double().numpy() for t in (self.q, self.k, self.v))
        out, group = np.zeros(q.shape), len(q) // len(self.starts)
        for head in range(len(q)):
            start, n = self.starts[head // group], self.lengths[head // group]
            if n:
                scores = k[start : start + n] @ q[head] * 0.3
                weights = np.exp(scores - scores.max())
                out[head] = weights / weights.sum() @ v[start : start + n]
        return out


RAGGED = ([3, 0, 20, 40], [5, 1, 0, 17])
LONG = ([700, 2, 0, 300], [513, 256, 1, 390])  # several stretches of 256 positions, and just one


@pytest.mark.parametrize("runs", [RAGGED, LONG], ids=["ragged", "long"])
@pytest.mark.parametrize("dim", [8, 20, 64, 128])
@pytest.mark.parametrize("group", [1, 3, 4])
@CACHES
@each_isa
def test_decode_attention(isa, dtype, group, dim, runs):
    cache = Cache(*runs, dim, dtype, group)
    y = cache.attend(kernels_of(isa))
    assert np.abs(y.double().numpy() - cache.expected()).max() < 1e-5
    for head, n in enumerate(cache.lengths):
        assert n or (y[head * group : (head + 1) * group] == 0).all(), (
            "a head that keeps nothing yields zeros"
        )


@pytest.mark.parametrize("runs", [RAGGED, LONG], ids=["ragged", "long"])
@CACHES
@each_isa
def test_sharp_attention_does_not_overflow(isa, dtype, runs):
    cache = Cache(*runs, 64, dtype, 2, sharpness=1e4)
    assert np.abs(cache.attend(kernels_of(isa)).double().numpy() - cache.expected()).max() < 1e-2


@pytest.mark.parametrize("threads", [2, 3, 8])
@CACHES
def test_attention_on_several_threads(dtype, threads):
    cache = Cache(*LONG, 64, dtype, 4)
    one = cache.attend(kernels_of())
    for _ in range(5):
        assert torch.equal(cache.attend(kernels_of(None, "exact", threads)), one)


@CACHES
@each_isa
def test_nan_reaches_the_heads_that_read_it(isa, dtype):
    cache = Cache(*LONG, 20, dtype, 2)
    clean = cache.attend(kernels_of(isa))
    cache.k[cache.starts[3] + 300, 7] = torch.nan
    y = cache.attend(kernels_of(isa))
    assert torch.isnan(y[6:]).all()
    assert torch.equal(y[:6], clean[:6])


def test_attention_writes_into_out_and_reads_any_layout():
    cache = Cache(*RAGGED, 20, torch.float32, 2)
    y = cache.attend(kernels_of())
    room = torch.full((10, 24), 9.0)
    out = room[1:9, 2:22]
    assert cache.attend(kernels_of(), out=out) is out
    assert torch.equal(out, y)
    out.fill_(9.0)
    assert (room == 9).all(), "nothing outside `out` was written"
    cache.k, cache.v = (torch.cat([t, t], dim=1)[:, :20] for t in (cache.k, cache.v))
    cache.q = cache.q.T.contiguous().T
    assert torch.equal(cache.attend(kernels_of()), y)


def test_queries_of_another_dtype_and_caches_that_are_not_read():
    cache = Cache(*RAGGED, 20, torch.float16, 2)
    cache.q = cache.q.half()
    y = cache.attend(kernels_of())
    assert y.dtype == torch.float16
    assert np.abs(y.double().numpy() - cache.expected()).max() < 2e-3
    cache.v = cache.v.double()
    with pytest.raises(ValueError, match="the cache holds"):
        cache.attend(kernels_of())
    cache.k = cache.k.double()
    with pytest.raises(ValueError, match=r"the cache holds torch\.float64"):
        cache.attend(kernels_of())
