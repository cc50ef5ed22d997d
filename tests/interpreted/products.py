"""The products' Triton kernels, through the interpreter, against float64.

Not collected by itself: triton must be imported with TRITON_INTERPRET=1, so tests/unit/test_triton_products.py runs
this file in a process of its own.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from cpu_cases import Weights
from operator_checks import Checked
from step_cases import limit, policy_table

from dpllm.kernels.gpu_step import definition as step_reference
from dpllm.kernels.gpu_step import tables
from dpllm.kernels.triton import pack, products
from dpllm.kernels.triton import self_test as trial
from dpllm.kernels.weight import Int8Weight, QuantizedWeight

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {
    HALF: 1e-3,
    BFLOAT: 6e-3,
    FLOAT: 4e-4,
}  # by the output's type; activations are float16 in any case


@cache
def case(n: int, k: int, share: int = 1, lo: int = 2, hi: int = 8) -> tuple[Weights, pack.TritonWeight]:
    weights = Weights(n, k, share, lo, hi)
    return weights, products.prepare(weights.stored, "cpu")


def inputs(rows: int, k: int, dtype: torch.dtype = FLOAT, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def widths_of(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32)


def check(y: torch.Tensor, x: torch.Tensor, w: Weights, bits, bias=0.0):
    """Every row within what float16 activations and the output's type can do, relative to the sum of magnitudes."""
    for row, b in enumerate(bits):
        dense, one = w.dense(b), x[row].double().numpy()
        exact = dense @ one + bias
        room = np.abs(dense) @ np.abs(one) * 4 * TOLERANCE[y.dtype] / np.sqrt(len(one))
        room = room + np.abs(exact) * TOLERANCE[y.dtype] + 1e-7
        assert (np.abs(y[row].double().numpy() - exact) <= room).all(), (row, b)


