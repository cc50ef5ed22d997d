"""Decode and prefill against llama.cpp, side by side in one run, on random weights of one shape.

Limit measured: reading the weights. A decode step should take the time that memory needs for the planes it reads, so
the rows say how many bytes a token read, what fraction of a plain parallel read of a buffer of that size (measured
right before and after each stretch) that is, and the ratio to llama.cpp's better format of the same width.
Everything is included: embedding, norms, rope, selection (thresholds evaluated for every group), attention over a
512-token context, the head, greedy sampling. Machines change speed from second to second, so contestants take turns
in short stretches, in another order every round, and figures are medians over all rounds; ours alternates between two
copies of the model so that no cache flatters it. llama.cpp runs in a process of its own, asleep while it is not
measured (bench/peers/worker.py), in its best configuration: formats that it can repack at load run both ways and the
better one counts. The 8B shape has one copy and one way (repacked, the better one at 1.1B): more do not fit in 24 GiB.

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36 gguf
    python -m bench.cpu.cpu_vs_llama_cpp [--shape 1.1B] [--python OTHER_ENV/bin/python] [--threads 2] [--rounds 6]
    python -m bench.cpu.cpu_vs_llama_cpp --shape 8B --bits 4
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.common.report import arguments, begin
from bench.peers.gguf_random import CACHE, random_model
from bench.peers.llama_cpp_peer import REPACKED, LlamaCppPeer
from bench.peers.shapes import SHAPES as PEER_SHAPES
from bench.peers.torch_peers import KINDS, LinearsPeer
from bench.peers.worker import PeerError
from dpllm.calib.runtime.threshold_rule import ThresholdRule
from dpllm.commands.bench import read_prompt
from dpllm.decode.cpu_step import NativeStep
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.kernels.weight import empty_planes
from dpllm.model.decoder import Decoder, Group
from dpllm.model.loading import LoadOptions
from dpllm.model.random_models import random_decoder, shape
from dpllm.policies.base import PrecisionPolicy, TextPolicy
from dpllm.policies.fixed import StaticPolicy

RIVALS = {
    2: ("Q2_K",),
    3: ("Q2_K", "Q3_K_M"),
    4: ("Q4_0", "Q4_K_M"),
    5: ("Q5_K_M",),
    6: ("Q6_K",),
    8: ("Q8_0",),
}
BARS = {
    3: 2.0,
    4: 1.25,
    5: 2.1,
    6: 1.6,
    8: 0.9,
}  # what we set out to reach, measured elsewhere on an AMX server
CONTEXT, PROMPT, STRETCH = 512, 512, 16
LARGE = ("8B",)  # shapes that memory holds once


class Thresholds(PrecisionPolicy, TextPolicy):
    """Selection as it runs: every group's weighted square against thresholds that give the wanted widths."""

    name = "thresholds"

    def __init__(self, decoder: Decoder, thresholds: torch.Tensor):
        diagonals = [torch.ones(g.weight.in_features, dtype=torch.float16) for g in decoder.groups]
        self.diagonals, self.limits = diagonals, thresholds
        self.rule, self.thresholds = ThresholdRule(diagonals, list(range(len(diagonals)))), thresholds

    def begin_text(self) -> TextPolicy:
        return self

    @classmethod
    def always(cls, decoder: Decoder, bits: int) -> Thresholds:
        """Chooses this width whatever the input."""
        first = decoder.groups[0]
        limits = [-1.0 if b < bits else float("inf") for b in range(first.seed_bits, first.resident_bits)]
        return cls(decoder, torch.tensor([limits] * len(decoder.groups)))

    def __call__(self, group: Group, x: torch.Tensor) -> torch.Tensor:
        square = (x.float() ** 2) @ self.diagonals[group.index].float()
        return group.seed_bits + (square[:, None] > self.limits[group.index]).sum(1, dtype=torch.int32)


@dataclass
class Contestant:
    """Something that decodes: milliseconds per token for a stretch, and bits per weight that it reads."""

    name: str
    bits: int
    decode: Callable[[int], list[float]]
    bits_per_weight: float
    times: list[float] = field(default_factory=list)
    streams: list[float] = field(default_factory=list)  # GB/s just before and just after each stretch

    def figures(self) -> dict[str, float]:
        """Median, 90th percentile."""
        ordered = sorted(self.times)
        return {
            "p50": round(statistics.median(ordered), 3),
            "p90": round(ordered[int(0.9 * (len(ordered) - 1))], 3),
        }


def native_step(decoder: Decoder) -> NativeStep:
    """The step that is timed. This benchmark is of the native kernels only."""
    step = NativeStep.of(decoder)
    assert step is not None, "the native library is missing"
    return step


