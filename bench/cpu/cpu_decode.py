"""What a decode step costs beside reading weights: the framework, the selection, the cache.

Limits measured, each as a ratio of interleaved medians on random weights (1.1B shape) or absolutely on the bundled
reference model: (1) tokens per second of `Engine.generate` on the 7 M reference model, everything included; (2) time
per token of a whole Python step around the native call, as a share of the call; (3) deciding widths against replaying
the same ones, by our rule and by DP-LLM's estimator; (4) growth with context: a step after 2048 tokens against one
after none, beside the bytes of keys and values that this adds.

    python -m bench.cpu.cpu_decode
"""

from __future__ import annotations

import statistics
import time

import torch

from bench.common.report import arguments, begin
from bench.cpu.cpu_vs_llama_cpp import Thresholds
from dpllm.decode.cpu_step import NativeStep
from dpllm.decode.options import GenerateOptions
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.kvzip_bridge.cache import DenseKVCache
from dpllm.model.decoder import Decoder, Group
from dpllm.model.loading import LoadOptions
from dpllm.model.random_models import random_decoder, shape
from dpllm.opening import open_engine
from dpllm.policies.base import PrecisionPolicy, TextPolicy
from dpllm.policies.fixed import StaticPolicy


def small_model() -> list[dict]:
    """Tokens per second on the reference model, through the engine, at one and two threads."""
    rows = []
    for threads in (1, 2):
        engine = open_engine(target_bits=3.5, options=LoadOptions(cpu=CpuOptions(threads=threads)))
        times = []
        for _ in range(5):
            steps = list(engine.generate_with("def main():\n", GenerateOptions(max_new_tokens=200)))
            times += [s.ms for s in steps[1:]]
        middle = statistics.median(times)
        rows.append(
            {
                "what": f"reference model, Engine.generate, {threads} threads", "measured_on": "reference model",
                "tokens_per_s": round(1e3 / middle, 1), "ms_p50": round(middle, 3),
                "ms_p90": round(sorted(times)[int(0.9 * len(times))], 3), "ratio": None,
            }
        )  # fmt: skip
    return rows


def step_ms(step: NativeStep, cache: DenseKVCache, policy: TextPolicy, context: int) -> float:
    """One step after this number of tokens."""
    cache.rewind(0)
    cache.advance(context)
    step.follow(policy)
    began = time.perf_counter()
    step(1, cache, policy)
    return (time.perf_counter() - began) * 1e3


def pair(name: str, a: list[float], b: list[float]) -> dict:
    """a against b, taken in turns."""
    return {
        "what": name, "measured_on": "random weights at the 1.1B shape", "tokens_per_s": None,
        "ms_p50": round(statistics.median(a), 3), "ms_p90": round(sorted(a)[int(0.9 * len(a))], 3),
        "ratio": round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 4),
    }  # fmt: skip


class Projections(PrecisionPolicy, TextPolicy):
    """DP-LLM's estimator with k = 64 as dpllm/policies/dp_llm.py computes it, one for each matrix, each time choosing 3
    bits."""

    name = "projections"

    def __init__(self, decoder: Decoder):
        matrices = {"qkv": 3, "gate_up": 2}
        self.of = [
            [
                torch.randn(64, g.weight.in_features).half()
                for _ in range(matrices.get(g.name.split(".")[-1], 1))
            ]
            for g in decoder.groups
        ]
        self.extra_bytes = sum(p.nbytes for own in self.of for p in own)

    def begin_text(self) -> TextPolicy:
        return self

    def __call__(self, group: Group, x: torch.Tensor) -> torch.Tensor:
        estimates = torch.stack([(x.float() @ p.float().T).norm(dim=1) for p in self.of[group.index]])
        return 3 + (estimates.amax(0) > float("inf")).to(torch.int32)


def large_model(rounds: int = 60) -> list[dict]:
    """Overheads at the 1.1B shape, three bits."""
    decoder = random_decoder(shape("1.1B"), 6)
    step, cache = NativeStep.of(decoder), decoder.new_cache(2100)
    assert step is not None
    fixed, chosen = StaticPolicy([3] * len(decoder.groups)), Thresholds.always(decoder, 3)
    paper = Projections(decoder)
    plain, choosing, estimating, long, native = [], [], [], [], []
    for _ in range(rounds):
        plain.append(step_ms(step, cache, fixed, 0))
        choosing.append(step_ms(step, cache, chosen, 0))
        estimating.append(step_ms(step, cache, paper, 0))
        long.append(step_ms(step, cache, fixed, 2048))
        native.append(native_ms(decoder, step, cache, fixed))
    return [
        pair("choosing widths / replaying them", choosing, plain),
        pair(f"DP-LLM's estimator, {paper.extra_bytes / 1e6:.0f} MB / replaying", estimating, plain),
        pair("whole Python step / native call", plain, native),
        pair("2048 tokens of context / none", long, plain),
    ]


def native_ms(decoder: Decoder, step: NativeStep, cache: DenseKVCache, policy: TextPolicy) -> float:
    """The native call alone, as the step itself times it."""
    cache.rewind(0)
    step.follow(policy)
    step(1, cache, policy)
    return step.call_ms


def main() -> None:
    run = begin(arguments(__doc__).parse_args())
    torch.manual_seed(0)
    run.report("cpu_decode", small_model() + large_model(), threads=2)


if __name__ == "__main__":
    main()
