"""Attention of many queries on a CPU: what prompts, questions and the repetition of a context are read with.

Limit measured: multiply-adds per second and core of the native kernels, on random values at the heads of the 1.1B and
8B shapes, 512 tokens after caches of several lengths, beside torch's fused attention and, for the peaks that KVzip
scores with, the definition in kernels/reference.py; one thread each, in turns. A plain float32 matrix product is the
roof.

    python -m bench.cpu.cpu_attention
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from bench.common.report import arguments, begin
from dpllm.kernels import reference
from dpllm.kernels.backend import choose_backend
from dpllm.kernels.cpu.library import CpuOptions

TOKENS, HEADS, KV_HEADS, ROUNDS, CHUNK = 512, 32, 8, 7, 2048
CASES = (
    (64, 1024),
    (64, 4096),
    (64, 16384),
    (128, 1024),
    (128, 4096),
    (128, 16384),
)  # head size, tokens before


def in_turns(works: dict[str, Callable[[], object]], operations: float) -> dict[str, float]:
    """10^9 operations a second of each, medians."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(ROUNDS + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return {name: round(operations / statistics.median(s) / 1e9, 1) for name, s in seconds.items()}


def main() -> None:
    run = begin(arguments(__doc__).parse_args())
    torch.set_num_threads(1)
    native = choose_backend("cpu", options=CpuOptions(threads=1))
    square = torch.randn(2048, 2048)
    roof = in_turns({"product": lambda: square @ square}, 2 * 2048**3)["product"]
    rows = []
    for dim, before in CASES:
        total = before + TOKENS
        q = torch.randn(TOKENS, HEADS, dim)
        k, v = (torch.randn(KV_HEADS, total, dim).half() for _ in range(2))
        start, length = torch.arange(KV_HEADS) * total, torch.full((KV_HEADS,), total, dtype=torch.int32)
        flat, scale, chunk = (k.flatten(0, 1), v.flatten(0, 1)), dim**-0.5, slice(4, min(before, 4 + CHUNK))
        operations = 4.0 * HEADS * dim * TOKENS * (total - TOKENS / 2)
        attention = in_turns(
            {
                "native": lambda q=q, flat=flat, start=start, length=length, scale=scale: (
                    native.prompt_attention(q, *flat, start, length, scale)
                ),
                "torch": lambda q=q, k=k, v=v, scale=scale: reference.causal_attention(
                    q, k.float(), v.float(), scale, None
                ),
            },
            operations,
        )
        peaks = in_turns(
            {
                name: lambda kernels=kernels, q=q, k=k, chunk=chunk, scale=scale: kernels.attention_peaks(
                    q, k, chunk, scale
                )
                for name, kernels in (("native", native), ("torch", reference))
            },
            operations / 2,
        )
        rows.append(
            {
                "head_size": dim, "cache": before, "attention_native": attention["native"],
                "attention_torch": attention["torch"], "peaks_native": peaks["native"], "peaks_torch": peaks["torch"],
                "matrix_product": roof,
            }
        )  # fmt: skip
    run.report(
        "cpu_attention", rows, threads=1, unit="Gflop/s", backend=native.name,
        measured_on="random values at the heads of the 1.1B and 8B shapes",
    )  # fmt: skip


if __name__ == "__main__":
    main()
