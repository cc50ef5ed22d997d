"""Other runtimes' linear layers at a Llama's shape: torch bf16, torch and torchao integer weights, onnxruntime.

Limit measured: reading the weights. Only the matrices run, one after another as in a decode step (q/k/v as one
matrix, gate/up as one, then the head); no norms, attention, rope or sampling, so a full step would be slower:
rows made of these say "linears only". Weights are random, every matrix has memory of its own.

Optional extra:

    pip install torch torchao onnx onnxruntime numpy

    python -m bench.peers.torch_peers      # every kind at the 1.1B shape
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.peers.shapes import SHAPES, Shape
from bench.peers.worker import Peer, PeerError, serve

GROUP = 32  # weights per scale wherever a runtime lets one choose
Matrices = list[tuple[str, int, int]]


@dataclass(frozen=True)
class LinearsOptions:
    """Which runtime, at which shape."""

    kind: str
    shape: Shape
    threads: int = 2


def matrices(shape: Shape) -> Matrices:
    """(name, rows, columns) in the order in which a token meets them."""
    q, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    layer = [
        ("qkv", q + 2 * kv, shape.hidden),
        ("o", shape.hidden, q),
        ("gate_up", 2 * shape.intermediate, shape.hidden),
        ("down", shape.hidden, shape.intermediate),
    ]
    named = [(f"{i}.{name}", n, k) for i in range(shape.layers) for name, n, k in layer]
    return [*named, ("head", shape.vocabulary, shape.hidden)]


class Linears:
    """The worker's object: a runtime's `run` (float32 [M, hidden] to anything) with a clock around it."""

    def __init__(self, options: LinearsOptions) -> None:
        self._hidden = options.shape.hidden
        began = time.perf_counter()
        self._run, size, version = KINDS[options.kind](matrices(options.shape), options.threads)
        weights = sum(n * k for _, n, k in matrices(options.shape))
        self.info = {
            "version": version, "bytes": size, "weights": weights, "bits_per_weight": size * 8 / weights,
            "load_s": time.perf_counter() - began, "scope": "linears only",
        }  # fmt: skip
        self._timed(1)

    def prefill(self, tokens: int) -> float:
        """Seconds for all layers' linears on that many rows and the head on the last."""
        return self._timed(tokens)

    def decode(self, tokens: int, context: int = 0) -> list[float]:
        """Milliseconds of each pass on one row; the context is nothing to linears."""
        return [self._timed(1) * 1e3 for _ in range(tokens)]

    def _timed(self, rows: int) -> float:
        x = np.random.default_rng(rows).standard_normal((rows, self._hidden), np.float32)
        return self._run(x)


def _torch_chain(linears: list[Callable[[Any], Any]], sizes: Matrices, dtype: Any) -> Callable:
    """One pass through torch callables, each fed the first columns of what the one before gave."""
    import torch

    widths = [k for _, _, k in sizes]

    @torch.inference_mode()
    def run(array: np.ndarray) -> float:
        x = torch.from_numpy(array).to(dtype)
        began = time.perf_counter()
        for linear, width in zip(linears[:-1], widths, strict=False):
            x = linear(x[:, :width])
        linears[-1](x[-1:, : widths[-1]])
        return time.perf_counter() - began

    return run


def _copies(sizes: Matrices, make: Callable[[int, int], Any]) -> Iterator[Any]:
    """make(rows, columns) once per distinct size, copied for every further matrix."""
    made: dict[tuple[int, int], Any] = {}
    for _, n, k in sizes:
        if (n, k) in made:
            yield copy.deepcopy(made[n, k])
        else:
            made[n, k] = make(n, k)
            yield made[n, k]


def _module(n: int, k: int, config: Any = None) -> Any:
    import torch

    linear: Any = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
    torch.nn.init.normal_(linear.weight, std=k**-0.5)
    if config is not None:
        from torchao.quantization import quantize_

        holder = torch.nn.Sequential(linear)
        quantize_(holder, config)
        linear = holder[0]
    return linear.requires_grad_(False)


def _bf16(sizes: Matrices, threads: int) -> tuple[Callable, int, str]:
    import torch

    torch.set_num_threads(threads)
    layers = list(_copies(sizes, _module))
    return _torch_chain(layers, sizes, torch.bfloat16), sum(2 * n * k for _, n, k in sizes), torch.__version__


def _int8pack(sizes: Matrices, threads: int) -> tuple[Callable, int, str]:
    """torch's own int8 weights with a scale per row."""
    import torch

    torch.set_num_threads(threads)

    def make(n: int, k: int) -> Any:
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        return codes, torch.full((n,), k**-0.5 / 74, dtype=torch.bfloat16)

    def linear(codes: Any, scales: Any) -> Callable:
        return lambda x: torch._weight_int8pack_mm(x.contiguous(), codes, scales)

    layers = [linear(*pair) for pair in _copies(sizes, make)]
    size = sum(n * k + 2 * n for _, n, k in sizes)
    return _torch_chain(layers, sizes, torch.bfloat16), size, torch.__version__


