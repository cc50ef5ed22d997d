"""The reference kernels against float64 arithmetic that shares no code with them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpllm.base.errors import InputError
from dpllm.kernels import reference
from dpllm.kernels.backend import choose_backend
from dpllm.kernels.weight import Int8Weight, QuantizedWeight, derived_table, fuse, lut_columns, pack, unpack

WIDTHS = range(2, 9)
# (N, K, rows_per_table): odd rows, columns around the word size, single row, single column
SHAPES = [
    (5, 31, 1),
    (7, 32, 1),
    (3, 33, 1),
    (1, 100, 1),
    (9, 1, 1),
    (1, 1, 1),
    (6, 100, 3),
    (8, 33, 8),
    (64, 96, 4),
]


class Case:
    """A random weight beside what it means: codes, tables (exact in float16) and scales."""

    def __init__(self, n: int, k: int, share: int, lo: int = 2, hi: int = 8, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.n, self.k, self.share, self.lo, self.hi = n, k, share, lo, hi
        self.codes = rng.integers(0, 2**hi, (n, k)).astype(np.uint8)
        # Multiples of 1/16: midpoints and the derived values of 7 and 8 bits are exact in float16 too.
        self.tables = {
            b: np.sort(rng.integers(-32, 33, (n // share, 2**b)) / 16.0, axis=1)
            for b in range(lo, min(hi, 6) + 1)
        }
        self.scale = rng.uniform(0.25, 4, n).astype(np.float16) if share > 1 else None

    def weight(self, resident: int | None = None) -> QuantizedWeight:
        keep = resident or self.hi
        lut = np.concatenate([self.tables[b] for b in range(self.lo, min(keep, 6) + 1)], axis=1)
        return QuantizedWeight(
            planes=pack(self.codes, self.hi)[:keep],
            lut=torch.from_numpy(lut.astype(np.float16)),
            in_features=self.k,
            seed_bits=self.lo,
            scale=None if self.scale is None else torch.from_numpy(self.scale),
        )

    def dense(self, bits: int) -> np.ndarray:
        """[N, K] float64, weight by weight."""
        table = children(self.tables[6], bits) if bits > 6 else self.tables[bits]
        out = np.empty((self.n, self.k))
        for row in range(self.n):
            out[row] = table[row // self.share][self.codes[row] // 2 ** (self.hi - bits)]
        return out if self.scale is None else out * self.scale.astype(np.float64)[:, None]


def children(centres: np.ndarray, bits: int) -> np.ndarray:
    """The derived table, cell by cell: midpoints bound a cell, each half is cut evenly, values lie mid-cut."""
    out = []
    for row in np.asarray(centres, np.float64):
        middles = [(a + b) / 2 for a, b in pairwise(row)]
        lefts = [row[0] - (middles[0] - row[0]), *middles]
        rights = [*middles, row[-1] + (row[-1] - middles[-1])]
        per_half = 2 ** (bits - 6) // 2
        at = [(i + 0.5) / per_half for i in range(per_half)]
        cells = zip(lefts, row, rights, strict=True)
        out.append(
            [v for a, c, b in cells for v in [a + (c - a) * t for t in at] + [c + (b - c) * t for t in at]]
        )
    return np.asarray(out)


def inputs(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32))


def widths_of(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32)


def assert_product(y: torch.Tensor, x: torch.Tensor, dense: np.ndarray, relative: float = 1e-5) -> None:
    """y = x dense^T up to rounding, which is proportional to |x| |dense|^T."""
    exact = x.double().numpy() @ dense.T
    room = relative * (np.abs(x.double().numpy()) @ np.abs(dense).T) + 1e-38
    assert y.shape == exact.shape
    assert (np.abs(y.double().numpy() - exact) <= room).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_and_gemv(shape, bits):
    case = Case(*shape)
    dense = reference.dequantize(case.weight(), bits)
    assert dense.dtype == torch.float32
    assert (dense.double().numpy() == case.dense(bits)).all(), "products of float16 are exact in float32"
    x = inputs(3, case.k)
    assert_product(reference.gemv(x, case.weight(), widths_of(bits, bits, bits)), x, case.dense(bits))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gemv_serves_every_row_at_its_own_width(shape):
    case = Case(*shape, seed=2)
    bits = np.random.default_rng(3).permutation(np.tile(list(WIDTHS), 3))
    x = inputs(len(bits), case.k)
    y = reference.gemv(x, case.weight(), torch.from_numpy(bits.astype(np.int32)))
    for row, width in enumerate(bits):
        assert_product(y[row : row + 1], x[row : row + 1], case.dense(width))


@pytest.mark.parametrize("bits", [(4, 4, 4), (2, 8, 5)], ids=str)
def test_gemv_writes_into_out(bits):
    case = Case(6, 40, 2)
    x, room = inputs(3, 40), torch.full((5, 9), 7.0)
    out = room[1:4, 2:8]
    y = reference.gemv(x, case.weight(), widths_of(*bits), out=out)
    assert y.data_ptr() == out.data_ptr()
    assert y.stride() == out.stride()
    for row, width in enumerate(bits):
        assert_product(out[row : row + 1], x[row : row + 1], case.dense(width))
    out.fill_(7.0)
    assert (room == 7).all(), "nothing outside `out` was written"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gemv_in_half_precision(dtype):
    case = Case(5, 33, 1)
    x = inputs(2, 33).to(dtype)
    y = reference.gemv(x, case.weight(), widths_of(3, 6))
    assert y.dtype == dtype
    for row, width in enumerate((3, 6)):
        assert_product(y[row : row + 1], x[row : row + 1], case.dense(width), relative=2.0**-7)


def test_gemv_of_no_rows():
    assert reference.gemv(inputs(0, 40), Case(6, 40, 2).weight(), widths_of()).shape == (0, 6)


@pytest.mark.parametrize("value", [0.0, 1e30, -1e30, 1e-40, 1e-45])
@pytest.mark.parametrize("bits", [(5, 5, 5), (2, 5, 8)], ids=str)
def test_extreme_activations(value, bits):
    case = Case(7, 70, 1)
    x = inputs(3, 70)
    x[1] = value
    y = reference.gemv(x, case.weight(), widths_of(*bits))
    assert torch.isfinite(y).all()
    for row, width in enumerate(bits):
        assert_product(y[row : row + 1], x[row : row + 1], case.dense(width))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", [(4, 4, 4), (3, 4, 6), (4, 8, 4)], ids=str)
def test_non_finite_activations_stay_in_their_row(value, bits):
    case = Case(7, 70, 1)
    x = inputs(3, 70)
    x[1, 40] = value
    y = reference.gemv(x, case.weight(), widths_of(*bits))
    with np.errstate(invalid="ignore"):
        expected = np.float64(value) * case.dense(bits[1])[:, 40]
    np.testing.assert_array_equal(y[1].double().numpy(), expected)
    for row in (0, 2):
        assert_product(y[row : row + 1], x[row : row + 1], case.dense(bits[row]))


# -- planes and tables -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 9), k=st.integers(1, 100), bits=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_pack_puts_bits_where_the_format_says(n, k, bits, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (n, k)).astype(np.uint8)
    planes = pack(codes, bits)
    assert planes.dtype == torch.int32
    assert planes.shape == (bits, n, -(-k // 32))
    assert (unpack(planes, k).numpy() == codes).all()
    words = planes.numpy().view(np.uint32).astype(np.uint64)
    for column in {0, k // 2, k - 1}:
        word, place = divmod(column, 32)
        stored = (words[:, :, word] >> np.uint64(place)) & np.uint64(1)
        for p in range(bits):
            assert (stored[p] == (codes[:, column] // 2 ** (bits - 1 - p)) % 2).all()
    if k % 32:
        assert not (words[:, :, -1] >> np.uint64(k % 32)).any(), "the rest of the last word is zero"


@pytest.mark.parametrize("bits", range(1, 9))
def test_fewer_planes_are_the_top_of_the_code(bits):
    case = Case(5, 45, 1)
    planes = pack(case.codes, 8)
    assert (unpack(planes[:bits], 45).numpy() == case.codes // 2 ** (8 - bits)).all()


def test_bits_beyond_the_last_column_mean_nothing():
    case = Case(5, 45, 1)
    clean = case.weight()
    dirty = clean.planes.clone()
    dirty[:, :, -1] |= -(1 << 13)
    assert not torch.equal(dirty, clean.planes)
    w = replace(clean, planes=dirty)
    for bits in WIDTHS:
        assert (reference.dequantize(w, bits).double().numpy() == case.dense(bits)).all()


@pytest.mark.parametrize("resident", [2, 3, 5, 6, 7])
def test_truncated_planes(resident):
    """Low widths work from the planes that are resident, higher ones are refused."""
    case = Case(6, 50, 2)
    w = case.weight(resident)
    assert w.resident_bits == resident
    assert (w.out_features, w.rows_per_table) == (6, 2)
    for bits in range(2, resident + 1):
        assert (reference.dequantize(w, bits).double().numpy() == case.dense(bits)).all()
    for bits in (1, resident + 1):
        with pytest.raises(ValueError, match=f"bits={bits} is not resident"):
            w.table(bits)
    with pytest.raises(ValueError, match="not resident"):
        reference.gemv(inputs(2, 50), w, widths_of(2, resident + 1))


@pytest.mark.parametrize(("lo", "hi"), [(2, 2), (3, 6), (4, 4), (6, 8), (5, 7)])
def test_other_bit_ranges(lo, hi):
    case = Case(4, 40, 1, lo, hi)
    w = case.weight()
    for bits in range(lo, hi + 1):
        assert (reference.dequantize(w, bits).double().numpy() == case.dense(bits)).all()
    with pytest.raises(ValueError, match="not resident"):
        reference.dequantize(w, lo - 1)


def test_lut_columns_lie_side_by_side():
    for seed in range(2, 7):
        ends = [lut_columns(seed, b) for b in range(seed, 7)]
        assert ends[0] == (0, 2**seed)
        assert all(a[1] == b[0] for a, b in pairwise(ends))
        assert all(last - first == 2**b for (first, last), b in zip(ends, range(seed, 7), strict=True))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([7, 8]), spread=st.sampled_from([1e-3, 1.0, 100.0])
)
def test_derived_table(seed, bits, spread):
    """It is the even cut of each cell, ascending, and a child stays within its parent's cell."""
    rng = np.random.default_rng(seed)
    centres = np.sort(rng.standard_t(3, (3, 64)) * spread, axis=1).astype(np.float16)
    table = derived_table(torch.from_numpy(centres), bits).numpy()
    assert table.dtype == np.float16
    assert table.shape == (3, 2**bits)
    np.testing.assert_allclose(
        table.astype(np.float64), children(centres, bits), rtol=2.0**-10, atol=2.0**-24
    )
    assert (np.diff(table.astype(np.float64), axis=1) >= 0).all()


