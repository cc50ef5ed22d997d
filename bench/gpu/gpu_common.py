"""What the GPU benchmarks share: contenders that take turns, buffers too large for the L2 cache, a measured roofline.

Imported before anything of triton: with --dry-run it is told to interpret, and everything runs on the CPU on small
shapes, our kernels included, to show that the script works. A dry run's rows name the kernels that were interpreted;
its times say nothing and are not written to bench/results.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl

from bench.common.report import Run, begin, instruction_set
from dpllm.base.errors import InputError
from dpllm.diagnostics import gpu as gpu_info
from dpllm.kernels.backend import Backend, choose_backend

DEVICE = torch.device("cpu" if DRY else "cuda")
ROUNDS = 40
L2_TIMES = 4  # buffers are rotated over at least so many times the L2
LAUNCHED: dict[str, str] = {}  # in a dry run: contender -> the kernels that it had interpreted


def require_gpu() -> None:
    """Ends the script with one line where it cannot measure."""
    if DRY:
        return
    if not torch.cuda.is_available():
        sys.exit(
            "no CUDA device: run this on a machine with one, or give --dry-run to see that the script works."
        )
    try:
        choose_backend("triton", DEVICE)
    except InputError as e:
        sys.exit(str(e))


def our_backend() -> Backend:
    """Our Triton kernels: as an engine has them, and in a dry run the same functions on the CPU, interpreted."""
    if not DRY:
        return choose_backend("triton", DEVICE)
    from dpllm.kernels.triton import attention, products, select

    products.WARPS = 128  # an interpreted program takes its time whatever its rows
    return replace(
        choose_backend("reference"), name="triton", reason="interpreted", prepare=products.prepare, gemv=products.gemv,
        matmul=products.matmul, dequantize=products.dequantize, int8_linear=products.int8_linear,
        select=select.select, decode_attention=attention.decode_attention,
    )  # fmt: skip


def copies_for(nbytes: int) -> int:
    """How many buffers of this size exceed the L2 cache by far."""
    if DRY:
        return 1
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20
    return max(2, -(-L2_TIMES * l2 // nbytes))


@dataclass
class Contender:
    """Something timed. calls: the same work on one buffer after another; nbytes: what one of them reads at least."""

    name: str
    calls: Sequence[Callable[[], Any]]
    nbytes: int
    bits: float = 0.0
    note: str | None = None


def captured(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """All of the calls as one CUDA graph. Each is made once before: what compiles or tunes itself does so then."""
    if DRY:
        return lambda: [call() for call in calls]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def milliseconds(run: Callable[[], Any]) -> float:
    """One run, on the device's own clock."""
    if DRY:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended)


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int = ROUNDS,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each, in turns, after two rounds of warm-up. before: what is done before a run, and not timed."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for r in range(1 if DRY else rounds + 2):
        for name, run in runs.items():
            if before and name in before:
                before[name]()
            ms = interpreted(name, run) if DRY else milliseconds(run)
            if r >= 2 or DRY:
                times[name].append(ms)
    return times


def interpreted(name: str, run: Callable[[], Any]) -> float:
    """Milliseconds of one run, whose kernels LAUNCHED names."""
    from triton.runtime.interpreter import InterpretedFunction

    seen: set[str] = set()
    launch = InterpretedFunction.run

    def noting(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add(kernel.__name__)
        return launch(kernel, *args, **kwargs)

    with patch.object(InterpretedFunction, "run", noting):
        ms = milliseconds(run)
    LAUNCHED[name] = " ".join(sorted(seen))
    return ms


def compare(what: str, contenders: Sequence[Contender], baseline: str, limit_gb_per_s: float) -> list[dict]:
    """A row for each: median and 90th percentile of a call, bandwidth, how many times faster than the baseline."""
    runs, gone = {}, {}
    for c in contenders:
        try:
            runs[c.name] = captured(c.calls)
        except Exception as e:  # one contender that does not capture must not end the others
            gone[c.name] = " ".join(str(e).split())[:120]
    times = interleaved(runs)
    rows = []
    for c in contenders:
        if c.name in gone:
            rows.append(row(what, c.name, bits=c.bits, note=gone[c.name]))
            continue
        each = [t / len(c.calls) for t in times[c.name]]
        base = [
            t / len(next(b for b in contenders if b.name == baseline).calls) for t in times.get(baseline, [])
        ]
        gb = c.nbytes / statistics.median(each) / 1e6
        rows.append(
            row(
                what, c.name, bits=c.bits, us_p50=1e3 * statistics.median(each), us_p90=1e3 * percentile(each, 0.9),
                gb_per_s=gb, of_roofline=gb / limit_gb_per_s,
                times_faster=statistics.median(b / t for b, t in zip(base, each, strict=True)) if base else None,
                note=LAUNCHED[c.name] or None if DRY else c.note,
            )
        )  # fmt: skip
    return rows


def row(what: str, name: str, **values: Any) -> dict[str, Any]:
    """A row of the schema, None where a value does not apply."""
    keys = ("bits", "us_p50", "us_p90", "gb_per_s", "of_roofline", "times_faster", "note")
    numbers = {k: values.get(k) for k in keys}
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}
    return {"what": what, "kernel": name, **rounded}


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@triton.jit
def read_kernel(source_ptr, out_ptr, each, B: tl.constexpr):
    """Program p reads `each` blocks of B words and keeps one number of them."""
    p = tl.program_id(0).to(tl.int64)
    total = tl.zeros([B], tl.int32)
    for i in range(each):
        total += tl.load(source_ptr + (p * each + i) * B + tl.arange(0, B))
    tl.store(out_ptr + p, tl.sum(total, 0))


def read_gb_per_s(nbytes: int = 2 << 30) -> float:
    """The roofline: what a kernel that only reads gets, GB/s. Median."""
    block, each = (64, 2) if DRY else (4096, 16)
    programs = 2 if DRY else nbytes // 4 // block // each
    source = torch.zeros(programs * each * block, dtype=torch.int32, device=DEVICE)
    out = torch.zeros(programs, dtype=torch.int32, device=DEVICE)
    runs = {"read": lambda: read_kernel[(programs,)](source, out, each, B=block, num_warps=8)}
    return source.nbytes / statistics.median(interleaved(runs, 20)["read"]) / 1e6


def begun(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Run]:
    """Parses the command line, to which it adds --dry-run, and begins a run where there is a GPU or a dry run."""
    parser.add_argument("--dry-run", action="store_true", help="small, through Triton's interpreter")
    args = parser.parse_args()
    require_gpu()
    return args, begin(args, writes=not DRY)


def finish(run: Run, bench: str, rows: list[dict], **facts: Any) -> None:
    """Reports, with the GPU's properties and its compute capability; a dry run prints the same and writes nothing."""
    gpu = gpu_info.describe() or {"name": "none: dry run through the interpreter"}
    name = gpu["name"].lower().replace("nvidia ", "").replace(" ", "-") if not DRY else "dry"
    run.report(
        bench, rows, device=name, hardware=gpu["name"], gpu=gpu, dry_run=DRY,
        instructions="none: dry run through the interpreter" if DRY else instruction_set("cuda"), **facts,
    )  # fmt: skip
