"""`dpllm bench`: tokens per second at each width, and the memory bandwidth in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dpllm.base.errors import InputError
from dpllm.base.progress import Progress
from dpllm.base.shell import command_line
from dpllm.commands.app import (
    COMMON,
    MACHINE,
    TARGETS,
    Accuracy,
    Backend,
    Command,
    Device,
    Json,
    Threads,
    app,
)
from dpllm.commands.common import Hardware, note, print_json, stage_bars, stdout, tell

if TYPE_CHECKING:
    import torch

    from dpllm.kvzip_bridge.cache import DenseKVCache
    from dpllm.model.decoder import Decoder

WARM_UP = 2
STREAM_BYTES = 1 << 30  # as large as a model, so that no cache holds it
USUAL_SHAPE = "1.1B"

Measured = Annotated[
    str | None,
    typer.Argument(
        metavar="OVERLAY", help="Overlay to measure. The default is --shape 1.1B.", show_default=False
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Measure this overlay or this shape.", rich_help_panel=COMMON),
]
Shape = Annotated[
    str | None,
    typer.Option(
        "--shape",
        help="Measure random weights of this shape: tiny, 1.1B, 3B or 8B. It needs no download, and neither bytes nor "
        "time depend on the weights.",
        rich_help_panel=COMMON,
    ),
]
Bits = Annotated[
    str,
    typer.Option("--bits", help="Measure these widths, separated by commas.", rich_help_panel=TARGETS),
]
PromptTokens = Annotated[
    int,
    typer.Option(
        "--prompt",
        help="Time the reading of a prompt of this number of tokens. 0 leaves it out.",
        rich_help_panel=COMMON,
    ),
]
NewTokens = Annotated[
    int,
    typer.Option(
        "--new-tokens", min=1, help="Decode this number of tokens at each width.", rich_help_panel=COMMON
    ),
]
CacheTokens = Annotated[
    int,
    typer.Option(
        "--context",
        min=0,
        help="Begin to decode with this number of tokens in the cache.",
        rich_help_panel=COMMON,
    ),
]
Pin = Annotated[
    bool, typer.Option("--pin", help="Keep each CPU thread on its core.", rich_help_panel=MACHINE)
]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is timed. prompt: tokens read at once (0: none). new_tokens: tokens decoded. context: tokens in the cache
    before them."""

    prompt: int
    new_tokens: int
    context: int

    @property
    def longest(self) -> int:
        """Positions that the model needs for it."""
        return max(self.prompt, self.context + self.new_tokens + WARM_UP)


@app.command(cls=Command)
def bench(
    *,
    overlay: Measured = None,
    model: Model = None,
    shape: Shape = None,
    prompt: PromptTokens = 512,
    new_tokens: NewTokens = 32,
    context: CacheTokens = 0,
    json: Json = False,
    bits: Bits = "3,4,6",
    device: Device = "cpu",
    threads: Threads = None,
    pin: Pin = False,
    backend: Backend = None,
    accuracy: Accuracy = "balanced",
) -> None:
    """Measure tokens per second at each width, and the memory bandwidth in the same run."""
    widths, name = widths_of(bits), model_of(overlay=overlay, model=model, shape=shape)
    load = Load(prompt=prompt, new_tokens=new_tokens, context=context)
    if prompt < 0:
        raise InputError(f"--prompt {prompt} is not possible; 0 leaves the prompt out.")
    hardware = Hardware(device=device, backend=backend, threads=threads, accuracy=accuracy, pin=pin)
    decoder, kind = open_model(name, widths, hardware, random=shape is not None)
    check_fit(decoder, name, widths, load)
    note(f"backend {decoder.backend.name}: {decoder.backend.reason}")
    with stage_bars() as progress:
        results, stream = measure(decoder, widths, load, progress)
    if json:
        facts = {"model": name, "measured_on": kind, "device": device, "context": context}
        print_json({"results": results, "stream_gb_per_s": stream} | facts | _kernels(decoder, accuracy))
        return
    stdout.print(_table(results))
    if stream is not None:
        tell(f"read bandwidth in the same run: {stream:.1f} GB/s ({kind})")


def widths_of(text: str) -> list[int]:
    """'3,4,6' -> [3, 4, 6]. Raises InputError for anything else."""
    try:
        return [int(b) for b in text.split(",")]
    except ValueError:
        raise InputError(f"--bits '{text}' is not a list of widths. Write, for example, 3,4,6.") from None


def model_of(*, overlay: str | None, model: str | None, shape: str | None) -> str:
    """The one model that was named. Raises InputError for more than one."""
    given = [name for name in (overlay, model, shape) if name is not None]
    if len(given) > 1:
        raise InputError("OVERLAY, --model and --shape all name what to measure: give one of them.")
    return given[0] if given else USUAL_SHAPE