@pytest.mark.parametrize("share", [1, 4])
def test_nbytes_counts_what_a_pass_reads(share):
    w = Case(8, 70, share).weight()
    for bits in WIDTHS:
        table = 8 // share * 2 ** min(bits, 6) * 2
        assert w.nbytes(bits) == bits * 8 * 3 * 4 + table + (16 if share > 1 else 0)


@pytest.mark.parametrize(
    "parts",
    [
        [(4, 1), (8, 1), (3, 1)],
        [(8, 4), (4, 4)],
        [(8, 4), (4, 2), (3, 1)],
        [(8, 8), (5, 1), (16, 4)],
        [(6, 2), (9, 3)],
        [(12, 6), (8, 4)],
        [(5, 1)],
    ],
    ids=str,
)
def test_fuse_stacks_rows(parts):
    cases = [Case(n, 45, share, seed=i) for i, (n, share) in enumerate(parts)]
    fused = fuse([c.weight() for c in cases])
    assert fused.out_features == sum(n for n, _ in parts)
    for bits in WIDTHS:
        expected = np.concatenate([c.dense(bits) for c in cases])
        assert (reference.dequantize(fused, bits).double().numpy() == expected).all()


def test_fuse_refuses_what_has_no_common_input():
    first = Case(4, 45, 1)
    for other in (Case(4, 46, 1), Case(4, 45, 1, lo=3), Case(4, 45, 1, hi=6)):
        with pytest.raises(ValueError, match="can be fused"):
            fuse([first.weight(), other.weight()])


