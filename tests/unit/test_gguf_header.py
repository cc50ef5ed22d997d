"""Headers of GGUF files: any bytes are either a valid model or one clear line."""

from __future__ import annotations

import resource
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import finished, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpllm.base.errors import InputError
from dpllm.quant.gguf.config import describe
from dpllm.quant.gguf.header import Header, is_gguf
from dpllm.quant.gguf.metadata import Metadata
from dpllm.quant.gguf.model import GgufModel
from dpllm.quant.gguf.tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def valid(tiny_checkpoint, tmp_path_factory) -> bytes:
    """A small model with every kind of tensor that the reader looks at."""
    path = tmp_path_factory.mktemp("gguf") / "valid.gguf"
    write_gguf(path, tiny_checkpoint, tensors={"rope_freqs.weight": torch.ones(8)})
    return path.read_bytes()


def read(path: Path) -> None:
    """Everything that is done with a file before its weights are read, and then one read of each weight."""
    model = GgufModel.read(path)
    described = describe(model.header, model.tensors)
    make_tokenizer(Metadata(path, model.header.metadata), described.config["vocab_size"])
    for name, reader in model.readers(described, permuted=True).items():
        assert list(reader.read(name).shape) == reader.layout(name)[0]


def header_size(content: bytes) -> int:
    """Bytes in front of the first tensor, about."""
    return content.rindex(b"output_norm.weight") + 64


@st.composite
def damage(draw, content: bytes) -> bytes:
    """A file of which some bytes, or a number at some place, are others; or which ends early."""
    end, data = header_size(content), bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.one_of(st.integers(0, end - 9), st.integers(0, 64), st.integers(end - 3000, end - 9)))
        kind = draw(st.sampled_from(["byte", "number", "length", "cut"]))
        if kind == "byte":
            data[at] = draw(st.integers(0, 255))
        elif kind == "number":
            data[at : at + 4] = draw(st.integers(0, 2**32 - 1)).to_bytes(4, "little")
        elif kind == "length":
            data[at : at + 8] = draw(st.sampled_from([0, 1, 2**31, 2**40, 2**63, 2**64 - 1])).to_bytes(
                8, "little"
            )
        else:
            del data[draw(st.integers(0, len(data))) :]
            data += bytes(max(0, end + 8 - len(data))) if draw(st.booleans()) else b""
        if len(data) < end:
            break
    return bytes(data)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_a_model_or_one_line(data, valid, tmp_path):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data.draw(damage(valid)))
    try:
        read(path)
    except InputError as e:
        assert str(path) in str(e) and "\n" not in str(e) and len(str(e)) < 600


def test_the_undamaged_file_is_a_model(valid, tmp_path):
    (tmp_path / "valid.gguf").write_bytes(valid)
    read(tmp_path / "valid.gguf")


@given(content=st.binary(max_size=200).map(lambda b: b"GGUF\x03\0\0\0" + b))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused(content, tmp_path):
    path = tmp_path / "bytes.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read(path)


def announcing(tensors: int = 0, entries: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest


def entry(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    "content, named",
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
        (b"GG", "not a GGUF file"),
        (b"GGUF", "damaged"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<III", 1, 0, 0), "version 1"),
        (announcing(entries=2**63), "announces"),
        (announcing(tensors=2**60), "announces"),
        (announcing(entries=1, rest=struct.pack("<Q", 2**62) + bytes(16)), "announces"),
        (announcing(entries=1, rest=entry("a", 9, struct.pack("<IQ", 6, 2**61))), "announces"),
        (announcing(entries=1, rest=entry("a", 9, struct.pack("<IQ", 8, 2**61))), "announces"),
        (announcing(entries=1, rest=entry("a", 9, struct.pack("<IQ", 9, 1)) + bytes(40)), "type 9"),
        (announcing(entries=1, rest=entry("a", 77, bytes(16))), "type 77"),
        (announcing(entries=1, rest=entry("a", 8, struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8))), "UTF-8"),
        (announcing(entries=2, rest=2 * entry("a", 0, b"\1") + bytes(8)), "twice"),
        (announcing(entries=1, rest=entry("general.alignment", 4, struct.pack("<I", 0))), "alignment"),
        (
            announcing(entries=1, rest=entry("general.alignment", 8, struct.pack("<Q", 0) + bytes(8))),
            "alignment",
        ),
    ],
)
def test_headers_that_promise_too_much_are_refused_at_once(content, named, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=named):
        Header.read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    described = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return struct.pack("<Q", len(name)) + name.encode() + described


@pytest.mark.parametrize(
    "content, named",
    [
        (tensor("w", (32, 4), 0) + bytes(100), "cut off"),
        (tensor("w", (2**40, 2**40), 0) + bytes(100), "cut off"),
        (tensor("w", (2**63, 4), 0, 2**63) + bytes(100), "cut off"),
        (tensor("w", (32, 0), 0) + bytes(100), "shape"),
        (tensor("w", (1, 1, 1, 1, 1), 0) + bytes(100), "dimensions"),
        (tensor("w", (33,), 2) + bytes(100), "whole Q4_0 blocks"),
        (tensor("w", (32,), 139) + bytes(100), "number 139.*ik_llama"),
        (tensor("w", (32,), 4) + bytes(100), "number 4"),  # Q4_2, which was removed
        (tensor("w", (32,), 24) + bytes(100), "I8"),
    ],
)
def test_tensors_that_cannot_be_read_are_refused(content, named, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(announcing(tensors=1, rest=content))
    with pytest.raises(InputError, match=named):
        Header.read(path)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(announcing(tensors=2, rest=2 * tensor("w", (8,), 0) + bytes(200)))
    with pytest.raises(InputError, match="same name"):
        Header.read(path)


def test_metadata_of_every_type_are_read_as_the_package_reads_them(tmp_path):
    path, values = tmp_path / "m.gguf", {}
    writer = gguf.GGUFWriter(path, "llama")
    for kind, value in (
        ("uint8", 200), ("int8", -100), ("uint16", 60_000), ("int16", -30_000), ("uint32", 4_000_000_000),
        ("int32", -2_000_000_000), ("uint64", 2**63), ("int64", -(2**62)), ("float32", 0.5), ("float64", 1e-300),
        ("bool", True), ("string", "é\u2581"), ("array", ["a", "", "ü"]), ("array", [1, -2, 3]), ("array", [0.25]),
    ):  # fmt: skip
        key = f"k.{len(values)}"
        getattr(writer, f"add_{kind}")(key, value)
        values[key] = value
    writer.add_tensor("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    header = Header.read(finished(writer, path))
    assert {k: v for k, v in header.metadata.items() if k in values} == values
    assert header.tensors["w"].shape == (2, 3)


def test_a_file_is_recognised_by_its_name_or_its_bytes(valid, tmp_path):
    (tmp_path / "blob").write_bytes(valid[:100])
    (tmp_path / "named.gguf").write_bytes(b"")
    (tmp_path / "other").write_bytes(b"text")
    assert is_gguf(tmp_path / "blob") and is_gguf(tmp_path / "named.gguf")
    assert not is_gguf(tmp_path / "other") and not is_gguf(tmp_path) and not is_gguf(tmp_path / "none.gguf")
