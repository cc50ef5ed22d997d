"""What pruning a KV cache saves: bytes really held, and time of decode attention; and what it costs to build.

Limits measured, on random keys, values and weights (no effect on bytes or time) at the 1.1B and 8B shapes: (1) bytes
held against the kept share of the whole cache, slack apart; (2) decode attention over all layers, pruned against
whole, interleaved; (3) appending a token, at every context length; (4) scoring a context by KVzip and pruning
it, against reading it just before, from one and two of the shape's layers (what a layer costs does not depend on how
many there are); (5) the most cache held meanwhile, slack included, and the process's peak, with two layers, pruned at
the end and block by block.

    python -m bench.kv.kv_memory_latency [--contexts 4096,16384,32768] [--build 4096,32768]
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from bench.common.report import arguments, begin
from dpllm.context.kv_context import KVContext
from dpllm.context.options import ContextOptions
from dpllm.context.pruner import Pruner
from dpllm.decode.prompting import Prompts
from dpllm.kvzip_bridge.attention import SINKS
from dpllm.kvzip_bridge.budget import Budget, over_all
from dpllm.kvzip_bridge.ragged_cache import SLACK, RaggedKVCache
from dpllm.model.config import ModelConfig
from dpllm.model.decoder import Decoder
from dpllm.model.loading import LoadOptions
from dpllm.model.memory import process_peak_bytes
from dpllm.model.random_models import random_decoder, shape

KEEP, ROUNDS, BLOCK = 0.3, 9, 2048
BLOCKED = 16384  # tokens of the longest context that is pruned block by block too


def filled(config: ModelConfig, tokens: int) -> RaggedKVCache:
    """A cache of random pairs."""
    cache = RaggedKVCache(
        config.num_layers, config.num_kv_heads, config.head_dim, tokens + SLACK, torch.float16
    )
    for t in (*cache.k, *cache.v):
        t.normal_()
    cache.advance(tokens)
    return cache


def uneven_mask(config: ModelConfig, tokens: int) -> torch.Tensor:
    """The best of random scores whose size differs between heads, as it does in real models."""
    rng = torch.Generator().manual_seed(0)
    size = torch.rand(config.num_layers, config.num_kv_heads, 1, generator=rng) + 0.2
    scores = size * torch.rand(config.num_layers, config.num_kv_heads, tokens, generator=rng)
    return over_all(scores, round(KEEP * scores.numel()))


def milliseconds(work: Callable[[], object]) -> float:
    """One call."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def attention_of(decoder: Decoder, cache: RaggedKVCache) -> Callable[[], None]:
    """Decode attention of one token in every layer."""
    c = decoder.config
    q = torch.randn(c.num_heads, c.head_dim)

    def work() -> None:
        start, length = cache.runs(1)
        for layer in range(c.num_layers):
            decoder.backend.decode_attention(
                q, cache.k[layer], cache.v[layer], start[layer], length[layer], 0.1
            )

    return work


def append_to(cache: RaggedKVCache, kv_heads: int, dim: int) -> Callable[[], None]:
    """One more token in every layer."""
    k = torch.randn(1, kv_heads, dim)

    def work() -> None:
        for layer in range(len(cache.k)):
            cache.write(layer, k, k)
        cache.advance(1)

    return work


def held_and_read(name: str, decoder: Decoder, tokens: int) -> dict:
    """Limits 1 to 3."""
    config = decoder.config
    whole, pruned = filled(config, tokens), filled(config, tokens)
    pruned.prune(uneven_mask(config, tokens), config.windows, SLACK)
    pair = 2 * config.head_dim * 2
    slack = config.num_layers * config.num_kv_heads * SLACK * pair
    expected = KEEP * whole.nbytes + slack
    works = {"whole": attention_of(decoder, whole), "pruned": attention_of(decoder, pruned)}
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(ROUNDS + 2):
        for kind, work in works.items():
            took = milliseconds(work)
            if i >= 2:
                times[kind].append(took)
    append = append_to(pruned, config.num_kv_heads, config.head_dim)
    appends = [milliseconds(append) for _ in range(64)]
    p90 = lambda values: round(sorted(values)[int(0.9 * len(values))], 3)  # noqa: E731
    middle = {kind: statistics.median(t) for kind, t in times.items()}
    return {
        "what": "held and read", "shape": name, "context": tokens, "kept": KEEP,
        "whole_mb": round(whole.nbytes / 1e6, 1),
        "held_mb": round(pruned.allocated_nbytes / 1e6, 1),
        "held_over_expected": round(pruned.allocated_nbytes / expected, 4),
        "whole_ms_p50": round(middle["whole"], 3), "whole_ms_p90": p90(times["whole"]),
        "pruned_ms_p50": round(middle["pruned"], 3), "pruned_ms_p90": p90(times["pruned"]),
        "ratio": round(middle["pruned"] / middle["whole"], 3), 
        "append_us_p50": round(statistics.median(appends) * 1e3, 1),
        "append_us_p90": round(p90(appends) * 1e3, 1),
    }  # fmt: skip


