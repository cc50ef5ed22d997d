"""`dpllm bench`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dpllm.base.errors import InputError
from dpllm.commands.common import Hardware, note, print_json, stage_bars, stdout
from dpllm.decode.choose_step import fast_step
from dpllm.decode.step import decode_one
from dpllm.kernels.weight import empty_planes
from dpllm.kvzip_bridge.cache import DenseKVCache
from dpllm.model.decoder import Decoder
from dpllm.model.loading import is_overlay, load_decoder
from dpllm.model.memory import check_memory
from dpllm.model.random_models import random_decoder, shape, shape_bytes
from dpllm.policies.fixed import StaticPolicy

WARM_UP = 2
STREAM_BYTES = 1 << 30  # as large as a model, so that no cache holds it


@dataclass(frozen=True)
class BenchArguments:
    """The command's arguments."""

    model: str
    bits: str
    prompt: int
    new_tokens: int
    context: int
    hardware: Hardware
    json: bool


def widths_of(text: str) -> list[int]:
    """'3,4,6' -> [3, 4, 6]."""
    try:
        return [int(b) for b in text.split(",")]
    except ValueError:
        raise InputError(f"--bits '{text}' is no list of widths. Write, for example, 3,4,6.") from None


def open_model(args: BenchArguments, widest: int) -> tuple[Decoder, str]:
    """The decoder to measure, and what it is."""
    options = args.hardware.load_options()
    path = Path(args.model).expanduser()
    if path.is_dir():
        if not is_overlay(path):
            raise InputError(
                f"{path} is not quantised, so it has no widths to compare. Run dpllm quantize first."
            )
        return load_decoder(path, options), "overlay"
    config = shape(args.model)
    if not 2 <= widest <= 8:
        raise InputError(f"--bits {args.bits}: a random model holds 2 to 8 planes.")
    check_memory(args.model, {b: shape_bytes(config, b) for b in range(2, widest + 1)})
    note(f"making a model of shape {args.model} with {widest} random planes")
    return random_decoder(config, widest, options), "random weights"


def run(args: BenchArguments) -> None:
    """Measures and prints a table or JSON."""
    widths = widths_of(args.bits)
    if args.prompt < 0:
        raise InputError(f"--prompt {args.prompt} is not possible; 0 leaves the prompt out.")
    decoder, kind = open_model(args, max(widths))
    first = decoder.groups[0]
    if outside := [b for b in widths if not first.seed_bits <= b <= first.resident_bits]:
        raise InputError(
            f"{outside[0]} bits cannot be read: {args.model} holds {first.seed_bits}..{first.resident_bits} planes."
        )
    longest = max(args.prompt, args.context + args.new_tokens + WARM_UP)
    if longest > decoder.config.max_positions:
        raise InputError(
            f"{longest} tokens are more than the model's {decoder.config.max_positions} positions."
        )
    note(f"backend {decoder.backend.name}: {decoder.backend.reason}")
    with stage_bars() as progress:
        results, stream = measure(decoder, widths, args, progress)
    report = {
        "results": results,
        "stream_gb_per_s": stream,
        "model": args.model,
        "measured_on": kind,
        "device": args.hardware.device,
        "threads": decoder.backend.cpu.handle.threads if decoder.backend.cpu else torch.get_num_threads(),
        "backend": decoder.backend.name,
        "accuracy": args.hardware.accuracy if decoder.backend.cpu else None,
        "context": args.context,
    }
    if args.json:
        print_json(report)
        return
    stdout.print(_table(results))
    if stream is not None:
        stdout.print(f"read bandwidth in the same run: {stream:.1f} GB/s ({kind})")


