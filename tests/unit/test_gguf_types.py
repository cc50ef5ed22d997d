"""Types of tensors in GGUF files: each is read as the `gguf` package dequantises it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import finished

from dpllm.quant.gguf.config import Part
from dpllm.quant.gguf.families import PERMUTED
from dpllm.quant.gguf.header import Header
from dpllm.quant.gguf.tensors import GgufTensors
from dpllm.quant.gguf.types import dense_dtype, stored_bytes

FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
WRITTEN = (*FLOATS, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4)
READ_ONLY = (
    Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ1_S, Kind.IQ1_M, Kind.IQ2_XXS, Kind.IQ2_XS,
    Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ4_NL, Kind.IQ4_XS, Kind.NVFP4,
)  # fmt: skip


def file_of(raw: np.ndarray, kind: Kind, path) -> Header:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("other", np.ones(3, np.float32))
    writer.add_tensor("w", raw, raw_dtype=kind)
    return Header.read(finished(writer, path))


def stored(kind: Kind, path, rows: int = 8, columns: int = 512) -> tuple[Header, np.ndarray]:
    """A file with a matrix in this type, and its values by the package."""
    rng = np.random.default_rng(kind.value)
    if kind in WRITTEN:
        raw = gguf.quantize(rng.normal(size=(rows, columns)).astype(np.float32), kind)
    else:  # there is no way to quantise: any bytes are codes, and only scales must be finite
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
        raw &= 0xBF  # no exponent of a float16 scale is that of infinity
    return file_of(raw, kind, path), gguf.dequantize(raw, kind)


@pytest.mark.parametrize("kind", WRITTEN + READ_ONLY, ids=lambda k: k.name)
def test_values_are_those_of_the_package(kind, tmp_path):
    header, expected = stored(kind, tmp_path / "m.gguf")
    tensors = GgufTensors(
        header.path, {"w": Part(header.path, header.tensors["w"], None)}, head=4, permuted=True
    )
    found = tensors.read("w")
    assert np.isfinite(expected).all() and expected.std() > 0
    assert torch.equal(found.float(), torch.tensor(expected))
    dtype = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    assert found.dtype == dtype and tensors.layout("w") == ([8, 512], dense_dtype(kind))
    assert tensors.bytes_read == stored_bytes((8, 512), kind) == header.tensors["w"].nbytes


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q4_0, Kind.Q6_K], ids=lambda k: k.name)
@pytest.mark.parametrize("head", [2, 4, 8])
def test_permuted_rows_are_put_back(kind, head, tmp_path):
    """Row 2 i + s of a stored head is row s * head / 2 + i of the model's."""
    header, values = stored(kind, tmp_path / "m.gguf")
    part = Part(header.path, header.tensors["w"], PERMUTED)
    found = GgufTensors(header.path, {"w": part}, head=head, permuted=True).read("w")
    for row in range(8):
        h, i, s = row // head, row % head % (head // 2), row % head // (head // 2)
        assert torch.equal(found[row].float(), torch.tensor(values)[h * head + 2 * i + s])
    kept = GgufTensors(header.path, {"w": part}, head=head, permuted=False).read("w")
    assert torch.equal(kept.float(), torch.tensor(values))