def open_model(name: str, widths: list[int], hardware: Hardware, *, random: bool) -> tuple[Decoder, str]:
    """The decoder to measure, and a word about its weights. random: `name` is a shape, whatever lies there.

    Raises InputError for a name that is neither an overlay nor a shape, and for a shape too large for the memory.
    """
    from dpllm.model.loading import is_overlay, load_decoder
    from dpllm.model.memory import check_memory
    from dpllm.model.random_models import random_decoder, shape_resident_bytes
    from dpllm.model.random_models import shape as shape_of

    options = hardware.load_options()
    path = Path(name).expanduser()
    if path.is_dir() and not random:
        if not is_overlay(path):
            raise InputError(
                f"{path} is not quantised, so it has no widths to compare. "
                f"Run: {command_line('quantize', path, 'OUT')}"
            )
        return load_decoder(path, options), "overlay"
    config, widest = shape_of(name), max(widths)
    if not 2 <= widest <= 8:
        raise InputError(f"--bits {','.join(map(str, widths))}: a random model holds 2 to 8 planes.")
    check_memory(name, {b: shape_resident_bytes(config, b) for b in range(2, widest + 1)})
    note(f"making a model of shape {name} with {widest} random planes")
    return random_decoder(config, widest, options), "random weights"


def check_fit(decoder: Decoder, name: str, widths: list[int], load: Load) -> None:
    """Raises InputError for widths that the model does not hold, or more tokens than it has positions."""
    first = decoder.groups[0]
    if outside := [b for b in widths if not first.seed_bits <= b <= first.resident_bits]:
        raise InputError(
            f"{outside[0]} bits cannot be read: {name} holds {first.seed_bits}..{first.resident_bits} planes. "
            "Choose among them."
        )
    if load.longest > decoder.config.max_positions:
        raise InputError(
            f"{load.longest} tokens are more than the model's {decoder.config.max_positions} positions. "
            "Ask for fewer."
        )


def _kernels(decoder: Decoder, accuracy: str) -> dict[str, Any]:
    """The kernels that computed, their threads and their accuracy."""
    import torch

    cpu = decoder.backend.cpu
    return {
        "threads": cpu.handle.threads if cpu else torch.get_num_threads(), "backend": decoder.backend.name,
        "accuracy": accuracy if cpu else None,
    }  # fmt: skip


def measure(
    decoder: Decoder, widths: list[int], load: Load, progress: Progress
) -> tuple[list[dict[str, Any]], float | None]:
    """One row per width, and the read bandwidth in GB/s (None without the CPU kernels). All figures are medians.

    Widths take turns, and the bandwidth is measured between them.
    """
    from dpllm.decode.choose_step import StepMaker
    from dpllm.kernels.weight import empty_planes
    from dpllm.policies.fixed import StaticPolicy

    step = StepMaker(decoder).new()
    policies = {b: StaticPolicy([b] * len(decoder.groups), name="uniform") for b in widths}
    cache = decoder.new_cache(load.longest)
    prefill = None
    if load.prompt:
        progress("prefill", 0, 1)
        prefill = load.prompt / median_seconds(
            partial(read_prompt, decoder, cache, load.prompt), decoder.device
        )
        progress("prefill", 1, 1)
    times: dict[int, list[float]] = {b: [] for b in widths}
    streams: list[float] = []
    cpu = decoder.backend.cpu
    memory = empty_planes((1, 1, STREAM_BYTES // 4)).fill_(1)
    rounds = max(1, -(-load.new_tokens // 8))  # of eight tokens: machines change speed from second to second
    for r in range(rounds):
        for b in widths:
            cache.rewind(0)
            cache.advance(load.context)
            count = min(8, load.new_tokens - 8 * r) + WARM_UP
            decode = partial(step, 1, cache, policies[b])
            seconds = [timed(decode, decoder.device) for _ in range(count)]
            times[b] += seconds[WARM_UP:]
            if cpu is not None:
                streams.append(cpu.read_bandwidth(memory))
        progress("decode", r + 1, rounds)
    stream = statistics.median(streams) / 1e9 if streams else None
    return [_row(decoder, b, prefill, times[b], stream, load.context) for b in widths], stream


def _row(
    decoder: Decoder,
    bits: int,
    prefill: float | None,
    seconds: list[float],
    stream: float | None,
    context: int,
) -> dict[str, Any]:
    """The object of one width in `dpllm bench --json`. seconds: of each decoded token."""
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
    """Seconds that a call takes, with the work that it has started on a GPU."""
    import torch

    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call, after one to warm up."""
    return statistics.median([timed(work, device) for _ in range(4)][1:])


def read_prompt(decoder: Decoder, cache: DenseKVCache, tokens: int) -> None:
    """Reads a prompt of `tokens` tokens into an empty cache."""
    import torch

    cache.rewind(0)
    ids = torch.arange(tokens, device=decoder.device) % decoder.config.vocab_size
    with torch.no_grad():
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
