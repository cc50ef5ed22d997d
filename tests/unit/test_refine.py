"""Properties of the refinement: the error it minimises never rises, codes stay nested, odd rows survive."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpllm.base.errors import InputError
from dpllm.kernels.cpu.quantising import quantiser_kernels
from dpllm.kernels.weight import derived_table
from dpllm.quant import refine as module
from dpllm.quant.descent import TorchSteps
from dpllm.quant.kmeans import nested_codes
from dpllm.quant.refine import NestedMatrix, RefineOptions, output_error, refine

TABLES, FULL = RefineOptions(codes=False), RefineOptions()
profile = settings(deadline=None, max_examples=25)


def matrix(n=16, k=40, share=4, bits=(2, 6), seed=0, kind="normal") -> NestedMatrix:
    """A matrix as k-means leaves it."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=rng)
    if kind == "zero rows":
        w[: n // 2] = 0
    elif kind == "constant":
        w[:] = 0.75
    elif kind == "outlier":
        w[0, 0] = 500.0
    scale = torch.ones(n)
    if share > 1:
        scale = w.square().mean(1).sqrt().half().float()
        w = torch.where(scale[:, None] > 0, w / scale.clamp(min=1e-6)[:, None], 0)
    flat = w.reshape(n // share, -1).numpy()
    codes, tables = nested_codes(flat, np.ones_like(flat), *bits)
    tables = {b: torch.from_numpy(t) for b, t in tables.items()}
    return NestedMatrix(w, scale, torch.from_numpy(codes).reshape(n, k), tables, bits[1])


def hessian(k=40, rank=60, seed=1) -> torch.Tensor:
    """Of correlated inputs with unequal sizes."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rank, k, generator=rng) @ (torch.eye(k) + 0.3 * torch.randn(k, k, generator=rng))
    x *= torch.exp(torch.randn(k, generator=rng))
    return x.T @ x


def claimed(h: torch.Tensor) -> torch.Tensor:
    """What `refine` works with: of mean diagonal 1, damped."""
    return module._usable(h, len(h)).double()


def errors(m: NestedMatrix, h: torch.Tensor) -> dict[int, torch.Tensor]:
    """Per table and width, in float64."""
    out = {}
    for b in m.tables:
        e = (m.error(b) * m.scale[:, None]).double()
        out[b] = (e * (e @ claimed(h))).sum(1).view(-1, m.share).sum(1)
    return out


KINDS = ["normal", "zero rows", "constant", "outlier"]
cases = {
    "kind": st.sampled_from(KINDS), "share": st.sampled_from([1, 2, 4]), "seed": st.integers(0, 9),
    "rank": st.sampled_from([0, 1, 8, 60]), "bits": st.sampled_from([(2, 6), (3, 5), (4, 4), (2, 2)]),
}  # fmt: skip


@profile
@given(**cases)
def test_tables_alone_never_raise_any_width(kind, share, seed, rank, bits):
    m, h = matrix(share=share, bits=bits, seed=seed, kind=kind), hessian(rank=rank, seed=seed)
    found = refine(m, h, TABLES)
    assert torch.equal(found.codes, m.codes)
    before, after = errors(m, h), errors(found, h)
    for b in before:
        assert (after[b] <= before[b] * (1 + 1e-4) + 1e-9).all()


@profile
@given(**cases, balance=st.sampled_from([0.5, 1.0, 4.0]))
def test_the_balanced_error_of_every_table_never_rises(kind, share, seed, rank, bits, balance):
    m, h = matrix(share=share, bits=bits, seed=seed, kind=kind), hessian(rank=rank, seed=seed)
    found = refine(m, h, replace(FULL, balance=balance))
    total = lambda e: sum(balance ** (b - bits[0]) * v for b, v in e.items())  # noqa: E731
    before, after = total(errors(m, h)), total(errors(found, h))
    assert (after <= before * (1 + 1e-4) + 1e-9).all()
    assert found.codes.dtype == torch.uint8
    assert found.codes.max() < 2 ** bits[1]
    assert all(torch.isfinite(t).all() and t.dtype == torch.float16 for t in found.tables.values())


def test_tables_reach_the_least_squares_optimum():
    """Every step allowed, the table equals the solution of its normal equations."""
    m, h = matrix(n=4, k=40, share=4, bits=(2, 3)), hessian()
    found = refine(m, h, replace(TABLES, table_steps=60))
    hd = claimed(h)
    for b, table in found.tables.items():
        onehot = torch.nn.functional.one_hot((m.codes >> (3 - b)).long(), 2**b).double()
        p = onehot * m.scale[:, None, None]
        a = torch.einsum("nkc,kl,nld->cd", p, hd, p)
        rhs = torch.einsum("nkc,kl,nl->c", p, hd, (m.weight * m.scale[:, None]).double())
        assert torch.allclose(table[0].double(), torch.linalg.solve(a, rhs), rtol=2e-3, atol=2e-3)


NATIVE = [None] if quantiser_kernels() is None else [quantiser_kernels()]
STEPS = pytest.mark.parametrize("steps", [TorchSteps(), *NATIVE], ids=lambda s: type(s).__name__)


def state_of(m: NestedMatrix, h: torch.Tensor, steps) -> module._State:
    return module._State(m, module._Products(h, None), steps)


@STEPS
@pytest.mark.parametrize("bits", [(2, 4), (2, 6), (3, 3), (5, 6), (2, 2)])
def test_one_sweep_equals_a_plain_coordinate_descent(steps, bits):
    """Blocks of columns and running products against full gradients, one weight at a time."""
    lo, hi = bits
    m, usable = matrix(n=6, k=133, share=2, bits=bits), module._usable(hessian(133), 133)
    state = state_of(m, usable, steps)
    widths = range(lo, hi + 1)
    state.sweep(torch.tensor([3.0 ** ((b - lo) / 2) for b in widths]))
    codes = m.codes.clone()
    for n in range(6):
        for j in range(133):
            cost = torch.zeros(2**hi, dtype=torch.float64)
            for b in widths:
                table = m.tables[b][n // 2].double()
                e = table[(codes[n] >> (hi - b)).long()] - m.weight[n]
                optimum = m.weight[n, j] + e[j] - (usable[j].double() @ e) / usable[j, j]
                cost += 3.0 ** (b - lo) * (table[torch.arange(2**hi) >> (hi - b)] - optimum) ** 2
            codes[n, j] = cost.argmin()
    assert (state.codes != codes).float().mean() < 0.02, "ties and rounding aside"
    expected = torch.stack([replace(m, codes=state.codes).error(b) for b in widths], 1)
    assert torch.allclose(state.error, expected, atol=1e-6), "errors follow the codes"
    assert torch.allclose(state.pull, expected @ usable, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(NATIVE == [None], reason="the native library is not built")
@profile
@given(**cases)
def test_native_steps_equal_their_definition(kind, share, seed, rank, bits):
    m, h = matrix(k=70, share=share, bits=bits, seed=seed, kind=kind), hessian(70, rank=rank, seed=seed)
    usable = module._usable(h, 70)
    native, plain = (state_of(m, usable, s) for s in (NATIVE[0], TorchSteps()))
    for state in (native, plain):
        values = torch.randn(state.error.shape, generator=torch.Generator().manual_seed(seed))
        state.sums = state.steps.sums(state.codes, values, state.squares, state.tables.shape)
        state.sweep(torch.linspace(1, 3, len(m.tables)))
    assert torch.allclose(native.sums, plain.sums, rtol=1e-5, atol=1e-4)
    same = native.codes == plain.codes
    assert same.float().mean() > 0.97, "ties and rounding aside"
    rows = same.all(1)
    assert torch.allclose(native.error[rows], plain.error[rows])
    assert torch.allclose(
        native.steps.values(plain.codes, plain.tables), plain.steps.values(plain.codes, plain.tables)
    )


def test_output_error_falls_a_lot_at_every_width():
    m, h = matrix(n=64, k=128, share=1), hessian(128, rank=100)
    tables, full = refine(m, h, TABLES), refine(m, h, FULL)
    for b in m.tables:
        before, after, both = (output_error(x, h, b).sum() for x in (m, tables, full))
        assert after < 0.95 * before
        assert both < 0.9 * (after if b < 5 else before)


def test_deterministic_and_blind_to_blocks(monkeypatch):
    m, h = matrix(n=24), hessian()
    once, again = refine(m, h), refine(m, h)
    monkeypatch.setitem(module.BLOCK_WEIGHTS, "cpu", 8 * 40)
    blocks = refine(m, h)
    for other in (again, blocks):
        assert torch.equal(once.codes, other.codes)
        assert all(torch.equal(t, other.tables[b]) for b, t in once.tables.items())


@pytest.mark.parametrize("bits", [(2, 7), (2, 8), (6, 8)])
def test_derived_widths_still_narrow_the_error(bits):
    m, h = matrix(n=8, k=512, share=1, bits=bits), hessian(512, 700)
    found = refine(m, h)
    assert (found.tables[6].diff(dim=1) >= 0).all(), "derived tables want ascending centres"
    previous = found.error(6).square().mean()
    for b in range(7, bits[1] + 1):
        table = derived_table(found.tables[6], b).float()
        codes = (found.codes >> (bits[1] - b)).long()
        error = (table.gather(1, codes) - m.weight).square().mean()
        assert error < previous
        previous = error


def test_zero_rows_and_dead_inputs_stay_near_their_values():
    m = matrix(kind="zero rows")
    h = hessian()
    h[:, 5] = h[5] = 0
    found = refine(m, h)
    for b in m.tables:
        dead = (found.error(b) * found.scale[:, None])[:, 5]
        assert dead.abs().max() < 1.5
        assert torch.isfinite(found.error(b)).all()
    nothing = refine(m, torch.zeros(40, 40))
    total = lambda x: sum(  # noqa: E731
        FULL.balance**b * (x.error(b) * x.scale[:, None]).square().sum() for b in x.tables
    )
    assert total(nothing) <= total(m), "without any gradient the plain squared error counts"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(value):
    h = hessian()
    h[3, 4] = value
    with pytest.raises(InputError, match="NaN or infinite"):
        refine(matrix(), h)


def test_a_hessian_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="does not fit 40 columns"):
        refine(matrix(), hessian(39))
    with pytest.raises(InputError, match="negative diagonal"):
        refine(matrix(), -hessian())
