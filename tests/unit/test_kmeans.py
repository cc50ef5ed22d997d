"""Properties of nested weighted k-means, checked against sums over members and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dpllm.kernels.cpu.quantising import quantiser_kernels
from dpllm.kernels.weight import derived_table
from dpllm.quant import kmeans
from dpllm.quant.kmeans import nested_codes

RANGES = [(2, 6), (3, 6), (2, 8), (4, 4), (6, 8), (2, 2)]
values = st.floats(-1000, 1000, width=32)
fisher = st.one_of(st.floats(0, 10, width=32), st.sampled_from([0.0, 1.0, 2.0**-149, 1e-30, 1e30]))
profile = settings(deadline=None, max_examples=80)


@st.composite
def rows(draw, max_rows=3, max_size=40):
    """(w, f) of small rows: free values, few distinct ones, or one far from the rest."""
    shape = (draw(st.integers(1, max_rows)), draw(st.integers(1, max_size)))
    pool = draw(st.sampled_from([values, st.sampled_from([-1.5, 0.0, 2.25, 700.0]), st.just(0.75)]))
    w = draw(arrays(np.float32, shape, elements=pool))
    f = draw(arrays(np.float32, shape, elements=draw(st.sampled_from([fisher, st.just(0.0), st.just(3.0)]))))
    if draw(st.booleans()):
        w[0, draw(st.integers(0, shape[1] - 1))] = draw(st.sampled_from([-60000.0, 60000.0]))
    return w, f


def usable(f: np.ndarray) -> np.ndarray:
    """The weights that count: relative to the row's mean, with a floor; a row of zeros is uniform."""
    f = f.astype(np.float64)
    out = np.ones_like(f)
    for row, total in enumerate(f.sum(axis=1)):
        if total > 0:
            out[row] = f[row] / (total / f.shape[1])
    return out + 1e-6


def half_ulp(x: np.ndarray) -> np.ndarray:
    """Bound of what rounding x to float16 moves it by."""
    return np.abs(x) * 2.0**-11 + 2.0**-25


def squared_error(w, f, codes, table, shift):
    """Weighted squared error per row of what the top bits of the codes stand for."""
    stands_for = np.take_along_axis(table.astype(np.float64), (codes >> shift).astype(np.int64), 1)
    return (f * (w - stands_for) ** 2).sum(1)


def wsse(v: np.ndarray, f: np.ndarray) -> float:
    return float((f * (v - (f * v).sum() / f.sum()) ** 2).sum()) if len(v) else 0.0


@pytest.mark.parametrize("bits", RANGES, ids=str)
@profile
@given(data=rows())
@example(data=(np.array([[3.0]], np.float32), np.array([[0.0]], np.float32)))
@example(data=(np.full((2, 7), -0.1, np.float32), np.ones((2, 7), np.float32)))
def test_structure(bits, data):
    """Shapes, ascending tables, codes in the order of the values, values = weighted means of members."""
    (w, f), (lo, hi) = data, bits
    codes, tables = nested_codes(w, f, lo, hi)
    assert codes.shape == w.shape
    assert codes.dtype == np.uint8
    assert codes.max() < 2**hi
    assert list(tables) == list(range(lo, min(hi, 6) + 1))
    order = np.argsort(w, axis=1, kind="stable")
    assert (np.diff(np.take_along_axis(codes.astype(int), order, 1), axis=1) >= 0).all()
    weights = usable(f)
    for b, table in tables.items():
        assert table.shape == (len(w), 2**b)
        assert table.dtype == np.float16
        assert np.isfinite(table).all()
        assert (np.diff(table.astype(np.float64), axis=1) >= 0).all(), "tables are ascending"
        for r in range(len(w)):
            v, u, mine = w[r].astype(np.float64), weights[r], codes[r] >> (hi - b)
            for c in np.unique(mine):
                mass = u[mine == c].sum()
                mean = (u * v)[mine == c].sum() / mass
                prefix_sums = 1e-14 * (u * np.abs(v)).sum() / mass
                assert abs(table[r, c] - mean) <= half_ulp(mean) * 1.01 + prefix_sums


@profile
@given(data=rows(), lo=st.integers(2, 5))
def test_error_does_not_rise_with_width(data, lo):
    w, f = data
    weights = usable(f)
    codes, tables = nested_codes(w, f, lo, 6)
    before = None
    for b, table in tables.items():
        error = squared_error(w, weights, codes, table, 6 - b)
        if before is not None:
            stands_for = np.take_along_axis(table.astype(np.float64), (codes >> (6 - b)).astype(int), 1)
            rounding = half_ulp(stands_for)
            room = (weights * (2 * rounding * np.abs(w - stands_for) + 4 * rounding**2)).sum(1)
            assert (error <= before + 2 * room).all()
        before = error


