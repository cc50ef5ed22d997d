"""Native dequantisation, products of many rows, the int8 head, gradients, and tables as pairs of digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_cases import (
    TOLERANCE,
    WIDTHS,
    Weights,
    each_accuracy,
    each_isa,
    inputs,
    int8_of,
    kernels_of,
    needs_library,
    relative_error,
    weights_of,
    widths_of,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from dpllm.kernels.cpu import kernels as functions
from dpllm.kernels.cpu.kernels import digits_of, prepare

pytestmark = needs_library

SHAPES = [(9, 31, 1), (7, 256, 1), (15, 256, 5), (67, 160, 1), (5, 1100, 5), (3, 512, 1), (33, 515, 3)]


# -- dequantisation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_isa
def test_dequantize(isa, shape):
    w, kernels = weights_of(*shape), kernels_of(isa)
    for bits in WIDTHS:
        dense, largest = w.dense(bits), np.abs(w.table(bits)).max(1, keepdims=True)
        wide = kernels.dequantize(w.prepared, bits)
        assert wide.dtype == torch.float32
        assert (np.abs(wide.double().numpy() - dense) <= 1e-4 * largest).all()
        assert torch.equal(kernels.dequantize(w.prepared, bits, torch.bfloat16), wide.bfloat16())
        assert torch.equal(kernels.dequantize(w.prepared, bits, torch.float64), wide.double())


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_dequantize_on_several_threads(threads):
    w = weights_of(301, 1100)
    for dtype in (torch.float32, torch.bfloat16):
        one, many = (kernels_of(None, "exact", n).dequantize(w.prepared, 5, dtype) for n in (1, threads))
        assert torch.equal(one, many)


@settings(deadline=None, max_examples=100)
@given(
    width=st.integers(2, 8),
    rows=st.integers(1, 4),
    largest=st.floats(-24, 15).map(lambda e: 2.0**e),
    kind=st.sampled_from(["normal", "uniform", "zero", "single"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_digits_of_a_table(width, rows, largest, kind, seed):
    """Entries come back within half a step of their table's largest / 32512, whatever its size."""
    rng = np.random.default_rng(seed)
    entries = {
        "normal": rng.normal(size=(rows, 2**width)).clip(-4, 4) / 4,
        "uniform": rng.uniform(-1, 1, (rows, 2**width)),
        "zero": np.zeros((rows, 2**width)),
        "single": np.full((rows, 2**width), rng.choice([-1.0, 1.0])),
    }[kind]
    table = torch.from_numpy(entries * largest).half()
    digits, scale = digits_of(table)
    assert digits.dtype == torch.int8
    assert digits.shape == (rows, 2, 2**width)
    assert digits.min() >= -127, "what the kernels may multiply without overflow"
    values = scale.double()[:, None] * (255 * digits[:, 0].double() + digits[:, 1].double())
    assert ((values - table.double()).abs() <= table.double().abs().amax(1, keepdim=True) / 64000).all()


@pytest.mark.parametrize("accuracy", ["exact", "fast"])
@each_isa
def test_tables_of_zeros_and_of_one_value(isa, accuracy):
    w = Weights(6, 100)
    w.stored.lut[:2] = 0
    w.stored.lut[2:4] = -0.75
    prepared, kernels = prepare(w.stored), kernels_of(isa, accuracy)
    x = inputs(2, 100)
    for bits in range(2, 7):
        y = kernels.gemv(x, prepared, widths_of(bits, bits))
        assert (y[:, :2] == 0).all()
        expected = -0.75 * x.double().sum(1, keepdim=True)
        room = (1e-4 if accuracy == "exact" else 1e-2) * x.double().abs().sum(1, keepdim=True)
        assert ((y[:, 2:4].double() - expected).abs() < room).all()


# -- products of many rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_accuracy
@each_isa
def test_matmul_reads_every_resident_plane(isa, accuracy, shape):
    w, kernels = weights_of(*shape), kernels_of(isa, accuracy)
    for rows in (1, 7, 24, 25, 64, 133):
        x = inputs(rows, w.k)
        y = kernels.matmul(x, w.prepared)
        assert y.dtype == torch.float32
        assert relative_error(y, x, w.dense(8)) < TOLERANCE[accuracy]
    if accuracy == "exact":
        product = x @ kernels.dequantize(w.prepared, 8).T
        assert (y - product).abs().max() < 1e-4 * product.abs().max()


@pytest.mark.parametrize("shape", [(67, 515), (5, 12000)], ids=str)
@each_isa
@each_accuracy
def test_matmul_of_a_token_is_its_own(monkeypatch, isa, accuracy, shape):
    """What else there is of the prompt does not change a bit of it, as long as it has more than a few tokens; nor does
    how many of them are looked at together, of which long rows leave few."""
    monkeypatch.setattr(functions, "torch_reports", lambda capability: False)  # torch promises no such thing
    w, x, kernels = weights_of(*shape), inputs(150, shape[1]), kernels_of(isa, accuracy)
    whole = kernels.matmul(x, w.prepared)
    assert relative_error(whole, x, w.dense(8)) < TOLERANCE[accuracy]
    assert torch.equal(whole[60:131], kernels.matmul(x[60:131], w.prepared))


@pytest.mark.parametrize("threads", [2, 3])
def test_matmul_on_several_threads(threads):
    w, x = weights_of(203, 515), inputs(70, 515)
    one, many = (kernels_of(None, "exact", n).matmul(x, w.prepared) for n in (1, threads))
    assert torch.equal(one, many)


