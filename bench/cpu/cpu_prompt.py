"""Prompts on a CPU: the products of one layer with many tokens at once.

Limit measured: 10^9 multiplications and additions a second of a layer of the 1.1B shape, random weights, for prompts of
several lengths at several resident widths; beside dequantising the matrix natively and leaving the product to torch,
and beside torch's product with the float32 matrix as it is, for comparison. One thread each, in turns. Then tokens a
second of whole prompts, all layers and attention included.

    python -m bench.cpu.cpu_prompt
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F

from bench.common.report import arguments, begin
from bench.cpu.cpu_attention import in_turns
from dpllm.commands.bench import read_prompt
from dpllm.kernels.backend import Backend, choose_backend
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.model.loading import LoadOptions
from dpllm.model.random_models import random_decoder, shape

NAME, WIDTHS, TOKENS, ROUNDS = "1.1B", (3, 4, 6), (1, 4, 16, 64, 512), 3
OPTIONS = CpuOptions(threads=1)


def products(native: Backend, width: int) -> list[dict[str, Any]]:
    """A row for each length of a prompt."""
    options = LoadOptions(backend=native.name, cpu=OPTIONS)
    decoder = random_decoder(shape(NAME), width, options)
    layer, rows = decoder.layers[0], []
    matrices = [g.weight for g in (*layer.qkv, layer.o, *layer.gate_up, layer.down)]
    dense = [native.dequantize(w, width, torch.float32) for w in matrices]
    for tokens in TOKENS:
        inputs = [torch.randn(tokens, d.shape[1]) for d in dense]
        pairs = list(zip(inputs, matrices, dense, strict=True))
        rate = in_turns(
            {
                "ours": lambda pairs=pairs: [native.matmul(x, w) for x, w, _ in pairs],
                "dequantised": lambda pairs=pairs: [
                    F.linear(x, native.dequantize(w, width, torch.float32)) for x, w, _ in pairs
                ],
                "float32": lambda pairs=pairs: [F.linear(x, d) for x, _, d in pairs],
            },
            2.0 * tokens * sum(d.numel() for d in dense),
        )
        seconds = [prompt_seconds(decoder, tokens) for _ in range(ROUNDS)]
        rows.append({
            "bits": width, "prompt": tokens, "gflops": rate["ours"], "dequantised_gflops": rate["dequantised"],
            "float32_gflops": rate["float32"], "of_float32": round(rate["ours"] / rate["float32"], 3),
            "seconds_p50": round(statistics.median(seconds), 4),
            "tokens_per_s": round(tokens / statistics.median(seconds), 1),
        })  # fmt: skip
    return rows


def prompt_seconds(decoder: Any, tokens: int) -> float:
    """Of a whole prompt."""
    cache = decoder.new_cache(tokens)
    began = time.perf_counter()
    with torch.no_grad():
        read_prompt(decoder, cache, tokens)
    return time.perf_counter() - began


def main() -> None:
    run = begin(arguments(__doc__).parse_args())
    torch.set_num_threads(1)
    native = choose_backend("cpu", options=OPTIONS)
    run.report(
        "cpu_prompt", [row for width in WIDTHS for row in products(native, width)], threads=1, shape=NAME,
        backend=native.name, measured_on="random weights at the 1.1B shape",
    )  # fmt: skip


if __name__ == "__main__":
    main()