def test_prepare_keeps_the_meaning():
    case = Case(6, 45, 2)
    backend = choose_backend("reference")
    prepared = backend.prepare(case.weight(), "cpu")
    assert (backend.dequantize(prepared, 5).double().numpy() == case.dense(5)).all()
    with pytest.raises(InputError, match="unknown kernel backend 'abacus'"):
        choose_backend("abacus")


# -- int8, selection, attention ----------------------------------------------------------------------


def test_int8_linear_and_rows():
    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, (9, 35)).astype(np.int8)
    scale = rng.uniform(0.001, 0.1, 9).astype(np.float16)
    w = Int8Weight(torch.from_numpy(values), torch.from_numpy(scale))
    dense = values.astype(np.float64) * scale.astype(np.float64)[:, None]
    x = inputs(4, 35)
    assert_product(reference.int8_linear(x, w), x, dense)
    x[2, 3] = float("nan")
    y = reference.int8_linear(x, w)
    assert torch.isnan(y[2]).all()
    assert_product(y[[0, 1, 3]], x[[0, 1, 3]], dense)
    rows = w.rows(torch.tensor([8, 0, 0]), torch.float32)
    assert (rows.double().numpy() == dense[[8, 0, 0]]).all()
    assert w.nbytes() == 9 * 35 + 9 * 2


