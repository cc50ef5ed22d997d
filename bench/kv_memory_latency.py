"""What pruning a KV cache saves: bytes really held, and time of decode attention; and what it costs to build.

Limits measured, on random keys, values and weights (no effect on bytes or time) at the 1.1B and 8B shapes: (1) bytes
held against the kept share of the whole cache, slack apart; (2) decode attention over all layers, pruned against
whole, interleaved; (3) appending a token, at every context length; (4) reading a context, scoring it by KVzip and
pruning it, against reading it, with two of the shape's layers (what a layer costs does not depend on how many there
are); (5) the most cache held meanwhile, pruned at the end and block by block.

    python bench/kv_memory_latency.py [--contexts 4096,16384,32768] [--build 4096,16384]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from report import report

from dpllm.config import ModelConfig
from dpllm.decoder import Decoder
from dpllm.kv_view import view_of
from dpllm.kvzip_bridge.budget import over_all
from dpllm.kvzip_bridge.policies import make_kv_policy
from dpllm.kvzip_bridge.policy import Context, RepeatPrompts
from dpllm.kvzip_bridge.ragged import RaggedKVCache
from dpllm.kvzip_bridge.recording import Queries
from dpllm.loading import LoadOptions
from dpllm.shapes import random_decoder, shape

KEEP, SLACK, ROUNDS, BLOCK = 0.3, 256, 9, 2048
PROMPTS = RepeatPrompts(tuple(range(12)), tuple(range(20)))


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


class Build:
    """Reads a context of random tokens, watching how much cache there is."""

    def __init__(self, decoder: Decoder, tokens: int):
        self.decoder, self.view = decoder, view_of(decoder)
        self.ids = torch.randint(
            0, decoder.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)
        )
        self.policy = make_kv_policy("kvzip")
        self.cache = decoder.new_ragged_cache(0)
        self.most = 0

    def read(self, ids: torch.Tensor, room: int = 0) -> None:
        """Prefill in pieces of 512."""
        self.cache.reserve(len(ids) + room)
        self.most = max(self.most, self.cache.allocated_nbytes)
        for piece in ids.split(512):
            self.view.forward(piece, self.cache)

    def prune(self, last: bool) -> None:
        """Scores what was read since the last pruning, and keeps its share."""
        queries = Queries(self.policy.wants, self.view)
        ids = self.ids[: self.cache.length]
        context = Context(ids, self.cache, self.cache.base, 4, queries, PROMPTS, self.view)
        scores = self.policy.score(context)
        self.most = max(self.most, self.cache.allocated_nbytes)
        keep = over_all(scores, round(KEEP * scores.numel()))
        self.cache.prune(keep, self.decoder.config.windows, SLACK if last else BLOCK + self.policy.scratch)


def built(name: str, decoder: Decoder, tokens: int) -> list[dict]:
    """Limits 4 and 5."""
    warm = Build(decoder, 512)
    warm.read(warm.ids)
    plain = Build(decoder, tokens)
    read_s = milliseconds(lambda: plain.read(plain.ids)) / 1e3
    rows = []
    for kind, block in (("pruned once", tokens), (f"blocks of {BLOCK}", BLOCK)):
        build = Build(decoder, tokens)

        def whole(build: Build = build, block: int = block) -> None:
            for piece in build.ids.split(block):
                build.read(piece, min(build.policy.scratch, len(piece) + 256))
                build.prune(build.cache.length == tokens)

        seconds = milliseconds(whole) / 1e3
        full = plain.cache.nbytes
        rows.append(
            {
                "what": f"build, {kind}", "shape": name, "layers": decoder.config.num_layers, "context": tokens,
                "kept": KEEP, "read_s": round(read_s, 2), "build_s": round(seconds, 2),
                "build_over_read": round(seconds / read_s, 2), "scoring_over_read": round(seconds / read_s - 1, 2),
                "most_cache_over_whole": round(build.most / full, 3), 
                "held_over_whole": round(build.cache.nbytes / full, 4),
            }
        )  # fmt: skip
    return rows


def sizes(text: str) -> list[int]:
    """'4096,16384' -> [4096, 16384]."""
    return [int(n) for n in text.split(",") if n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", default="1.1B,8B")
    parser.add_argument("--contexts", type=sizes, default=[4096, 16384, 32768])
    parser.add_argument("--build", type=sizes, default=[4096, 16384])
    args = parser.parse_args()
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
    report(
        "kv_memory_latency", [{c: row.get(c, "") for c in columns} for row in rows], threads=torch.get_num_threads(),
        measured_on="random weights, keys and values at the named shapes",
    )  # fmt: skip


if __name__ == "__main__":
    main()
