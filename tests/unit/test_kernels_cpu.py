"""Native products of bitplanes, for every instruction set this processor runs, against float64."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from cpu_cases import (
    ISAS,
    TOLERANCE,
    WIDTHS,
    Weights,
    each_accuracy,
    each_isa,
    inputs,
    kernels_of,
    needs_library,
    relative_error,
    weights_of,
    widths_of,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from dpllm.kernels.cpu import library, step
from dpllm.kernels.cpu.kernels import prepare

pytestmark = needs_library

# (N, K, rows_per_table): odd rows; columns around a word (32), around the blocks of the kernels (128, 256, 512), and
# 256, which AVX-512 takes two rows at a time where they share a table.
SHAPES = [
    (9, 31, 1), (7, 33, 1), (5, 100, 1), (13, 128, 13), (67, 160, 1), (11, 250, 11), (7, 256, 1), (9, 256, 3),
    (15, 256, 15), (5, 257, 1), (3, 512, 1), (33, 515, 3), (5, 1100, 5),
]  # fmt: skip
ROWS = 6  # four at once, then two alone


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_accuracy
@each_isa
def test_gemv_at_every_width(isa, accuracy, shape):
    w, kernels = weights_of(*shape), kernels_of(isa, accuracy)
    x = inputs(ROWS, w.k)
    for bits in WIDTHS:
        y = kernels.gemv(x, w.prepared, widths_of(*[bits] * ROWS))
        assert relative_error(y, x, w.dense(bits)) < TOLERANCE[accuracy], f"{bits} bits"


@each_isa
def test_exact_is_much_more_exact(isa):
    """What `exact` costs buys something, at every width."""
    w, x = weights_of(67, 160), inputs(ROWS, 160)
    for bits in WIDTHS:
        exact, fast = (
            relative_error(
                kernels_of(isa, a).gemv(x, w.prepared, widths_of(*[bits] * ROWS)), x, w.dense(bits)
            )
            for a in ("exact", "fast")
        )
        assert exact < fast / 50


@pytest.mark.parametrize("shape", [(33, 515, 3), (9, 256, 3), (67, 160, 1)], ids=str)
@each_accuracy
@each_isa
def test_a_row_does_not_depend_on_the_others(isa, accuracy, shape):
    """Bit for bit, whatever the widths of the other rows and however many there are."""
    w, kernels = weights_of(*shape), kernels_of(isa, accuracy)
    mixed = np.random.default_rng(3).permutation(np.tile(list(WIDTHS), 3)).tolist()
    for widths in (mixed, [4] * 21):
        x = inputs(len(widths), w.k)
        alone = [kernels.gemv(x[i : i + 1], w.prepared, widths_of(b)) for i, b in enumerate(widths)]
        assert torch.equal(kernels.gemv(x, w.prepared, widths_of(*widths)), torch.cat(alone))


@pytest.mark.parametrize("threads", [2, 3, 8])
@each_isa
def test_threads_change_nothing(isa, threads):
    w, x = weights_of(301, 1100), inputs(14, 1100)
    bits = widths_of(*WIDTHS, *WIDTHS)
    expected = kernels_of(isa, "balanced").gemv(x, w.prepared, bits)
    for _ in range(5):
        assert torch.equal(kernels_of(isa, "balanced", threads).gemv(x, w.prepared, bits), expected)


@settings(deadline=None, max_examples=150)
@given(
    isa=st.sampled_from(ISAS or ["none"]),
    tables=st.integers(1, 5),
    share=st.sampled_from([1, 1, 2, 3]),
    k=st.integers(1, 700) | st.sampled_from([224, 255, 256]),
    rows=st.integers(1, 9),
    resident=st.tuples(st.integers(2, 6), st.integers(0, 6)).map(lambda t: (t[0], min(8, t[0] + t[1]))),
    size=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_random_overlays(isa, tables, share, k, rows, resident, size, seed, data):
    """Within what rounding every table entry and activation to 16 bits can do, element by element."""
    lo, hi = resident
    w = Weights(tables * share, k, share, lo, hi, seed)
    bits = data.draw(st.lists(st.integers(lo, hi), min_size=rows, max_size=rows))
    x = inputs(rows, k, seed) * size
    y = kernels_of(isa).gemv(x, w.prepared, widths_of(*bits)).double().numpy()
    groups = np.pad(np.abs(x.double().numpy()), ((0, 0), (0, -k % 32))).reshape(rows, -1, 32)
    x_steps = (groups.max(2, keepdims=True) / 65000 + 0 * groups).reshape(rows, -1)[:, :k]
    for i, b in enumerate(bits):
        dense, largest = w.dense(b), np.abs(w.table(b)).max(1)
        magnitudes = np.abs(x[i].double().numpy())
        room = magnitudes.sum() * largest * (1 / 65000 + 2e-6) + np.abs(dense) @ x_steps[i]
        assert (np.abs(y[i] - x[i].double().numpy() @ dense.T) <= room * 1.001).all()


# -- activations that are no ordinary numbers ---------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1e30, -1e30, 1e-40, 1e-45])
@each_accuracy
@each_isa
def test_extreme_activations(isa, accuracy, value):
    w, kernels = weights_of(9, 256, 3), kernels_of(isa, accuracy)
    for bits in ((5, 5, 5), (2, 7, 8)):
        x = inputs(3, 256)
        x[1] = value
        y = kernels.gemv(x, w.prepared, widths_of(*bits))
        assert torch.isfinite(y).all()
        for row, width in enumerate(bits):
            if row == 1 and abs(value) < 1e-30:
                assert (y[1].abs() <= abs(value) * 256 * np.abs(w.dense(width)).max()).all()
            else:
                at = slice(row, row + 1)
                assert relative_error(y[at], x[at], w.dense(width)) < TOLERANCE[accuracy]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 40, 255])
@each_accuracy
@each_isa
def test_non_finite_activations_stay_in_their_row(isa, accuracy, column, value):
    w, kernels = weights_of(9, 256, 3), kernels_of(isa, accuracy)
    x = inputs(6, 256)
    for bits in ([4] * 6, [3, 8, 4, 7, 2, 6]):
        clean = kernels.gemv(x, w.prepared, widths_of(*bits))
        spoilt = x.clone()
        spoilt[1, column] = value
        y = kernels.gemv(spoilt, w.prepared, widths_of(*bits))
        assert not torch.isfinite(y[1]).any()
        assert torch.isnan(y[1]).all() or not np.isnan(value)
        others = [0, 2, 3, 4, 5]
        assert torch.equal(y[others], clean[others])
        assert torch.equal(kernels.gemv(x, w.prepared, widths_of(*bits)), clean), (
            "nothing of it is remembered"
        )


# -- memory -------------------------------------------------------------------------------------------------


@each_isa
def test_x_may_lie_anywhere(isa):
    w, kernels = weights_of(33, 515, 3), kernels_of(isa)
    x, bits = inputs(3, 515), widths_of(3, 5, 8)
    expected = kernels.gemv(x, w.prepared, bits)
    unaligned = torch.zeros(3 * 515 + 1)[1:].view(3, 515).copy_(x)
    every_second = torch.zeros(3, 1030)[:, ::2].copy_(x)
    for placed in (unaligned, every_second, x.T.contiguous().T):
        assert torch.equal(kernels.gemv(placed, w.prepared, bits), expected)
    assert torch.equal(kernels.gemv(x, w.prepared, bits.to(torch.int64)), expected)


@pytest.mark.parametrize("shape", [(7, 250, 1), (5, 1100, 5)], ids=str)
@each_isa
def test_planes_may_lie_at_any_byte(isa, shape):
    """As in a mapped file whose header has an odd length."""
    w, kernels = Weights(*shape), kernels_of(isa)
    room = bytearray(3 + w.stored.planes.numel() * 4)
    planes = torch.frombuffer(room, dtype=torch.int32, offset=3).view(w.stored.planes.shape)
    planes.copy_(w.stored.planes)
    moved = prepare(type(w.stored)(planes, w.stored.lut, w.k, 2, w.stored.scale))
    assert moved.planes.data_ptr() % 4, "used where they lie"
    x = inputs(7, w.k)
    assert torch.equal(
        kernels.gemv(x, moved, widths_of(*WIDTHS)), kernels.gemv(x, w.prepared, widths_of(*WIDTHS))
    )


@each_isa
def test_bits_beyond_the_last_column_mean_nothing(isa):
    w, kernels = Weights(5, 45), kernels_of(isa)
    x = inputs(7, 45)
    clean = kernels.gemv(x, w.prepared, widths_of(*WIDTHS))
    w.prepared.planes[:, :, -1] |= -(1 << 13)
    assert torch.equal(kernels.gemv(x, w.prepared, widths_of(*WIDTHS)), clean)


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float16, 1e-3), (torch.bfloat16, 6e-3), (torch.float64, 1e-4)], ids=str
)
def test_other_dtypes(dtype, relative):
    w, x = weights_of(67, 160), inputs(2, 160).to(dtype)
    y = kernels_of().gemv(x, w.prepared, widths_of(3, 6))
    assert y.dtype == dtype
    for row, bits in enumerate((3, 6)):
        assert relative_error(y[row : row + 1], x[row : row + 1], w.dense(bits)) < relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gemv_writes_into_out(dtype):
    w, x, bits = weights_of(9, 256, 3), inputs(3, 256), widths_of(2, 8, 5)
    room = torch.full((5, 12), 7.0, dtype=dtype)
    out = room[1:4, 2:11]
    assert kernels_of().gemv(x, w.prepared, bits, out=out) is out
    assert torch.equal(out, kernels_of().gemv(x, w.prepared, bits).to(dtype))
    out.fill_(7.0)
    assert (room == 7).all(), "nothing outside `out` was written"


def test_gemv_of_no_rows():
    assert kernels_of().gemv(inputs(0, 160), weights_of(67, 160).prepared, widths_of()).shape == (0, 67)


# -- what cannot be computed --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 7, 9, 0, -1])
def test_widths_that_are_not_resident(bits):
    w = Weights(5, 40, lo=3, hi=6)
    with pytest.raises(ValueError, match="not resident"):
        kernels_of().gemv(inputs(2, 40), w.prepared, widths_of(4, bits))
    with pytest.raises(ValueError, match="not resident"):
        kernels_of().dequantize(w.prepared, bits)


@pytest.mark.parametrize(("rows", "columns", "widths"), [(2, 39, 2), (2, 41, 2), (2, 40, 1), (2, 40, 3)])
def test_shapes_that_do_not_match(rows, columns, widths):
    w = Weights(5, 40)
    with pytest.raises(ValueError, match="not match"):
        kernels_of().gemv(inputs(rows, columns), w.prepared, widths_of(*[4] * widths))


def test_weights_stay_on_the_cpu():
    with pytest.raises(ValueError, match="meta"):
        prepare(Weights(5, 40).stored, "meta")


# -- the C interface ----------------------------------------------------------------------------------------


def structures(module) -> list[type[ctypes.Structure]]:
    """The C structures that a module declares."""
    return [
        s for s in vars(module).values() if isinstance(s, type) and issubclass(s, ctypes.Structure)
        and s.__module__ == module.__name__
    ]  # fmt: skip


@pytest.mark.parametrize("structure", [*structures(library), *structures(step)], ids=lambda s: s.__name__)
def test_structures_refuse_fields_that_they_lack(structure):
    """Else a field renamed on one side is zero on the other: a cache of half precision read as float32."""
    with pytest.raises(AttributeError):
        structure(not_there=1)