@profile
@given(data=rows(max_rows=2, max_size=9), lo=st.integers(2, 4))
def test_every_split_is_the_best_cut(data, lo):
    """Brute force: no contiguous cut of a cluster leaves less error than the one that was made."""
    w, f = data
    weights = usable(f)
    codes, _ = nested_codes(w, f, lo, 6)
    for r in range(len(w)):
        order = np.argsort(w[r], kind="stable")
        v, u, mine = w[r][order].astype(np.float64), weights[r][order], codes[r][order]
        for b in range(lo, 6):
            for c in np.unique(mine >> (6 - b)):
                members = mine >> (6 - b) == c
                cv, cu, child = v[members], u[members], (mine[members] >> (5 - b)) & 1
                made = wsse(cv[child == 0], cu[child == 0]) + wsse(cv[child == 1], cu[child == 1])
                best = min(wsse(cv[:i], cu[:i]) + wsse(cv[i:], cu[i:]) for i in range(len(cv)))
                assert made <= best + 1e-12 * (u * v * v).sum()


def assert_settled(w: np.ndarray, f: np.ndarray, bits: int) -> None:
    """No value is nearer to another cluster's weighted mean than to its own."""
    codes, _ = nested_codes(w, f, bits, bits)
    weights = usable(f)
    for r in range(len(w)):
        v = w[r].astype(np.float64)
        used = np.unique(codes[r])
        means = np.array([np.average(v[codes[r] == c], weights=weights[r][codes[r] == c]) for c in used])
        own = means[np.searchsorted(used, codes[r])]
        nearest = np.abs(v[:, None] - means).min(axis=1)
        assert (np.abs(v - own) <= nearest + 1e-7 * np.abs(v).max()).all()


@profile
@given(data=rows(), bits=st.integers(2, 6))
def test_seed_clusters_are_settled(data, bits):
    assert_settled(*data, bits)


@pytest.mark.parametrize("bits", [2, 3])
def test_seed_clusters_of_long_rows_are_settled(bits):
    """Rows that take many rounds to converge, and not all the same number."""
    rng = np.random.default_rng(8)
    w = rng.standard_t(4, size=(8, 200)).astype(np.float32)
    assert_settled(w, rng.lognormal(0, 1, w.shape).astype(np.float32), bits)


@profile
@given(data=rows(max_rows=5), bits=st.sampled_from(RANGES), block=st.sampled_from([1, 50, 1 << 16]))
def test_a_row_does_not_depend_on_its_block(data, bits, block):
    w, f = data
    codes, tables = nested_codes(w, f, *bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans, "BLOCK_WEIGHTS", block)
        again, tables_again = nested_codes(w, f, *bits)
    alone = [nested_codes(w[r : r + 1], f[r : r + 1], *bits) for r in range(len(w))]
    assert (again == codes).all()
    assert (np.concatenate([c for c, _ in alone]) == codes).all()
    for b, table in tables.items():
        assert (tables_again[b] == table).all()
        assert (np.concatenate([t[b] for _, t in alone]) == table).all()


@profile
@given(data=rows(), bits=st.sampled_from([(2, 7), (2, 8), (6, 8)]))
def test_derived_widths_pick_the_nearer_child(data, bits):
    w, f = data
    codes, tables = nested_codes(w, f, *bits)
    for b in range(7, bits[1] + 1):
        table = derived_table(torch.from_numpy(tables[6]), b).numpy().astype(np.float64)
        mine = (codes >> (bits[1] - b)).astype(np.int64)
        taken = np.abs(w - np.take_along_axis(table, mine, 1))
        other = np.abs(w - np.take_along_axis(table, mine ^ 1, 1))
        assert (taken <= other * (1 + 1e-12)).all()


@profile
@given(data=rows(), power=st.integers(-20, 20))
def test_only_ratios_of_weights_matter(data, power):
    """A row of zeros counts as uniform; scaling a row's Fisher changes nothing."""
    w, f = data
    f = np.clip(f, 0, 10)
    f[f < 1e-3] = 0
    codes, tables = nested_codes(w, f, 2, 6)
    f2 = f * np.float32(2.0**power)
    f2[f2.sum(axis=1) == 0] = 5.0
    codes2, tables2 = nested_codes(w, f2, 2, 6)
    assert (codes == codes2).all()
    assert all((tables[b] == tables2[b]).all() for b in tables)


@profile
@given(
    row=st.lists(values, min_size=1, max_size=3),
    repeats=st.integers(1, 4),
    bits=st.sampled_from(RANGES[:4]),
)
def test_up_to_three_distinct_values_are_exact(row, repeats, bits):
    """Rows of one to three elements, and the same with duplicates, at every free width."""
    w = np.tile(np.array([row], np.float32), repeats)
    codes, tables = nested_codes(w, np.ones_like(w), *bits)
    for b, table in tables.items():
        stands_for = np.take_along_axis(table.astype(np.float64), (codes >> (bits[1] - b)).astype(int), 1)
        assert (np.abs(stands_for - w) <= half_ulp(w.astype(np.float64)) * 1.01).all()