class Ours:
    """Copies of a random model, used in turn."""

    def __init__(self, name: str, planes: int, options: LoadOptions, copies: int):
        self.copies = [random_decoder(shape(name), planes, options, seed) for seed in range(copies)]
        self.steps = [native_step(d) for d in self.copies]
        self.caches = [d.new_cache(CONTEXT + 64) for d in self.copies]
        for d, cache in zip(self.copies, self.caches, strict=True):
            read_prompt(d, cache, CONTEXT)

    def decode(self, bits: int, tokens: int) -> list[float]:
        """Milliseconds per token at a width, greedy, after the context."""
        policies = [Thresholds.always(d, bits) for d in self.copies]
        times, token = [], 1
        for cache in self.caches:
            cache.rewind(CONTEXT)
        for i in range(tokens + 2):
            which = i % len(self.copies)
            self.steps[which].follow(policies[which])
            began = time.perf_counter()
            token = self.steps[which](token, self.caches[which], policies[which]).greedy
            times.append((time.perf_counter() - began) * 1e3)
        return times[2:]

    def prefill(self) -> float:
        """Tokens per second for a prompt."""
        cache = self.copies[0].new_cache(PROMPT)
        began = time.perf_counter()
        read_prompt(self.copies[0], cache, PROMPT)
        return PROMPT / (time.perf_counter() - began)

    def bytes_read(self, bits: int) -> int:
        """Per token, head and key-value pairs included."""
        d, c = self.copies[0], self.copies[0].config
        pairs = 2 * c.num_layers * c.num_kv_heads * c.head_dim * d.kv_dtype.itemsize * CONTEXT
        return sum(g.bytes_at[bits - g.seed_bits] for g in d.groups) + d.head_bytes() + pairs

    def bits_per_weight(self, bits: int) -> float:
        """Of all matrices and the head."""
        d = self.copies[0]
        weights = sum(g.weights for g in d.groups) + d.head.values.numel()
        return 8 * (sum(g.bytes_at[bits - g.seed_bits] for g in d.groups) + d.head_bytes()) / weights

    def selection_overhead(self, rounds: int) -> dict[str, float]:
        """Steps that choose between widths against the same widths replayed, token by token in turns."""
        d, step, cache = self.copies[0], self.steps[0], self.caches[0]
        limits = torch.full((len(d.groups), d.groups[0].resident_bits - 2), float("inf"))
        limits[:, 0] = -1.0
        for g in (
            d.groups
        ):  # inputs are close to unit RMS after a norm; the exact share of each width does not matter
            limits[g.index, 1] = float(g.weight.in_features) * (1.0 if g.index % 4 in (0, 2) else 0.0)
        chooser, choosing, replaying, bits = Thresholds(d, limits), [], [], []
        for i in range(rounds):
            cache.rewind(CONTEXT)
            step.follow(chooser)
            began = time.perf_counter()
            stepped = step(i + 1, cache, chooser)
            choosing.append(time.perf_counter() - began)
            assert stepped.bits is not None
            replay = StaticPolicy(stepped.bits[0].tolist())
            bits.append(stepped.effective_bits)
            cache.rewind(CONTEXT)
            step.follow(replay)
            began = time.perf_counter()
            step(i + 1, cache, replay)
            replaying.append(time.perf_counter() - began)
        ratio = statistics.median(a / b for a, b in zip(choosing, replaying, strict=True))
        return {
            "overhead": round(ratio - 1, 4),
            "mean_bits": round(statistics.mean(bits), 2),
            "tokens": rounds,
        }


def rivals(args: argparse.Namespace, widths: list[int]) -> list[tuple[str, LlamaCppPeer, float]]:
    """Every llama.cpp format that competes, both ways where it can be repacked."""
    found = []
    for kind in dict.fromkeys(k for b in widths for k in RIVALS[b]):
        model = random_model(PEER_SHAPES[args.shape.lower()], kind, args.cache, python=args.python)
        ways = (True, False) if kind in REPACKED and args.shape not in LARGE else (True,)
        for repack in ways:
            peer = LlamaCppPeer(model.path, args.threads, python=args.python, repack=repack)
            label = kind if repack else f"{kind} as stored"
            found.append((label, peer, model.linear_bits_per_weight))
    return found