# -- building ----------------------------------------------------------------------------------------------------


class WatchedCache(RaggedKVCache):
    """Remembers how large its buffers were at most."""

    most = 0

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        super().write(layer, k, v)
        self.most = max(self.most, self.allocated_nbytes)


@dataclass(frozen=True)
class Built:
    """Seconds of reading and of scoring and pruning, MB of peak above what was held before, and the cache."""

    read: float
    prune: float
    peak: float
    cache: WatchedCache


def build(decoder: Decoder, ids: list[int], block: int) -> Built:
    """Reads ids and prunes them to KEEP, block by block."""
    prompts = Prompts(lambda text, **_: {"input_ids": [1] * 12}, decoder.config, Path("random"))
    before = reset_peak()
    c = decoder.config
    cache = WatchedCache(c.num_layers, c.num_kv_heads, c.head_dim, 0, decoder.kv_dtype)
    context = KVContext(cache, protected=SINKS)
    options = ContextOptions(Budget(keep_ratio=KEEP))
    pruner = Pruner(context, options, len(ids), decoder=decoder, prompts=prompts)
    share, read, prune = pruner.share(), 0.0, 0.0
    for start in range(0, len(ids), block):
        read += milliseconds(partial(pruner.read, ids[start : start + block]))
        room = pruner.room(block) if start + block < len(ids) else SLACK
        prune += milliseconds(partial(pruner.prune, share, room))
    return Built(read / 1e3, prune / 1e3, (process_peak_bytes() - before) / 1e6, cache)


def reset_peak() -> int:
    """Starts the process's peak of memory anew (Linux), and returns what it holds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return process_peak_bytes()


def of_layers(decoder: Decoder, layers: int) -> Decoder:
    """The decoder, cut to its first layers."""
    cut = copy(decoder)
    cut.layers = decoder.layers[:layers]
    cut.config = replace(
        decoder.config, num_layers=layers, windows=(None,) * layers, uses_rope=(True,) * layers
    )
    return cut


def built(name: str, decoder: Decoder, tokens: int) -> list[dict]:
    """Limits 4 and 5. decoder: of the shape's first two layers. After its attention the last layer is computed for one
    token only, so that the times of a whole model are those of one layer, and for each other what a second one adds."""
    ids = torch.randint(
        0, decoder.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    one, two = of_layers(decoder, 1), of_layers(decoder, 2)
    build(two, ids[:512], 512)  # to warm up
    rounds = [[build(d, ids, tokens) for d in (one, two)] for _ in range(3 if tokens <= 4096 else 1)]

    def seconds(part: Callable[[Built], float]) -> float:
        first, second = (statistics.median(part(builds[i]) for builds in rounds) for i in (0, 1))
        return first + (shape(name).num_layers - 1) * (second - first)

    read, prune = seconds(lambda b: b.read), seconds(lambda b: b.prune)
    whole = tokens * 2 * 2 * two.config.num_kv_heads * two.config.head_dim * 2

    def row(kind: str, of: Built, **times: float) -> dict:
        return {
            "what": f"build, {kind}", "shape": name, "context": tokens, "kept": KEEP, **times,
            "peak_mb": round(of.peak, 1), "whole_cache_mb": round(whole / 1e6, 1),
            "most_cache_over_whole": round(of.cache.most / whole, 3),
            "held_over_whole": round(of.cache.nbytes / whole, 4),
        }  # fmt: skip

    times = {"read_s": round(read, 2), "score_s": round(prune, 2), "score_over_read": round(prune / read, 2)}
    rows = [row("pruned once", rounds[0][1], **times)]
    if tokens <= BLOCKED:
        rows.append(row(f"blocks of {BLOCK}", build(two, ids, BLOCK)))
    return rows


def sizes(text: str) -> list[int]:
    """'4096,16384' -> [4096, 16384]."""
    return [int(n) for n in text.split(",") if n]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", default="1.1B,8B")
    parser.add_argument("--contexts", type=sizes, default=[4096, 16384, 32768])
    parser.add_argument("--build", type=sizes, default=[4096, 32768])
    args = parser.parse_args()
    run = begin(args)
    rows: list[dict] = []
    for name in args.shapes.split(","):
        config = shape(name)
        two = replace(config, num_layers=2, windows=(None,) * 2, uses_rope=(True,) * 2)
        decoder = random_decoder(two, 4, LoadOptions())
        for tokens in args.build:
            rows += built(name, decoder, tokens)
        decoder.config = config  # attention alone: no weights are needed
        rows += [held_and_read(name, decoder, tokens) for tokens in args.contexts]
    columns = list(dict.fromkeys(k for row in rows for k in row))
    run.report(
        "kv_memory_latency", [{c: row.get(c, "") for c in columns} for row in rows], threads=torch.get_num_threads(),
        measured_on="random weights, keys and values at the named shapes",
    )  # fmt: skip


if __name__ == "__main__":
    main()