def test_a_first_product(monkeypatch):
    """What is tried before a device's kernels are chosen, and that a wrong one is noticed."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(trial, "_passed", set())
    assert trial.lacking(cpu) is None
    gemv = products.gemv
    monkeypatch.setattr(products, "gemv", lambda *args: gemv(*args) * 1.1)
    assert trial.lacking(cpu) is None, "asked once"
    trial._passed.clear()
    assert "is wrong (relative error 0.1)" in trial.lacking(cpu)


# -- one row, few rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width(bits):
    w, prepared = case(9, 416)
    x = inputs(1, 416, HALF)
    check(products.gemv(x, prepared, widths_of(bits)), x, w, [bits])


@pytest.mark.parametrize("shape", [(3, 4224, 1), (2, 6144, 1), (1, 1, 1), (7, 33, 1), (17, 128, 17)], ids=str)
def test_shapes(shape):
    """Odd rows; columns around a word, around aligned rows; several steps along a row, whole ones or not."""
    w, prepared = case(*shape)
    x = inputs(2, shape[1])
    check(products.gemv(x, prepared, widths_of(3, 6)), x, w, [3, 6])


def test_widths_within_a_range():
    """A narrower range changes nothing in the numbers; other widths are taken for the nearest."""
    _, prepared = case(7, 70)
    x = inputs(2, 70, HALF)
    some = products.gemv(x, prepared.between(4, 5), widths_of(2, 8))
    assert torch.equal(some, products.gemv(x, prepared, widths_of(4, 5)))
    assert torch.equal(some[1:], products.gemv(x[1:], prepared, widths_of(5))), "as if it were alone"
    with pytest.raises(ValueError, match="not resident"):
        prepared.between(2, 9)


SIGNALS = [
    (1.0, tables.NEVER, 5), (float("inf"), tables.NEVER, 8), (float("nan"), tables.NEVER, 2), (1e9, 700, 5),
]  # fmt: skip


def test_a_width_that_the_product_chooses():
    """As the definition chooses it, and what is computed where it is told; whatever is signalled and may be spent."""
    _, prepared = case(9, 70)
    bias = torch.rand(9)
    for i, (size, left, bits) in enumerate(SIGNALS):
        parts, dtype = ((32, HALF), (64, BFLOAT))[i % 2]
        x = inputs(1, 70, dtype)
        table, other = (policy_table([70] * 3, tables.WEIGHTED, parts) for _ in range(2))
        for t in (table, other):
            limit(t, left)
            t.left[1] = left
            t.signals[1] = torch.linspace(0.1, 1.9, parts) * size * 70 / parts
        if left == tables.NEVER:
            table.unlimited(), other.unlimited()
        found = products.chosen_gemv(x, prepared, bias, 1, table, None)
        step_reference.decide(1, other)
        assert table.bits[1] == other.bits[1] == bits
        assert torch.equal(table.left, other.left)
        assert torch.equal(found, products.gemv(x, prepared, widths_of(bits), bias=bias))
    table.unlimited()
    table.signals[1] = 70.0
    narrow = products.chosen_gemv(x, prepared.between(3, 4), None, 1, table, None)
    assert table.bits[1] > 4, "says what was wanted; reads the nearest there is"
    assert torch.equal(narrow, products.gemv(x, prepared, widths_of(4)))


def test_other_seeds_and_resident_widths():
    for lo, hi in [(3, 6), (4, 4)]:
        w, prepared = case(5, 70, 1, lo, hi)
        x = inputs(2, 70)
        check(products.gemv(x, prepared, widths_of(lo, hi)), x, w, [lo, hi])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_types_bias_and_out(dtype):
    w, prepared = case(6, 100, 3)
    x, bias = inputs(2, 100, dtype), torch.linspace(-3, 3, 6).to(dtype)
    room = torch.full((4, 8), 7.0, dtype=dtype)
    out = room[1:3, 1:7]
    assert products.gemv(x, prepared, widths_of(4, 7), out=out, bias=bias) is out
    check(out, x, w, [4, 7], bias.double().numpy())
    straight = torch.full((1, 6), 7.0, dtype=dtype)
    assert products.gemv(x[:1], prepared, widths_of(4), out=straight, bias=bias) is straight
    assert torch.equal(straight, out[:1])
    out.fill_(7.0)
    assert (room == 7).all(), "nothing outside `out` was written"


def test_x_may_lie_anywhere():
    _, prepared = case(6, 100, 3)
    x, bits = inputs(2, 100, HALF), widths_of(3, 8)
    expected = products.gemv(x, prepared, bits.to(torch.int64))
    unaligned = torch.zeros(201, dtype=HALF)[1:].view(2, 100).copy_(x)
    for placed in (unaligned, x.T.contiguous().T):
        assert torch.equal(products.gemv(placed, prepared, bits), expected)
    assert products.gemv(x[:0], prepared, bits[:0]).shape == (0, 6)


@pytest.mark.parametrize("value", [0.0, -1e30, 1e-30, 1e-40])
def test_extreme_activations(value):
    """Of a type wider than float16."""
    w, prepared = case(6, 100, 3)
    x = inputs(1, 100) * value
    y = products.gemv(x, prepared, widths_of(6))
    assert torch.isfinite(y).all()
    if abs(value) > 1e-35:
        check(y, x, w, [6])
    assert y.abs().max() <= abs(value) * 1e4


def test_large_halves_do_not_overflow_in_the_sum():
    w, prepared = case(7, 416)
    x = torch.full((1, 416), 6e4, dtype=HALF) * (1 - 2 * (torch.arange(416) % 2))
    exact = torch.from_numpy(w.dense(4)) @ x[0].double()
    y = products.gemv(x.clone(), prepared, widths_of(4))[0]
    fits = exact.abs() < 65000
    assert torch.isfinite(y[fits]).all()
    assert torch.isinf(y[exact.abs() > 66000]).all()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(("bits", "dtype"), [((5, 8), HALF), ((3, 6, 6, 3, 3), FLOAT)], ids=str)
def test_no_numbers_stay_in_their_row(bits, dtype, value):
    _, prepared = case(6, 100, 3)
    x = inputs(len(bits), 100, dtype)
    clean = products.gemv(x, prepared, widths_of(*bits))
    x[1, 40] = value
    y = products.gemv(x, prepared, widths_of(*bits))
    assert not torch.isfinite(y[1]).any()
    assert torch.isnan(y[1]).all() or not np.isnan(value)
    others = [i for i in range(len(bits)) if i != 1]
    assert torch.equal(y[others], clean[others])


# -- many rows, the dense matrix ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(37, 200, 1), (6, 100, 3)], ids=str)
def test_many_rows_of_mixed_widths(shape):
    w, prepared = case(*shape)
    bits = [2, 3, 4, 5, 6, 7, 8] if shape[0] == 37 else [3, 6, 6, 3, 3]
    x, bias = inputs(len(bits), shape[1]), torch.linspace(-1, 1, shape[0])
    y = products.gemv(x, prepared, widths_of(*bits), bias=bias)
    check(y, x, w, bits, bias.double().numpy())


@pytest.mark.parametrize("bits", range(2, 9))
def test_dense(bits):
    for shape, dtype in (((9, 416, 1), FLOAT), ((6, 100, 3), HALF)):
        w, prepared = case(*shape)
        exact = torch.from_numpy(w.dense(bits)).float()
        assert torch.equal(products.dequantize(prepared, bits, dtype), exact.to(dtype))
    with pytest.raises(ValueError, match="not resident"):
        products.dequantize(case(5, 70, 1, 3, 6)[1], 7)


@pytest.mark.parametrize(("rows", "dtype"), [(20, HALF), (130, BFLOAT)], ids=str)
def test_prompts(rows, dtype, monkeypatch):
    w, prepared = case(6, 100, 3)
    monkeypatch.setattr(products, "BLOCK_BYTES", 4 * 200)  # four rows at a time
    monkeypatch.setattr(products, "BLOCK_ROWS", 2)
    x = inputs(rows, 100, dtype)
    y = products.matmul(x, prepared)
    assert y.dtype == dtype
    check(y, x, w, [8] * rows)


@pytest.mark.parametrize(("rows", "k"), [(1, 160), (2, 1088), (9, 160), (130, 160), (1, 100)])
def test_int8(rows, k):
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.integers(-128, 128, (11, k)).astype(np.int8))
    w = Int8Weight(values, torch.from_numpy(rng.uniform(0.01, 0.1, 11).astype(np.float16)))
    x = inputs(rows, k) * 100
    y = products.int8_linear(x, w)
    exact = x.double() @ (w.values.double() * w.scale.double()[:, None]).T
    assert (y.double() - exact).abs().max() < 1e-3 * exact.abs().max()


# -- around them --------------------------------------------------------------------------------------------


def test_memory_holds_what_is_resident():
    w, prepared = case(64, 512, 1, 2, 6)
    few = products.prepare(QuantizedWeight(w.stored.planes[:4], w.stored.lut[:, :28], 512, 2), "cpu")
    assert few.resident_bits == 4
    assert few.held_bytes < prepared.held_bytes
    assert prepared.planes.numel() == w.stored.planes.numel()
    assert prepared.nbytes(4) == w.stored.nbytes(4)


def test_packing_in_pieces(monkeypatch):
    w, prepared = case(37, 200)
    monkeypatch.setattr(pack, "CHUNK_WEIGHTS", 1000)
    assert torch.equal(pack.prepare(w.stored, "cpu").planes, prepared.planes)
    monkeypatch.setattr(pack, "MAX_WORDS", 8 * 37 * 8 - 1)
    with pytest.raises(ValueError, match="are not supported by the GPU kernels"):
        pack.prepare(w.stored, "cpu")


def test_gradients():
    w, prepared = case(6, 100, 3)
    x = inputs(3, 100).requires_grad_()
    products.gemv(x, prepared, widths_of(3, 5, 3)).sum().backward()
    for row, b in enumerate([3, 5, 3]):
        np.testing.assert_allclose(x.grad[row].numpy(), w.dense(b).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns", "widths"), [(2, 39, 2), (2, 41, 2), (2, 40, 1), (2, 40, 3)])
def test_shapes_that_do_not_match(rows, columns, widths):
    with pytest.raises(ValueError, match=r"not match"):
        products.gemv(inputs(rows, columns), case(5, 40)[1], widths_of(*[4] * widths))
    with pytest.raises(ValueError, match="is needed"):
        products.gemv(inputs(2, 40).double(), case(5, 40)[1], widths_of(4, 4))


def test_operators_are_what_torch_expects():
    _, prepared = case(6, 100, 3)
    int8 = Int8Weight(torch.ones(8, 32, dtype=torch.int8), torch.ones(8).half())
    with Checked() as checked:
        products.gemv(inputs(1, 100), prepared, widths_of(3))
        products.matmul(inputs(130, 100), prepared)
        products.int8_linear(inputs(1, 32), int8)
    assert checked.seen == {"bitplane_product", "int8_product", "dequantize_rows", "halve"}