@settings(deadline=None, max_examples=60)
@given(
    signal=st.lists(st.lists(st.integers(-20, 20), min_size=5, max_size=5), min_size=1, max_size=6),
    diagonal=st.lists(st.integers(0, 50), min_size=5, max_size=5),
    thresholds=st.lists(st.integers(-5, 20_000), min_size=0, max_size=6).map(sorted),
    seed_bits=st.integers(2, 6),
)
@example(signal=[[1, -2, 0, 0, 0]], diagonal=[1, 1, 9, 0, 0], thresholds=[4, 5, 6], seed_bits=2)
def test_select_counts_the_thresholds_exceeded(signal, diagonal, thresholds, seed_bits):
    """On integers, which float32 adds exactly: an error equal to a threshold does not exceed it."""
    bits = reference.select(
        torch.tensor(signal, dtype=torch.float32),
        torch.tensor(diagonal, dtype=torch.float16),
        torch.tensor(thresholds, dtype=torch.float32),
        seed_bits,
    )
    errors = [sum(s * s * d for s, d in zip(row, diagonal, strict=True)) for row in signal]
    assert bits.dtype == torch.int32
    assert bits.tolist() == [seed_bits + sum(e > t for t in thresholds) for e in errors]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_select_survives_any_signal(value):
    signal = torch.ones(3, 4)
    signal[1, 2] = value
    bits = reference.select(signal, torch.ones(4), torch.tensor([1.0, 3.0, 5.0]), 3)
    assert bits[[0, 2]].tolist() == [5, 5]
    assert 3 <= bits[1] <= 6
    assert bits[1] == 6 or np.isnan(value)


def attention64(q, k, v, start, length, scale):
    """Softmax attention in float64, one query head at a time."""
    out = np.zeros(q.shape)
    group = len(q) // len(start)
    for head in range(len(q)):
        run = slice(start[head // group], start[head // group] + length[head // group])
        if length[head // group] == 0:
            continue
        scores = k[run] @ q[head] * scale
        weights = np.exp(scores - scores.max())
        out[head] = weights / weights.sum() @ v[run]
    return out


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("sharpness", [1.0, 1e4], ids=["smooth", "sharp"])
def test_decode_attention(group, sharpness):
    """Ragged runs with NaN between them, which nobody may read; one head keeps nothing."""
    rng = np.random.default_rng(group)
    start, length = [3, 0, 20, 30], [5, 1, 0, 17]
    q = (rng.normal(size=(4 * group, 8)) * sharpness).astype(np.float32)
    k, v = np.full((50, 8), np.nan, np.float32), np.full((50, 8), np.nan, np.float32)
    for first, n in zip(start, length, strict=True):
        k[first : first + n] = rng.normal(size=(n, 8))
        v[first : first + n] = rng.normal(size=(n, 8))
    arguments = [torch.from_numpy(a) for a in (q, k, v)]
    runs = [torch.tensor(a, dtype=torch.int32) for a in (start, length)]
    y = reference.decode_attention(*arguments, *runs, 0.35)
    expected = attention64(*(a.astype(np.float64) for a in (q, k, v)), start, length, 0.35)
    assert np.abs(y.double().numpy() - expected).max() < (1e-6 if sharpness == 1 else 1e-2)
    assert (y[2 * group : 3 * group] == 0).all(), "a head that keeps nothing yields zeros"
    out = torch.full((4 * group, 8), 9.0)
    assert reference.decode_attention(*arguments, *runs, 0.35, out=out) is out
    assert torch.equal(out, y)


def test_decode_attention_accumulates_in_float32():
    rng = np.random.default_rng(5)
    q, k, v = (torch.from_numpy(rng.normal(size=s)).half() for s in ((2, 16), (2000, 16), (2000, 16)))
    y = reference.decode_attention(q, k, v, widths_of(0), widths_of(2000), 0.25)
    assert y.dtype == torch.float16
    expected = attention64(*(t.double().numpy() for t in (q, k, v)), [0], [2000], 0.25)
    assert np.abs(y.double().numpy() - expected).max() < 2e-4
