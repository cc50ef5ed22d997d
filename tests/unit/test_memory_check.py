"""A model larger than the memory: said before it is read, with what would fit."""

from __future__ import annotations

import pytest
from cpu_cases import needs_library

from dpllm.base.errors import InputError
from dpllm.model import memory
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.model.memory import check_memory
from dpllm.model.random_models import SHAPES, random_decoder, shape, shape_resident_bytes
from dpllm.quant.overlay import Overlay

SIZES = {2: 2_000_000_000, 3: 3_000_000_000, 4: 4_000_000_000}


@pytest.mark.parametrize("free", [4_000_000_000, 10**12])
def test_what_fits(free):
    check_memory("some/model", SIZES, free)


@pytest.mark.parametrize(("free", "planes"), [(3_999_999_999, 3), (3_000_000_000, 3), (2_000_000_000, 2)])
def test_fewer_planes_would_fit(free, planes):
    with pytest.raises(InputError) as e:
        check_memory("some/model", SIZES, free)
    message = str(e.value)
    assert "some/model needs 4.0 GB with 4 planes" in message
    assert f"{free / 1e9:.1f} GB of memory are free" in message
    assert f"{planes} planes would fit: use --resident-bits {planes} or --max-memory" in message
    assert "\n" not in message


def test_nothing_fits():
    with pytest.raises(InputError, match=r"even 2 planes need 2\.0 GB. Use a smaller model") as e:
        check_memory("some/model", SIZES, 1_999_999_999)
    assert "would fit" not in str(e.value)
    assert "\n" not in str(e.value)


def test_a_system_that_does_not_say(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    check_memory("some/model", {8: 10**18})
    monkeypatch.setattr(memory, "available_bytes", lambda: 10)
    with pytest.raises(InputError):
        check_memory("some/model", {8: 11})


def test_loading_checks_the_planes_it_is_asked_to_hold(quantized, monkeypatch):
    enough = memory.resident_bytes(Overlay.open(quantized), 4)
    monkeypatch.setattr(memory, "available_bytes", lambda: enough)
    with pytest.raises(InputError, match=r"with 6 planes.*4 planes would fit: use --resident-bits 4"):
        load_decoder(quantized)
    decoder = load_decoder(quantized, LoadOptions(resident_bits=4))
    assert decoder.groups[0].resident_bits == 4


def test_known_shapes():
    for name in SHAPES:
        assert shape(name) is SHAPES[name]
    with pytest.raises(
        InputError,
        match=r"'70B' is neither a directory nor a known shape\. Choose one of: tiny, 1.1B, 3B, 8B",
    ):
        shape("70B")


@needs_library
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_resident_bytes_of_a_shape(bits):
    """The prediction is what a model of this shape then holds, within 3%."""
    decoder = random_decoder(shape("tiny"), bits)
    matrices = sum(g.weight.held_bytes for g in decoder.groups)
    tables = decoder.embedding.nbytes() + decoder.head.nbytes()
    assert shape_resident_bytes(shape("tiny"), bits) == pytest.approx(matrices + tables, rel=0.03)
    planes = sum(g.weight.planes.numel() * 4 for g in decoder.groups)
    assert planes == sum(g.weights for g in decoder.groups) * bits // 8