def measure(
    decoder: Decoder, widths: list[int], args: BenchArguments, progress: Callable[[str, int, int], None]
) -> tuple[list[dict[str, Any]], float | None]:
    """One row per width, widths taking turns; and the bandwidth, measured between them. Medians."""
    step = fast_step(decoder)
    policies = {b: StaticPolicy([b] * len(decoder.groups), name="uniform") for b in widths}
    cache = decoder.new_cache(max(args.prompt, args.context + args.new_tokens + WARM_UP))
    prefill = None
    if args.prompt:
        progress("prefill", 0, 1)
        prefill = args.prompt / median_seconds(
            partial(read_prompt, decoder, cache, args.prompt), decoder.device
        )
        progress("prefill", 1, 1)
    times: dict[int, list[float]] = {b: [] for b in widths}
    streams: list[float] = []
    cpu = decoder.backend.cpu
    memory = empty_planes((1, 1, STREAM_BYTES // 4)).fill_(1)
    rounds = max(
        1, -(-args.new_tokens // 8)
    )  # eight tokens at a time: machines change speed from second to second
    for r in range(rounds):
        for b in widths:
            cache.rewind(0)
            cache.advance(args.context)
            count = min(8, args.new_tokens - 8 * r) + WARM_UP
            decode = partial(decode_one, decoder, step, 1, cache, policies[b])
            seconds = [timed(decode, decoder.device) for _ in range(count)]
            times[b] += seconds[WARM_UP:]
            if cpu is not None:
                streams.append(cpu.read_bandwidth(memory))
        progress("decode", r + 1, rounds)
    stream = statistics.median(streams) / 1e9 if streams else None
    return [_row(decoder, b, prefill, times[b], stream, args.context) for b in widths], stream


def _row(
    decoder: Decoder,
    bits: int,
    prefill: float | None,
    seconds: list[float],
    stream: float | None,
    context: int,
) -> dict[str, Any]:
    c = decoder.config
    weights = sum(g.bytes_at[bits - g.seed_bits] for g in decoder.groups) + decoder.head_bytes()
    pairs = 2 * c.num_layers * c.num_kv_heads * c.head_dim * decoder.kv_dtype.itemsize
    nbytes = weights + pairs * (context + len(seconds) // 2)
    middle = statistics.median(seconds)
    return {
        "bits": bits,
        "prefill_tokens_per_s": None if prefill is None else round(prefill, 1),
        "decode_tokens_per_s": round(1 / middle, 2),
        "decode_ms": {
            "p50": round(middle * 1e3, 3),
            "p90": round(sorted(seconds)[int(0.9 * (len(seconds) - 1))] * 1e3, 3),
        },
        "bytes_per_token": nbytes,
        "gb_per_s": round(nbytes / middle / 1e9, 2),
        "stream_fraction": None if stream is None else round(nbytes / middle / 1e9 / stream, 3),
    }


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes, and what it has started on a GPU."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call, after one to warm up."""
    return statistics.median([timed(work, device) for _ in range(4)][1:])


@torch.no_grad()
def read_prompt(decoder: Decoder, cache: DenseKVCache, tokens: int) -> None:
    """Prefill of a prompt of so many tokens, from an empty cache."""
    cache.rewind(0)
    ids = torch.arange(tokens, device=decoder.device) % decoder.config.vocab_size
    for chunk in ids.split(512):
        decoder.forward(chunk, cache, last_only=True)


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(
        "bits", "prefill tok/s", "decode tok/s", "ms/token p50", "p90", "MB/token", "GB/s", "of bandwidth"
    )
    for r in results:
        table.add_row(
            str(r["bits"]),
            "-" if r["prefill_tokens_per_s"] is None else f"{r['prefill_tokens_per_s']:.0f}",
            f"{r['decode_tokens_per_s']:.1f}",
            f"{r['decode_ms']['p50']:.2f}",
            f"{r['decode_ms']['p90']:.2f}",
            f"{r['bytes_per_token'] / 1e6:.1f}",
            f"{r['gb_per_s']:.1f}",
            "-" if r["stream_fraction"] is None else f"{r['stream_fraction']:.0%}",
        )
    return table
