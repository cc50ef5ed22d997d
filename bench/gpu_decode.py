"""A whole decode step on a GPU, and what there is in it beside reading weights.

Limits measured on random weights at the 8B shape, every step one CUDA graph, medians of interleaved replays: (1) the
step at fixed widths of mean 3.5 bits behind 1024 tokens against the fp16 step under the same kind of graph, and as a
share of what reading its bytes would take; (2) one width after another; (3) choosing widths by our rule and by DP-LLM's
estimators against replaying the same widths; (4) behind 32768 tokens with all pairs and with 0.3 of them kept.

    python bench/gpu_decode.py
    python bench/gpu_decode.py --dry-run      through Triton's interpreter, small: shows that it works
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gpu_common import DEVICE, DRY, finish, interleaved, percentile, read_gb_per_s, require_gpu  # isort: skip

import statistics

import torch

from dpllm.decoder import Decoder, Group, Layer
from dpllm.dp_policy import DPLLMPolicy
from dpllm.gpu_step import GpuStep
from dpllm.kernels.backend import choose_backend
from dpllm.kernels.errors import InputError
from dpllm.kernels.triton import step_operations
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.loading import LoadOptions
from dpllm.policy import PrecisionPolicy, StaticPolicy
from dpllm.shapes import random_decoder, shape

CONTEXT, LONG = (5, 20) if DRY else (1024, 32768)
KEPT = 0.3
WIDTHS = (3, 4) if DRY else (2, 3, 4, 5, 6)
DTYPE = torch.float32 if DRY else torch.float16
K = 2 if DRY else 64  # rows of DP-LLM's projections


def config() -> Any:
    """The 8B shape; one small layer in a dry run."""
    c = shape("tiny" if DRY else "8B")
    layers = 1 if DRY else c.num_layers
    return replace(
        c, num_layers=layers, windows=c.windows[:layers], uses_rope=c.uses_rope[:layers],
        vocab_size=200 if DRY else c.vocab_size,
    )  # fmt: skip


def options() -> LoadOptions:
    try:
        choose_backend("triton", DEVICE)
        name = "triton"
    except InputError:
        name = "reference"
    return LoadOptions(backend=name, device=str(DEVICE), dtype=DTYPE, kv_dtype=DTYPE)


def dense_decoder() -> Decoder:
    """The same shape in fp16, matrices fused alike."""
    c, where = config(), {"device": DEVICE, "dtype": DTYPE}
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def group(rows: int, columns: int) -> Group:
        return Group("dense", torch.randn(rows, columns, **where) * columns**-0.5, None)

    ones = torch.ones(c.hidden_size, **where)
    layers = [
        Layer(
            i, ones, ones, [group(heads + 2 * kv, c.hidden_size)], group(c.hidden_size, heads),
            [group(2 * c.intermediate_size, c.hidden_size)], group(c.hidden_size, c.intermediate_size),
        )
        for i in range(c.num_layers)
    ]  # fmt: skip
    table = torch.randn(c.vocab_size, c.hidden_size, **where)
    return Decoder(c, choose_backend("reference", DEVICE), layers, table, ones, table, DTYPE, DTYPE)


class Rule:
    """Reads our rule's diagonals and thresholds for every group, and always chooses the given widths."""

    name, extra_bytes = "rule", 0

    def __init__(self, decoder: Decoder, bits: list[int]):
        self.diagonals = [
            torch.rand(columns, device=DEVICE).half() for columns in map(columns_of, decoder.groups)
        ]
        steps = max(g.resident_bits - g.seed_bits for g in decoder.groups)
        rows = [
            [-1.0 if s < b - g.seed_bits else torch.inf for s in range(steps)]
            for b, g in zip(bits, decoder.groups, strict=True)
        ]
        self.thresholds = torch.tensor(rows, device=DEVICE)

    def __call__(self, group: Group, x: torch.Tensor) -> torch.Tensor:
        square = (x.float() ** 2) @ self.diagonals[group.index].float()
        return group.seed_bits + (square[:, None] > self.thresholds[group.index]).sum(1, dtype=torch.int32)


def columns_of(group: Group) -> int:
    """Columns of a group's matrix: of what the shape says, by its name."""
    c = config()
    name = group.name.rpartition(".")[2]
    return {"o": c.num_heads * c.head_dim, "down": c.intermediate_size}.get(name, c.hidden_size)


def estimating(decoder: Decoder, bits: list[int]) -> DPLLMPolicy:
    """DP-LLM's rule with a projection for every group, each read for every token, always choosing the given widths."""
    policy = object.__new__(DPLLMPolicy)  # no calibration behind it
    policy.name, policy.exact, policy.low = "dp-llm", False, bits
    policy.fixed = [False] * len(bits)
    policy.source = list(range(len(bits)))
    policy.thresholds, policy.lines = [float("inf")] * len(bits), [[0.0, 0.0]] * len(bits)
    policy.projections = [torch.randn(K, columns_of(g), device=DEVICE).half() for g in decoder.groups]
    return policy


