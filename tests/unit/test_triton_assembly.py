"""The inline assembly of the GPU's kernels, executed as text: Triton's interpreter, which checks all else, has none."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

import ptx

from dpllm.kernels.triton import bitplane_codes as codes
from dpllm.kernels.triton import gemv, int8


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def packed_codes(digits: np.ndarray, bits: int) -> np.ndarray:
    """Digits [32, n] -> one word a lane."""
    return sum(digits[:, i].astype(np.uint32) << np.uint32(bits * i) for i in range(digits.shape[1]))


def table_of(rng, width: int) -> np.ndarray:
    """Any float16 that are numbers, subnormals and infinities among them."""
    table = rng.integers(0, 2**16, 2**width).astype(np.uint16)
    return np.where(np.isnan(table.view(np.float16)), 0, table).astype(np.uint16)


def expected(table: np.ndarray, digits: np.ndarray, pairs: list[tuple[int, int]]) -> list[np.ndarray]:
    values = table[digits].astype(np.uint32)
    return [values[:, low] | values[:, high] << np.uint32(16) for low, high in pairs]


NIBBLES = [(0, 2), (1, 3), (4, 6), (5, 7)]
BYTES = [(0, 1), (2, 3)]


@pytest.mark.parametrize("width", [2, 3, 4])
def test_byte_permutations_look_up(rng, width):
    kernel = codes.sixteen if width == 4 else codes.eight
    (text,) = ptx.assembly(kernel)
    for _ in range(20):
        table, digits = table_of(rng, width), rng.integers(0, 2**width, (32, 8))
        split = np.concatenate([table & 255, table >> 8]).astype(np.uint8).view(np.uint32)
        words = [np.full(32, w, np.uint32) for w in split]
        if width == 2:
            words = [words[0], words[0], words[1], words[1]]
        found = ptx.run(text, 4, [packed_codes(digits, 4), *words])
        for f, e in zip(found, expected(table, digits, NIBBLES), strict=True):
            np.testing.assert_array_equal(f, e)


@pytest.mark.parametrize("width", [5, 6])
def test_lanes_share_a_table(rng, width):
    load = ptx.assembly(codes.lane_entries)[width - 5]
    (text,) = ptx.assembly([codes.shuffled32, codes.shuffled64][width - 5])
    for _ in range(20):
        table, digits = table_of(rng, width), rng.integers(0, 2**width, (32, 4))
        memory = np.concatenate([np.zeros(128, np.uint8), table.view(np.uint8)])
        entries = ptx.run(load, 1, [np.full(32, 128, np.uint64)], memory)
        found = ptx.run(text, 2, [packed_codes(digits, 8), *entries])
        for f, e in zip(found, expected(table, digits, BYTES), strict=True):
            np.testing.assert_array_equal(f, e)


@pytest.mark.parametrize("width", [5, 6, 7, 8])
def test_gathers_look_up(rng, width):
    (text,) = ptx.assembly(codes.gathered)
    tables, digits = [table_of(rng, width) for _ in range(32)], rng.integers(0, 2**width, (32, 4))
    memory = np.concatenate(tables).view(np.uint8)
    address = np.arange(32, dtype=np.uint64) * (2 << width)  # each lane a row of its own
    found = ptx.run(text, 2, [packed_codes(digits, 8), address], memory)
    for i, table in enumerate(tables):
        for f, e in zip(found, expected(table, digits, BYTES), strict=True):
            assert f[i] == e[i]


def test_signed_bytes_become_halves(rng):
    (text,) = ptx.assembly(int8.pairs_of_bytes)
    digits = np.concatenate([np.arange(256), rng.integers(0, 256, 768)]).reshape(-1, 32, 4)
    for block in digits:
        for f, (low, high) in zip(ptx.run(text, 2, [packed_codes(block, 8)]), BYTES, strict=True):
            np.testing.assert_array_equal(ptx.halves(f), (block - 256 * (block > 127))[:, [low, high]])


def test_tensor_cores_add_up_each_quads_own_columns(rng):
    """Two neighbouring words of rows a and b, several times over; then every quad finds its own sums, once."""
    (multiply,), (own,) = ptx.assembly(gemv.multiply), ptx.assembly(gemv.own_sums)
    sums = [np.zeros(32, np.uint32)] * 4  # rows a, a, b, b
    exact = np.zeros((2, 32))
    for _ in range(5):
        a, b, x = (rng.normal(size=(2, 32, 2)).astype(np.float16) for _ in range(3))
        exact += [(rows.astype(float) * x.astype(float)).sum((0, 2)) for rows in (a, b)]
        words = [ptx.pack_halves(v[i]) for v in (a, b, x) for i in range(2)]
        sums = ptx.run(multiply, 4, [*words, *sums])
    for row in range(2):
        mine = [w.view(np.float32) for w in ptx.run(own, 2, sums[2 * row : 2 * row + 2])]
        assert (np.count_nonzero(mine, axis=0).reshape(8, 4).sum(1) == 1).all()
        found, wanted = (v.reshape(8, 4).sum(1) for v in (np.sum(mine, 0), exact[row]))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_no_number_spoils_its_own_quad_only(rng):
    (multiply,), (own,) = ptx.assembly(gemv.multiply), ptx.assembly(gemv.own_sums)
    words = [ptx.pack_halves(rng.normal(size=(32, 2))) for _ in range(6)]
    words[4] = words[4].copy()
    words[4][13] = 0x7E007E00  # activations of lane 13, quad 3
    sums = ptx.run(multiply, 4, [*words, *[np.zeros(32, np.uint32)] * 4])
    quads = np.sum([w.view(np.float32) for w in ptx.run(own, 2, sums[:2])], 0).reshape(8, 4).sum(1)
    assert np.isnan(quads).tolist() == [q == 3 for q in range(8)]