def compete(args: argparse.Namespace, widths: list[int]) -> tuple[list[dict], dict]:
    """All rounds; one row per width, and the facts that belong to no width."""
    options = LoadOptions(cpu=CpuOptions(threads=args.threads))
    copies = 1 if args.shape in LARGE else 2
    planes_of = {b: 8 if b > 6 else min(6, max(widths)) for b in widths}
    ours = {n: Ours(args.shape, n, options, copies) for n in sorted(set(planes_of.values()))}
    field_of = {b: ours[n] for b, n in planes_of.items()}
    peers = rivals(args, widths)
    entries = [
        Contestant("dpllm", b, lambda n, b=b: field_of[b].decode(b, n), field_of[b].bits_per_weight(b))
        for b in widths
    ]
    entries += [Contestant(n, 0, lambda k, p=p: p.decode(k, CONTEXT), bpw) for n, p, bpw in peers]
    prefills: dict[str, list[float]] = {}
    memory = empty_planes((1, 1, 1 << 28)).fill_(1)
    cpu = next(iter(ours.values())).copies[0].backend.cpu
    assert cpu is not None
    order = random.Random(0)
    for r in range(args.rounds):
        for entry in order.sample(entries, len(entries)):
            before = cpu.read_bandwidth(memory) / 1e9
            entry.times += entry.decode(STRETCH)
            entry.streams += [before, cpu.read_bandwidth(memory) / 1e9]
        prefills.setdefault("dpllm", []).append(ours[min(ours)].prefill())
        for name, peer, _ in order.sample(peers, len(peers)):
            prefills.setdefault(name, []).append(PROMPT / peer.prefill(PROMPT))
        print(f"round {r + 1} of {args.rounds}", flush=True)
    for _, peer, _ in peers:
        peer.close()
    streams = [s for e in entries for s in e.streams]
    rows = [row(e, entries, field_of[e.bits]) for e in entries if e.name == "dpllm"]
    best = max((statistics.median(v), k) for k, v in prefills.items() if k != "dpllm")
    mine = statistics.median(prefills["dpllm"])
    facts = {
        "stream_gb_per_s": round(statistics.median(streams), 2),
        "stream_range": [round(min(streams), 1), round(max(streams), 1)],
        "prefill_512": {
            "dpllm": round(mine, 1), "best_peer": best[1], "peer": round(best[0], 1), "ratio": round(mine / best[0], 3),
            "all": {k: round(statistics.median(v), 1) for k, v in prefills.items()}, "bar": 2.5,
        },
        "decode_all_ms": {f"{e.name} {e.bits or ''}".strip(): e.figures() for e in entries},
        "selection": ours[min(ours)].selection_overhead(48),
    }  # fmt: skip
    by_bits = {e.bits: statistics.median(e.times) for e in entries if e.name == "dpllm"}
    if {3, 6} <= set(by_bits):
        facts["time_of_3_bits_over_6"] = round(by_bits[3] / by_bits[6], 3)
    return rows, facts


def linears_only(args: argparse.Namespace) -> dict[str, float | str]:
    """Milliseconds for all matrices and the head alone, one row, in torch, torchao and onnxruntime; or why not."""
    found: dict[str, float | str] = {}
    for kind in KINDS:
        try:
            with LinearsPeer(kind, PEER_SHAPES[args.shape.lower()], args.threads, args.python) as peer:
                found[kind] = round(statistics.median(peer.decode(STRETCH, 0)), 2)
        except PeerError as e:
            found[kind] = str(e)
        print(kind, found[kind], flush=True)
    return found


def row(entry: Contestant, entries: list[Contestant], ours: Ours) -> dict:
    """One width against the better of its rivals."""
    names = tuple(n for kind in RIVALS[entry.bits] for n in (kind, f"{kind} as stored"))
    against = min((e for e in entries if e.name in names), key=lambda e: statistics.median(e.times))
    mine, other = entry.figures(), against.figures()
    rate = ours.bytes_read(entry.bits) / mine["p50"] / 1e6
    stream = statistics.median(entry.streams)
    return {
        "bits": entry.bits, "bits_per_weight": round(entry.bits_per_weight, 3), "ms_p50": mine["p50"],
        "ms_p90": mine["p90"], "tokens_per_s": round(1e3 / mine["p50"], 1), "gb_per_s": round(rate, 2),
        "stream_fraction": round(rate / stream, 3), "llama_cpp": against.name,
        "its_bits_per_weight": round(against.bits_per_weight, 3), "its_ms_p50": other["p50"],
        "its_ms_p90": other["p90"],
        "ratio": round(other["p50"] / mine["p50"], 3), "bar": BARS.get(entry.bits),
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="1.1B", choices=("1.1B", "8B"))
    parser.add_argument("--bits", default="2,3,4,5,6,8")
    parser.add_argument(
        "--python", default=None, help="interpreter that has llama-cpp-python; default: this one"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the GGUF files are kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only-llama-cpp", action="store_true", help="leave out torch, torchao, onnxruntime")
    args = parser.parse_args()
    run = begin(args)
    args.python = args.python or sys.executable
    rows, facts = compete(args, [int(b) for b in args.bits.split(",")])
    if not args.only_llama_cpp:
        facts["other_runtimes_linears_only_ms"] = linears_only(args)
    name = "cpu_vs_llama_cpp" + ("" if args.shape == "1.1B" else f"_{args.shape.lower()}")
    run.report(
        name, rows, measured_on=f"random weights at the {args.shape} shape", threads=args.threads, **facts
    )


if __name__ == "__main__":
    main()