def test_matmul_in_blocks_of_rows(monkeypatch):
    """By torch, where there is AMX: whole blocks and a smaller one at the end; memory kept from a larger or another
    product does no harm."""
    monkeypatch.setattr(functions, "torch_reports", lambda capability: True)
    kernels = kernels_of(None, "balanced")
    for k, n in ((256, 301), (100, 67), (515, 33)):
        w = weights_of(n, k)
        for rows in (1, 4, 1000):
            monkeypatch.setattr(functions, "BLOCK_BYTES", rows * k * 2)
            for tokens in (3, 30):
                x = inputs(tokens, k)
                y = kernels.matmul(x, w.prepared)
                assert relative_error(y, x, w.dense(8)) < TOLERANCE["balanced"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@each_accuracy
def test_matmul_of_other_dtypes(accuracy, dtype):
    w, x = weights_of(67, 160), inputs(30, 160).to(dtype)
    y = kernels_of(None, accuracy).matmul(x, w.prepared)
    assert y.dtype == dtype
    assert relative_error(y, x, w.dense(8)) < max(TOLERANCE[accuracy], 6e-3)


@each_accuracy
@each_isa
def test_matmul_keeps_nan_in_its_row(isa, accuracy):
    w, x = weights_of(67, 160), inputs(20, 160)
    x[7, 33] = float("nan")
    y = kernels_of(isa, accuracy).matmul(x, w.prepared)
    assert torch.isnan(y[7]).all()
    others = [i for i in range(20) if i != 7]
    assert relative_error(y[others], x[others], w.dense(8)) < TOLERANCE[accuracy]


def test_matmul_of_fewer_planes():
    w = Weights(9, 70, lo=2, hi=5)
    x = inputs(18, 70)
    assert relative_error(kernels_of().matmul(x, w.prepared), x, w.dense(5)) < TOLERANCE["exact"]


# -- the int8 head ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 35), (64, 64), (101, 257), (3, 1), (1, 100)], ids=str)
@each_isa
def test_int8_linear(isa, shape):
    w, dense = int8_of(*shape)
    x = inputs(4, shape[1])
    y = kernels_of(isa).int8_linear(x, w)
    assert relative_error(y, x, dense) < 1e-5
    x[2, -1] = float("nan")
    spoilt = kernels_of(isa).int8_linear(x, w)
    assert torch.isnan(spoilt[2]).all()
    assert torch.equal(spoilt[[0, 1, 3]], y[[0, 1, 3]])


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_int8_linear_on_several_threads(threads):
    w, _ = int8_of(1001, 300)
    x = inputs(3, 300)
    one, many = (kernels_of(None, "exact", n).int8_linear(x, w) for n in (1, threads))
    assert torch.equal(one, many)


def test_int8_linear_of_other_inputs():
    w, dense = int8_of(9, 35)
    kernels, x = kernels_of(), inputs(4, 35)
    assert torch.equal(kernels.int8_linear(x.T.contiguous().T, w), kernels.int8_linear(x, w))
    for dtype, relative in ((torch.float16, 1e-3), (torch.bfloat16, 6e-3), (torch.float64, 1e-5)):
        y = kernels.int8_linear(x.to(dtype), w)
        assert y.dtype == dtype
        assert relative_error(y, x.to(dtype), dense) < relative
    with pytest.raises(ValueError, match="not match"):
        kernels.int8_linear(inputs(4, 34), w)


# -- gradients ----------------------------------------------------------------------------------------------


def gradient(product, x):
    """(y, its gradient with respect to x), for random gradients of y."""
    x = x.clone().requires_grad_()
    y = product(x)
    y.backward(inputs(*y.shape, seed=5).to(y.dtype))
    return y.detach(), x.grad


@pytest.mark.parametrize("bits", [(4, 4, 4), (2, 8, 5)], ids=str)
def test_gradients_of_gemv(bits):
    w, kernels, x = weights_of(67, 160), kernels_of(), inputs(3, 160)
    y, found = gradient(lambda v: kernels.gemv(v, w.prepared, widths_of(*bits)), x)
    for row, width in enumerate(bits):
        matrix = torch.from_numpy(w.dense(width))
        expected = inputs(3, 67, seed=5)[row].double() @ matrix
        assert (found[row].double() - expected).norm() < 1e-4 * expected.norm()
    assert relative_error(y[:1], x[:1], w.dense(bits[0])) < TOLERANCE["exact"]


@each_accuracy
def test_gradients_of_matmul(accuracy):
    w, kernels, x = weights_of(67, 160), kernels_of(None, accuracy), inputs(20, 160)
    y, found = gradient(lambda v: kernels.matmul(v, w.prepared), x)
    expected = inputs(20, 67, seed=5).double() @ torch.from_numpy(w.dense(8))
    assert (found.double() - expected).norm() < 1e-4 * expected.norm()
    assert relative_error(y, x, w.dense(8)) < TOLERANCE["exact"]


def test_gradients_of_int8_linear():
    w, dense = int8_of(9, 35)
    y, found = gradient(lambda v: kernels_of().int8_linear(v, w), inputs(4, 35))
    expected = inputs(4, 9, seed=5).double() @ torch.from_numpy(dense)
    assert (found.double() - expected).norm() < 1e-5 * expected.norm()
    assert relative_error(y, inputs(4, 35), dense) < 1e-5


def test_without_gradients_the_native_kernels_compute():
    """An input that asks for gradients changes nothing where they are switched off."""
    w, kernels, x = weights_of(67, 160), kernels_of(), inputs(3, 160)
    expected = kernels.gemv(x, w.prepared, widths_of(2, 8, 5))
    with torch.no_grad():
        y = kernels.gemv(x.clone().requires_grad_(), w.prepared, widths_of(2, 8, 5))
    assert torch.equal(y, expected)
