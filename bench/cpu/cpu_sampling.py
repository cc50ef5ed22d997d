"""Drawing a token from logits on a CPU: what a token at a temperature takes beside its decode step.

Limit measured: time to draw one token from the logits of vocabularies of 32 to 262 thousand tokens, one thread, by the
native library and by the definition in torch (dpllm/decode/sampling.py), in turns. Two kinds of logits: those of a
trained model have few likely tokens (here: random ones, of the spread that such models show); those of random weights
are nearly level, so that top-p and min-p keep most tokens.

    python -m bench.cpu.cpu_sampling
"""

from __future__ import annotations

import time

import numpy as np
import torch

from bench.common.report import arguments, begin
from dpllm.decode.sampling import Sampler, SamplingOptions
from dpllm.kernels.backend import choose_backend
from dpllm.kernels.cpu.library import CpuOptions

VOCABULARIES = (32_000, 128_256, 151_936, 262_144)
MODES = {
    "greedy": {"temperature": 0.0, "repetition_penalty": 1.1}, "temperature": {}, "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95}, "min-p 0.05": {"min_p": 0.05},
    "top-k 50, top-p 0.95, min-p 0.05, penalty 1.1": {
        "top_k": 50, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1,
    },
}  # fmt: skip
PROMPT = 2000  # tokens that are in the text already, for the penalty


def logits_of(kind: str, size: int) -> torch.Tensor:
    """Random logits float32 [size]: "level", or "peaked" as those of a trained model."""
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(size, generator=generator)
    if kind == "level":
        return values * 0.5
    likely = torch.randperm(size, generator=generator)[:200]
    values = values * 2
    values[likely] += torch.linspace(16, 4, len(likely))
    return values


def in_turns(samplers: dict[str, Sampler], logits: torch.Tensor, rounds: int) -> dict[str, np.ndarray]:
    """ms of each draw of each sampler."""
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    for i in range(rounds + 1):
        for name, draw in samplers.items():
            began = time.perf_counter()
            draw(logits)
            if i:
                taken[name].append((time.perf_counter() - began) * 1e3)
    return {name: np.asarray(ms) for name, ms in taken.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="draws of each row")
    args = parser.parse_args()
    run = begin(args)
    torch.set_num_threads(1)
    native = choose_backend("cpu", options=CpuOptions(threads=1))
    rows = []
    for size in VOCABULARIES:
        for kind in ("peaked", "level"):
            logits = logits_of(kind, size)
            for mode, given in MODES.items():
                options = SamplingOptions(**{"temperature": 0.8, "seed": 0} | given)
                samplers = {"native": Sampler(options, native.cpu), "torch": Sampler(options)}
                for sampler in samplers.values():
                    sampler.read(range(PROMPT))
                ms = in_turns(samplers, logits, args.rounds)
                rows.append(
                    {"vocabulary": size, "logits": kind, "mode": mode}
                    | {
                        f"{name}_ms_p{p}": round(float(np.percentile(of, p)), 4)
                        for name, of in ms.items() for p in (50, 90)
                    }
                    | {"times_faster": round(float(np.median(ms["torch"]) / np.median(ms["native"])), 1)}
                )  # fmt: skip
    run.report("cpu_sampling", rows, threads=1, backend=native.name, measured_on="random logits")


if __name__ == "__main__":
    main()