def mixed(decoder: Decoder) -> list[int]:
    """Three and four bits in turn by layer: 3.5 on average."""
    per_layer = len(decoder.groups) // decoder.config.num_layers
    return [3 + (g.index // per_layer) % 2 for g in decoder.groups]


def full_cache(decoder: Decoder, tokens: int) -> KVCache:
    cache = decoder.new_cache(tokens + 1)
    cache.advance(tokens)
    return cache


def pruned_cache(decoder: Decoder, tokens: int) -> KVCache:
    """KEPT of the pairs, the heads keeping unlike numbers of them."""
    cache, c = decoder.new_ragged_cache(tokens + 1), decoder.config
    for pairs in (*cache.k, *cache.v):
        pairs.normal_()
    cache.advance(tokens)
    share = torch.linspace(0.4, 1.6, c.num_kv_heads, device=DEVICE)[None, :, None] * KEPT
    keep = torch.rand(c.num_layers, c.num_kv_heads, tokens, device=DEVICE) < share
    cache.prune(keep, c.windows)
    return cache


def replaying(decoder: Decoder, policy: PrecisionPolicy | None, cache: KVCache) -> Callable[[], Any]:
    """The captured step behind this cache: each replay decodes the same token anew and moves nothing."""
    ready = DRY or policy is None or decoder.backend.name.startswith("triton")
    step = GpuStep(decoder, step_operations, "" if ready else "products cannot be captured")
    step(1, cache, policy)
    cache.rewind(cache.length - 1)
    graph = step.graphs.get(step._policy.structure)
    if graph is not None:
        return lambda held=(step, cache): graph.replay()
    if not DRY:
        print(f"not one graph: {step.reason}")

    def run() -> None:
        step(1, cache, policy)
        cache.rewind(cache.length - 1)

    return run


def weight_bytes(decoder: Decoder, bits: list[int] | None) -> int:
    """Bytes of weights that a step reads."""
    if bits is None:
        return sum(g.weight.nbytes for g in decoder.groups) + decoder.head_bytes()
    read = sum(g.bytes_at[b - g.seed_bits] for b, g in zip(bits, decoder.groups, strict=True))
    return read + decoder.head_bytes()


def main() -> None:
    require_gpu()
    torch.manual_seed(0)
    with torch.no_grad():
        rows, facts = measured()
    finish("gpu_decode", rows, **facts)


def measured() -> tuple[list[dict], dict[str, Any]]:
    """Everything: rows, and facts of the run."""
    roofline = read_gb_per_s()
    quantised, plain = random_decoder(config(), 4 if DRY else 6, options()), dense_decoder()
    bits, cache = mixed(quantised), full_cache(quantised, CONTEXT)
    estimators = estimating(quantised, bits)
    runs: dict[str, tuple[Callable[[], Any], int]] = {}

    def add(
        name: str, decoder: Decoder, policy: Any, cache: KVCache, bits: list[int] | None, more: int = 0
    ) -> None:
        nbytes = weight_bytes(decoder, bits) + cache.nbytes + more
        runs[name] = replaying(decoder, policy, cache), nbytes

    add("fp16", plain, None, full_cache(plain, CONTEXT), None)
    add("3.5 bits, fixed", quantised, StaticPolicy(bits), cache, bits)
    rule = Rule(quantised, bits)
    add(
        "3.5 bits, rate-distortion's selection",
        quantised,
        rule,
        cache,
        bits,
        sum(d.nbytes for d in rule.diagonals),
    )
    read = sum(p.nbytes for p in estimators.projections if p is not None)
    add("3.5 bits, DP-LLM's estimators", quantised, estimators, cache, bits, read)
    for b in WIDTHS:
        same = [b] * len(bits)
        add(f"{b} bits", quantised, StaticPolicy(same), cache, same)
    add(
        f"3.5 bits behind {LONG}, all pairs", quantised, StaticPolicy(bits), full_cache(quantised, LONG), bits
    )
    add(
        f"3.5 bits behind {LONG}, {KEPT} kept",
        quantised,
        StaticPolicy(bits),
        pruned_cache(quantised, LONG),
        bits,
    )
    times = interleaved({name: run for name, (run, _) in runs.items()})
    facts = {"read_gb_per_s": roofline, "context": CONTEXT, "backend": quantised.backend.name}
    return [as_row(name, times, nbytes, roofline) for name, (_, nbytes) in runs.items()], facts


def as_row(name: str, times: dict[str, list[float]], nbytes: int, roofline: float) -> dict[str, Any]:
    own = times[name]

    def against(other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(own, times[other], strict=True)), 4)

    middle = statistics.median(own)
    return {
        "what": name, "ms_p50": round(middle, 4), "ms_p90": round(percentile(own, 0.9), 4),
        "gb": round(nbytes / 1e9, 4),
        "of_byte_limit": round(nbytes / roofline / 1e6 / middle, 4), "time_of_fp16": against("fp16"),
        "time_of_fixed": against("3.5 bits, fixed"),
    }  # fmt: skip


if __name__ == "__main__":
    main()
