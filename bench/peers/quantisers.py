"""Other systems' quantisers applied to given matrices, in a worker: what they store, dequantised, and its bytes.

llama.cpp's own code quantises (`ggml_quantize_chunk`, with an importance matrix where one is given) and gguf's
dequantises; torchao does both itself. Matrices travel through .npz files in a folder that the caller made:
`matrices.npz` (GGUF name -> float32 [N, K]), `importance.npz` (the same names -> float32 [K], mean squared
inputs, what llama.cpp's imatrix holds), and back `quantised.npz`.

Optional extra: llama-cpp-python and gguf, or torch and torchao, in the interpreter that runs it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.gguf_random import quiet_llama_cpp, tensor_types
from bench.peers.shapes import Shape
from bench.peers.worker import PeerError, serve


class Quantisers:
    """The worker's object. Methods return {"bytes": of all matrices, "types": matrices by type}."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._folder = Path(options["folder"])
        self._matrices = dict(np.load(self._folder / "matrices.npz"))
        self.info = {"matrices": len(self._matrices)}

    def llama_cpp(self, kind: str, important: bool, shape: dict[str, Any]) -> dict[str, Any]:
        """One type for all ("Q3_K"), or one of llama.cpp's mixes ("Q3_K_M") as it would choose them."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        quiet_llama_cpp()
        importance = dict(np.load(self._folder / "importance.npz")) if important else {}
        if kind in GGMLQuantizationType.__members__:
            types = dict.fromkeys(self._matrices, GGMLQuantizationType[kind])
        else:
            types = tensor_types(Shape(**shape), kind)
        quantise = _quantise_chunk()
        found, counts, total = {}, {}, 0
        for name, matrix in self._matrices.items():
            weights, size = GGML_QUANT_SIZES[types[name]]
            codes = np.zeros((len(matrix), matrix.shape[1] // weights * size), np.uint8)
            source = np.ascontiguousarray(matrix, np.float32)
            hint = None if name not in importance else np.ascontiguousarray(importance[name], np.float32)
            written = quantise(
                int(types[name]), source.ctypes.data, codes.ctypes.data, 0, *source.shape,
                None if hint is None else hint.ctypes.data,
            )  # fmt: skip
            if written != codes.nbytes:
                raise PeerError(
                    f"ggml_quantize_chunk wrote {written} bytes of {kind}, expected {codes.nbytes}"
                )
            found[name] = dequantize(codes, types[name]).astype(np.float32)
            counts[types[name].name] = counts.get(types[name].name, 0) + 1
            total += codes.nbytes
        np.savez(self._folder / "quantised.npz", **found)
        return {"bytes": total, "types": counts}

    def torchao(self, bits: int, group: int) -> dict[str, Any]:
        """IntxWeightOnlyConfig: asymmetric integers, a bfloat16 scale and zero point per group of a row."""
        import torch
        import torchao.quantization as ao

        kind = getattr(torch, f"int{bits}")
        config = ao.IntxWeightOnlyConfig(
            weight_dtype=kind, granularity=ao.granularity.PerGroup(group), mapping_type=ao.MappingType.ASYMMETRIC
        )  # fmt: skip
        found, total = {}, 0
        for name, matrix in self._matrices.items():
            linear = torch.nn.Linear(matrix.shape[1], len(matrix), bias=False)
            linear.weight = torch.nn.Parameter(torch.from_numpy(matrix), requires_grad=False)
            holder = torch.nn.Sequential(linear)
            ao.quantize_(holder, config)
            found[name] = holder[0].weight.dequantize().float().numpy()
            total += matrix.size * bits // 8 + matrix.size // group * (2 + 1)  # zero points are int8
        np.savez(self._folder / "quantised.npz", **found)
        return {"bytes": total, "types": {f"int{bits}": len(found)}}


def _quantise_chunk() -> Callable[..., int]:
    from llama_cpp._ggml import libggml

    quantise = libggml.ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    quantise.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    return quantise


if __name__ == "__main__":
    serve(Quantisers)