def _torchao(
    sizes: Matrices, threads: int, config: Any, bits: float, compiled: bool
) -> tuple[Callable, int, str]:
    import torch
    import torchao

    torch.set_num_threads(threads)
    layers: list[Any] = list(_copies(sizes, lambda n, k: _module(n, k, config)))
    if compiled:
        layers = [torch.compile(layer) for layer in layers]
    size = int(sum(n * k for _, n, k in sizes) * bits / 8)
    return _torch_chain(layers, sizes, torch.bfloat16), size, torchao.__version__


def _torchao_int4(sizes: Matrices, threads: int) -> tuple[Callable, int, str]:
    """16-bit activations, 4-bit weights; scale and zero point in bf16 per group."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    config = PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    return _torchao(sizes, threads, config, 4 + 32 / GROUP, compiled=False)


def _torchao_int8(sizes: Matrices, threads: int) -> tuple[Callable, int, str]:
    """Compiled, since eager mode dequantises the whole matrix at every call."""
    from torchao.quantization import Int8WeightOnlyConfig

    return _torchao(sizes, threads, Int8WeightOnlyConfig(), 8, compiled=True)


def _onnx(sizes: Matrices, threads: int, bits: int) -> tuple[Callable, int, str]:
    """MatMulNBits, blocks of GROUP, accuracy level 4 (int8 activations)."""
    import onnxruntime

    size = sum(n * k * bits // 8 + n * k // GROUP * 4 for _, n, k in sizes)
    if size >= 2**31:
        raise PeerError(f"{size / 1e9:.1f} GB do not fit in one ONNX message (2 GiB)")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    session = onnxruntime.InferenceSession(_onnx_model(sizes, bits), options, ["CPUExecutionProvider"])

    def run(x: np.ndarray) -> float:
        began = time.perf_counter()
        session.run(None, {"x": x})
        return time.perf_counter() - began

    return run, size, onnxruntime.__version__


def _onnx_model(sizes: Matrices, bits: int) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, x, middle = [], "x", 1 << (bits - 1)
    constants = {name: np.array([value], np.int64) for name, value in (("0", 0), ("-1", -1), ("1", 1))}
    constants["end"] = np.array([2**31 - 1], np.int64)
    for i, (name, n, k) in enumerate(sizes):
        axis, start, stop = ("1", "0", f"{k}") if i < len(sizes) - 1 else ("0", "-1", "end")
        constants.setdefault(stop, np.array([k], np.int64))
        nodes.append(helper.make_node("Slice", [x, start, stop, axis], [f"{name}.in"]))
        spread = middle / 3**0.5 * k**0.5
        constants[f"{name}.b"] = rng.integers(0, 256, (n, k // GROUP, GROUP * bits // 8), dtype=np.uint8)
        constants[f"{name}.s"] = np.full(n * k // GROUP, 1 / spread, np.float32)
        inputs = [f"{name}.in", f"{name}.b", f"{name}.s"]
        more = {"K": k, "N": n, "bits": bits, "block_size": GROUP, "accuracy_level": 4}
        nodes.append(helper.make_node("MatMulNBits", inputs, [name], domain="com.microsoft", **more))
        x = name
    value = lambda name, width: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])  # noqa: E731
    graph = helper.make_graph(
        nodes, "linears", [value("x", sizes[0][2])], [value(x, sizes[-1][1])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


KINDS: dict[str, Callable[[Matrices, int], tuple[Callable, int, str]]] = {
    "torch bf16": _bf16,
    "torch int8": _int8pack,
    "torchao int4": _torchao_int4,
    "torchao int8": _torchao_int8,
    "onnxruntime 4-bit": lambda sizes, threads: _onnx(sizes, threads, 4),
    "onnxruntime 8-bit": lambda sizes, threads: _onnx(sizes, threads, 8),
}


class LinearsPeer(Peer):
    """One runtime's linears in a child of its own: `prefill` and `decode` of `bench.peers.worker.Peer`."""

    def __init__(self, kind: str, shape: Shape, threads: int = 2, python: str = sys.executable) -> None:
        if kind not in KINDS:
            raise PeerError(f"kind {kind} is not one of {', '.join(KINDS)}")
        super().__init__("torch_peers", LinearsOptions(kind, shape, threads), python)


def main() -> None:
    """Every kind at one shape; a kind that does not install or work says why."""
    parser = argparse.ArgumentParser(description="Linears only, random weights")
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for kind in options.kinds:
        try:
            with LinearsPeer(kind, SHAPES[options.shape], options.threads) as peer:
                peer.decode(3, 0)
                ms, prompt = statistics.median(peer.decode(15, 0)), 512 / peer.prefill(512)
                bits, read = peer.info["bits_per_weight"], peer.info["bytes"] / ms / 1e6
                print(
                    f"{kind:18} {bits:5.2f} bits  pp512 {prompt:6.1f}/s  {1e3 / ms:5.1f}/s  {read:5.1f} GB/s",
                    flush=True,
                )
        except PeerError as error:
            print(f"{kind:18} {error}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        serve(lambda o: Linears(LinearsOptions(o["kind"], Shape(**o["shape"]), o["threads"])))
    else:
        main()
