"""What self-speculation is worth: how often drafts are accepted, and how long drafting and checking take.

Limits measured: (1) acceptance of drafts at 2, 3 and 4 bits by checks at 6 bits (the bundled overlay) and at 8 (the
reference model quantised anew to 2-8 bits, by plain k-means), for held-out code as it stands and for what the model
generates after it; (2) wall time a token of it, all modes in turns on the same prompts, beside plain decoding (tokens
are the same); (3) the time side at the 1.1B shape on random weights, where drafts mean nothing: draft steps, checks by
rows, plain steps, and from these the acceptance at which drafting breaks even and what it would bring at others.

    python -m bench.quality.speculation [--quick]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.common.report import arguments, begin
from bench.quality.texts import heldout_windows
from dpllm import reference
from dpllm.decode.cpu_step import NativeStep
from dpllm.decode.options import GenerateOptions
from dpllm.decode.speculation.draft_length import DraftLengths, expected_tokens
from dpllm.decode.speculation.tally import Tally
from dpllm.engine import Engine
from dpllm.kernels.cpu.library import CpuOptions
from dpllm.model.decoder import Decoder
from dpllm.model.loading import LoadOptions
from dpllm.model.random_models import random_decoder, shape
from dpllm.opening import open_engine
from dpllm.policies.fixed import StaticPolicy
from dpllm.quant.quantize import Quantizer
from dpllm.quant.quantize_plan import QuantizeOptions
from dpllm.quant.source import ModelSource

TARGETS, DRAFTS = (6, 8), (2, 3, 4)
PROMPT = 200  # tokens
MODES: tuple[tuple[str, int | None], ...] = (
    ("off", None), ("self", 2), ("self", 3), ("self", 4), ("lookup", None), ("auto", None),
)  # fmt: skip
ROWS = (1, 2, 3, 4, 5, 7, 9)  # of checks
REFERENCE, RANDOM = "reference model, 1 thread", "random weights at the 1.1B shape"


class Fixed(DraftLengths):
    """So many tokens of the first source, at any cost."""

    count = 4

    def plans(self, room: int) -> list[tuple[int, int]]:
        return [(0, min(self.count, room))] if room else []


def row(what: str, on: str, target: int, draft: str, **more: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("acceptance", "tokens_per_pass", "ms_p50", "ms_p90", "ratio"))
    return {"what": what, "measured_on": on, "target": target, "draft": draft} | empty | more


def times(ms: list[float]) -> dict[str, float]:
    return {
        "ms_p50": round(statistics.median(ms), 3),
        "ms_p90": round(sorted(ms)[int(0.9 * (len(ms) - 1))], 3),
    }


# -- the reference model ------------------------------------------------------------------------------------


def engines(folder: Path) -> dict[int, Engine]:
    """For each target, an overlay that holds as many planes."""
    source = ModelSource.open(reference.model_path())
    job = Quantizer(source, folder / "overlay", QuantizeOptions(bits=(2, 8)), documents=None)
    one = LoadOptions(cpu=CpuOptions(threads=1))  # so small a model gains nothing from two
    return {6: open_engine(options=one), 8: open_engine(job.run(), options=one)}


@torch.no_grad()
def agreement(engine: Engine, target: int, windows: list[list[int]]) -> list[dict[str, Any]]:
    """On held-out code as it stands: how often both widths name the same next token, and what their distributions have
    in common (1 - total variation: what the best rule accepts at temperature 1)."""
    decoder, rows = engine.decoder, []

    def logits(bits: int) -> torch.Tensor:
        policy = StaticPolicy([bits] * len(decoder.groups))
        return torch.cat([decoder.forward(torch.tensor(w[:512]), select=policy) for w in windows])

    wide = logits(target)
    for draft in DRAFTS:
        narrow, name = logits(draft), f"{draft} bits"
        same = (wide.argmax(-1) == narrow.argmax(-1)).double().mean().item()
        common = torch.minimum(wide.softmax(-1), narrow.softmax(-1)).sum(-1).mean().item()
        rows.append(row("held-out code, greedy", REFERENCE, target, name, acceptance=round(same, 4)))
        rows.append(row("held-out code, 1 - d", REFERENCE, target, name, acceptance=round(common, 4)))
    return rows


def prompts_of(engine: Engine, windows: list[list[int]]) -> list[str]:
    return [engine.tokenizer.decode(w[:PROMPT], skip_special_tokens=True) for w in windows]


def generate(
    engine: Engine, mode: tuple[str, int | None], prompt: str, seed: int, temperature: float, n: int
):
    """A generation, run to its end."""
    options = GenerateOptions(n, temperature, seed=seed, speculate=mode[0], draft_bits=mode[1])
    generation = engine.generate_with(prompt, options)
    list(generation)
    return generation


def name_of(mode: tuple[str, int | None]) -> str:
    return f"{mode[1]} bits" if mode[1] else mode[0]


def accepted(
    engine: Engine, target: int, temperature: float, prompts: list[str], n: int
) -> list[dict[str, Any]]:
    """In what the model generates, four tokens drafted a check."""
    rows = []
    for mode in MODES[1:-1]:
        tally = Tally()
        choice = engine._draft_choice
        choice.lengths = lambda options, policy, target, drafts: Fixed([d.longest for d in drafts])  # type: ignore
        for i, prompt in enumerate(prompts):
            made = generate(engine, mode, prompt, i, temperature, n)
            for name, value in vars(made.tally).items():
                setattr(tally, name, getattr(tally, name) + value)
        del choice.lengths
        found = tally.summary()
        rows.append(
            row(
                f"generated, temperature {temperature:g}, 4 a check", REFERENCE, target, name_of(mode),
                acceptance=found["acceptance_rate"], tokens_per_pass=found["tokens_per_pass"],
            )
        )  # fmt: skip
    return rows


def walls(
    engine: Engine, target: int, temperature: float, prompts: list[str], n: int
) -> list[dict[str, Any]]:
    """ms a token after the prompt, modes in turns; ratio: to plain decoding of the same prompt in the same turn."""
    ms: dict[Any, list[float]] = {m: [] for m in MODES}
    passes: dict[Any, list[float]] = {m: [] for m in MODES}
    for i, prompt in enumerate([prompts[0], *prompts]):  # the first time to warm up
        for mode in MODES:
            made = generate(engine, mode, prompt, i, temperature, n)
            if i and len(made.steps) > 1:
                ms[mode].append(statistics.mean(s.ms for s in made.steps[1:]))
                passes[mode].append(made.stats.speculation["tokens_per_pass"] or 1.0)
    return [
        row(
            f"wall time a token, temperature {temperature:g}", REFERENCE, target, name_of(mode), **times(ms[mode]),
            tokens_per_pass=round(statistics.mean(passes[mode]), 3),
            ratio=round(statistics.median(a / b for a, b in zip(ms[mode], ms[MODES[0]], strict=True)), 3),
        )
        for mode in MODES
    ]  # fmt: skip


# -- the 1.1B shape -----------------------------------------------------------------------------------------


def measure(decoder: Decoder, rounds: int) -> dict[tuple[int, int], list[float]]:
    """ms of (bits, rows), all in turns, after 200 tokens."""
    step, cache = NativeStep.of(decoder), decoder.new_cache(250)
    assert step is not None
    cells = [(b, 1) for b in DRAFTS] + [(b, n) for b in TARGETS for n in ROWS]
    policies = {b: StaticPolicy([b] * len(decoder.groups)) for b, _ in cells}
    ms: dict[tuple[int, int], list[float]] = {c: [] for c in cells}
    for turn in range(rounds + 2):
        for bits, rows in cells:
            cache.rewind(0)
            cache.advance(PROMPT)
            began = time.perf_counter()
            step.several(list(range(rows)), cache, policies[bits], [0.0] * rows)
            if turn > 1:
                ms[bits, rows].append((time.perf_counter() - began) * 1e3)
    return ms


def time_model(ms: dict[tuple[int, int], list[float]]) -> list[dict[str, Any]]:
    """What was measured, and what follows from it."""
    rows = [row("draft step", RANDOM, b, f"{b} bits", **times(ms[b, 1])) for b in DRAFTS]
    typical = {cell: statistics.median(v) for cell, v in ms.items()}
    for target in TARGETS:
        plain = typical[target, 1]
        for n in ROWS:
            what = "plain step" if n == 1 else f"check of {n} rows"
            ratio = round(typical[target, n] / plain, 3)
            rows.append(row(what, RANDOM, target, "-", **times(ms[target, n]), ratio=ratio))
        for draft in (0, *DRAFTS):
            cost = typical[draft, 1] if draft else 0.0

            def best(a: float, target: int = target, cost: float = cost) -> float:
                return min(
                    ((n - 1) * cost + typical[target, n]) / expected_tokens(a, n - 1) for n in ROWS[1:]
                )

            name = f"{draft} bits" if draft else "free (lookup)"
            even = next((a / 100 for a in range(101) if best(a / 100) < plain), None)
            rows.append(row("break-even acceptance", RANDOM, target, name, acceptance=even))
            for a in (0.7, 0.8, 0.9, 0.95):
                ratio = round(best(a) / plain, 3)
                rows.append(
                    row("predicted, best k", RANDOM, target, name, acceptance=a, ratio=ratio,
                        ms_p50=round(best(a), 2))
                )  # fmt: skip
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="little of everything")
    args = parser.parse_args()
    run, quick = begin(args), args.quick
    torch.manual_seed(0)
    count, new_tokens, rounds = (2, 24, 1) if quick else (8, 128, 12)
    windows = [w for w in heldout_windows(40_000).ids if len(w) > 2 * PROMPT][::5][:count]
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for target, engine in engines(Path(folder)).items():
            engine.set_policy("uniform", target)
            prompts = prompts_of(engine, windows)
            rows += agreement(engine, target, windows)
            for temperature in (0.0, 1.0):
                rows += accepted(engine, target, temperature, prompts, new_tokens)
                rows += walls(engine, target, temperature, prompts, new_tokens)
    rows += time_model(measure(random_decoder(shape("1.1B"), 8), rounds))
    run.report("speculation", rows, threads=2)


if __name__ == "__main__":
    main()