@pytest.mark.parametrize("constant", [0.0, -0.0, 0.1, -1234.5, 6.0e-8, 65504.0])
def test_constant_rows(constant):
    w = np.full((3, 50), constant, np.float32)
    f = np.random.default_rng(0).uniform(0, 1, w.shape).astype(np.float32)
    _, tables = nested_codes(w, f, 2, 8)
    assert all((t == np.float16(constant)).all() for t in tables.values())


@pytest.mark.parametrize("outlier", [500.0, -500.0, 65504.0, -65504.0])
@pytest.mark.parametrize("importance", [1.0, 1e6])
def test_an_outlier_does_not_spoil_its_row(outlier, importance):
    """It gets a cluster of its own; the rest is as good as it would be without it and one bit less."""
    w = np.random.default_rng(4).normal(size=(1, 1000)).astype(np.float32)
    without, tables_without = nested_codes(w[:, 1:], np.ones((1, 999), np.float32), 2, 6)
    w[0, 0] = outlier
    f = np.ones_like(w)
    f[0, 0] = importance
    codes, tables = nested_codes(w, f, 2, 6)
    for b, table in tables.items():
        assert table[0, codes[0, 0] >> (6 - b)] == outlier
    rest = np.ones((1, 999))
    error = squared_error(w[:, 1:], rest, codes[:, 1:], tables[6], 0)
    assert error < squared_error(w[:, 1:], rest, without, tables_without[5], 1)


def distributions():
    rng = np.random.default_rng(11)
    weights = rng.lognormal(0, 2, (4, 600)).astype(np.float32)
    yield "normal", rng.normal(size=(4, 600)), np.ones((4, 600), np.float32)
    yield "student", rng.standard_t(5, size=(4, 600)), weights
    yield "uniform", rng.uniform(-1, 1, (4, 600)), weights
    yield "skewed", rng.lognormal(0, 1, (4, 600)), weights
    yield "clumps", rng.integers(-3, 4, (4, 600)) + rng.normal(size=(4, 600)) * 0.01, weights


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize(("w", "f"), [pytest.param(w, f, id=name) for name, w, f in distributions()])
def test_seed_beats_a_uniform_grid(w, f, bits):
    """The range of a row cut evenly into 2^b cells, each standing for its middle, fits worse."""
    w, weights = w.astype(np.float32), usable(f)
    codes, tables = nested_codes(w, f, bits, bits)
    error = squared_error(w, weights, codes, tables[bits], 0)
    low, step = w.min(1, keepdims=True), np.ptp(w, axis=1, keepdims=True) / 2**bits
    cells = np.clip((w - low) / step, 0, 2**bits - 1).astype(int)
    grid = (weights * (w - (low + (cells + 0.5) * step)) ** 2).sum(1)
    assert (error <= grid).all()


def test_derived_widths_help_on_smooth_rows():
    w = np.random.default_rng(1).normal(size=(4, 4096)).astype(np.float32)
    ones = np.ones_like(w)
    codes, tables = nested_codes(w, ones, 2, 8)
    errors = [squared_error(w, ones, codes, tables[6], 2)]
    for b in (7, 8):
        table = derived_table(torch.from_numpy(tables[6]), b).numpy()
        errors.append(squared_error(w, ones, codes, table, 8 - b))
    assert (errors[1] < errors[0] / 2).all()
    assert (errors[2] < errors[1] / 2).all()


def test_important_weights_are_kept_closer():
    rng = np.random.default_rng(2)
    w = rng.normal(size=(1, 2000)).astype(np.float32)
    f = np.where(np.arange(2000) % 2, 100.0, 1.0).astype(np.float32)[None]
    codes, tables = nested_codes(w, f, 3, 3)
    gap = (w - np.take_along_axis(tables[3].astype(np.float64), codes.astype(int), 1)) ** 2
    plain_codes, plain = nested_codes(w, np.ones_like(f), 3, 3)
    plain_gap = (w - np.take_along_axis(plain[3].astype(np.float64), plain_codes.astype(int), 1)) ** 2
    assert gap[0, 1::2].sum() < plain_gap[0, 1::2].sum()


@pytest.mark.skipif(quantiser_kernels() is None, reason="the native library is not built")
@pytest.mark.parametrize("bits", RANGES, ids=str)
@profile
@given(data=rows())
def test_native_codes_equal_the_definition(bits, data):
    """Codes may differ where two cuts or two centres are equally good, which rounding decides."""
    (w, f), (lo, hi) = data, bits
    (codes, tables), (native, native_tables) = (
        nested_codes(w, f, lo, hi, kernels) for kernels in (None, quantiser_kernels())
    )
    assert native.dtype == codes.dtype
    weights = usable(f)
    for b, table in tables.items():
        assert native_tables[b].dtype == np.float16
        assert native_tables[b].shape == table.shape
        shift = hi - b
        plain, other = (
            squared_error(w, weights, c, t, shift) for c, t in ((codes, table), (native, native_tables[b]))
        )
        size = (weights * w.astype(np.float64) ** 2).sum(1)
        assert np.allclose(plain, other, rtol=1e-3, atol=1e-5 * size.max() + 1e-12)
