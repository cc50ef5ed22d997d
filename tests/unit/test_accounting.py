"""Bytes by kind of what each backend prepares."""

from __future__ import annotations

import pytest
from cpu_cases import Weights, needs_library

from dpllm.kernels import reference
from dpllm.kernels.cpu import kernels as functions
from dpllm.kernels.weight import QuantizedWeight
from dpllm.model.loading import LoadOptions, load_decoder, make_group
from dpllm.report.accounting import bytes_by_kind, held_bytes, read_bytes

SHAPES = [(6, 130, 3), (9, 416, 1), (64, 128, 1)]  # N, K, rows that share a table


class For:
    """A backend, as far as groups need one."""

    def __init__(self, name: str):
        self.name = name

    def prepare(self, weight: QuantizedWeight, device: str):
        if self.name == "triton":
            pytest.importorskip("triton")
            from dpllm.kernels.triton import products

            return products.prepare(weight, device)
        return (reference if self.name == "reference" else functions).prepare(weight, device)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_library), "triton"])
@pytest.mark.parametrize(("n", "k", "share"), SHAPES)
def test_read(backend, n, k, share):
    """In the overlay's format, whatever the backend holds."""
    group = make_group("o", Weights(n, k, share).stored, None, For(backend), "cpu")
    for bits in range(2, 9):
        table = n // share * 2 ** min(bits, 6) * 2
        expected = bits * n * -(-k // 32) * 4, table, 2 * n if share > 1 else 0
        assert read_bytes(group, bits) == expected
        assert sum(expected) == group.bytes_at[bits - 2]


@pytest.mark.parametrize(("n", "k", "share"), SHAPES)
def test_held_by_a_gpu(n, k, share):
    """Rows of whole 16 bytes, a table of every width from a whole cache line on."""
    weight = For("triton").prepare(Weights(n, k, share).stored, "cpu")
    words = {130: 8, 416: 16, 128: 4}[k]
    tables = sum(-(-(n // share * 2**b * 2) // 128) * 128 for b in range(2, 9))
    assert held_bytes(weight) == (8 * n * words * 4, tables, 2 * n if share > 1 else 0)
    assert sum(held_bytes(weight)) == weight.held_bytes


@needs_library
@pytest.mark.parametrize(("n", "k", "share"), SHAPES)
def test_held_by_a_cpu(n, k, share):
    """Tables as two int8 digits with a float32 scale each."""
    weight = For("cpu").prepare(Weights(n, k, share).stored, "cpu")
    tables = sum(n // share * 2**b * 2 for b in range(2, 9))
    scales = 7 * 4 * (n // share) + (4 * n if share > 1 else 0)
    assert held_bytes(weight) == (8 * n * -(-k // 32) * 4, tables, scales)
    assert sum(held_bytes(weight)) == weight.held_bytes


def test_a_model_on_a_gpu():
    """What a token reads is the same; planes, tables and scales are held as the GPU's kernels want them."""
    from dpllm.reference import overlay_path

    decoder = load_decoder(overlay_path(), LoadOptions(backend="reference"))
    bits = [[g.seed_bits for g in decoder.groups], [g.resident_bits for g in decoder.groups]]
    stored = bytes_by_kind(decoder, bits, 7, [100, 200])
    for group in decoder.groups:
        group.weight = For("triton").prepare(group.weight, "cpu")
    found = bytes_by_kind(decoder, bits, 7, [100, 200])
    assert [(k.kind, k.read) for k in found] == [(k.kind, k.read) for k in stored]
    assert found[3:] == stored[3:]
    assert sum(k.held for k in found[:3]) == sum(g.weight.held_bytes for g in decoder.groups)
