"""`dpllm generate`: continues a text at a chosen precision."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpllm.base.errors import InputError
from dpllm.base.shell import command_line
from dpllm.commands.app import (
    COMMON,
    EXPERT,
    MACHINE,
    TARGETS,
    Accuracy,
    Backend,
    Chat,
    Command,
    Context,
    Device,
    Json,
    MaxNewTokens,
    MaxQualityLoss,
    Overlay,
    TargetBits,
    Temperature,
    Threads,
    TpotMs,
    app,
    check_seed,
)
from dpllm.commands.common import Hardware, note, note_doubled_start, print_json, stage_bars
from dpllm.commands.streams import read_stdin

if TYPE_CHECKING:
    from dpllm.context.kv_context import KVContext
    from dpllm.decode.generation import Generation
    from dpllm.decode.options import GenerateOptions
    from dpllm.engine import Engine

Prompt = Annotated[str | None, typer.Argument(help="Text to continue; '-' reads standard input.")]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End the text before this string. May be repeated.", rich_help_panel=COMMON),
]
StopToken = Annotated[
    list[str] | None,
    typer.Option(
        "--stop-token",
        help="End the text before this token, which may be a special one such as '<|im_end|>'. May be repeated.",
        rich_help_panel=COMMON,
    ),
]
Guarantee = Annotated[
    bool,
    typer.Option(
        "--guarantee",
        help="Keep every text within --target-bits. Without this option, that is an average over texts.",
        rich_help_panel=TARGETS,
    ),
]
Bits = Annotated[
    int | None,
    typer.Option("--bits", help="Read exactly this width in every matrix.", rich_help_panel=TARGETS),
]
MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", help="Hold as many planes as fit, e.g. 4GB.", rich_help_panel=TARGETS),
]
ResidentBits = Annotated[
    int | None,
    typer.Option(
        "--resident-bits", help="Read this number of planes from disk and hold them.", rich_help_panel=MACHINE
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="Choose the bits by this policy: rate-distortion (the default after calibration), dp-llm, static, "
        "uniform, random, oracle-rate-distortion or oracle-dp-llm.",
        rich_help_panel=EXPERT,
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p",
        help="Sample from the likeliest tokens whose probabilities add up to this.",
        rich_help_panel=EXPERT,
    ),
]
TopK = Annotated[
    int,
    typer.Option(
        "--top-k", help="Sample from this number of likeliest tokens; 0 is all.", rich_help_panel=EXPERT
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p",
        help="Sample only tokens that are at least this share as likely as the likeliest one.",
        rich_help_panel=EXPERT,
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        "--repetition-penalty",
        help="Make tokens that are in the text already less likely. 1 changes nothing; 1.1 is a usual value.",
        rich_help_panel=EXPERT,
    ),
]
Headroom = Annotated[
    float | None,
    typer.Option(
        "--headroom",
        help="With --tpot-ms, let one token take this many times the time to hold. More headroom gives better text at "
        "the same mean time, and a less even pace.",
        rich_help_panel=EXPERT,
    ),
]
RandomSeed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        callback=check_seed,
        help="Repeat the same sampling at every run with this seed. The default is a new one each time.",
        rich_help_panel=EXPERT,
    ),
]
Speculate = Annotated[
    str,
    typer.Option(
        "--speculate",
        help="Draft tokens and check several in one pass. 'self' drafts with the overlay at --draft-bits, 'lookup' "
        "from the text so far, 'auto' with both from 6 bits on where that is faster, and 'off' drafts nothing.",
        rich_help_panel=EXPERT,
    ),
]
DraftBits = Annotated[
    int | None,
    typer.Option("--draft-bits", help="Draft at this width. The default is 3.", rich_help_panel=EXPERT),
]


@app.command(cls=Command)
def generate(
    *,
    prompt: Prompt = None,
    overlay: Overlay = None,
    max_new_tokens: MaxNewTokens = 128,
    stop: Stop = None,
    stop_token: StopToken = None,
    chat: Chat = False,
    context: Context = None,
    json: Json = False,
    target_bits: TargetBits = None,
    tpot_ms: TpotMs = None,
    max_quality_loss: MaxQualityLoss = None,
    max_memory: MaxMemory = None,
    bits: Bits = None,
    guarantee: Guarantee = False,
    device: Device = "cpu",
    threads: Threads = None,
    backend: Backend = None,
    resident_bits: ResidentBits = None,
    headroom: Headroom = None,
    policy: Policy = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: RandomSeed = None,
    speculate: Speculate = "auto",
    draft_bits: DraftBits = None,
    accuracy: Accuracy = "balanced",
) -> None:
    """Continue a text at a chosen precision and print it as it is generated.

    Examples: dpllm generate 'def fibonacci(n):' --target-bits 3.25. With --tpot-ms 25 it reads as many bits as that
    time allows.
    """
    from dpllm.context.kv_context import KVContext
    from dpllm.decode.options import GenerateOptions

    options = GenerateOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop or ()),
        stop_tokens=tuple(stop_token or ()), chat=chat, speculate=speculate, draft_bits=draft_bits,
    )  # fmt: skip
    text = read_prompt(prompt)
    if not text:
        raise InputError("the prompt is empty. Give some text, or '-' to read it from standard input.")
    check_precision(bits=bits, target_bits=target_bits, policy=policy, guarantee=guarantee)
    check_targets(
        tpot_ms=tpot_ms, max_quality_loss=max_quality_loss, bits=bits, target_bits=target_bits, policy=policy
    )
    hardware = Hardware(device=device, backend=backend, threads=threads, accuracy=accuracy)
    engine = open_engine(
        overlay, hardware, bits=bits, target_bits=target_bits, policy=policy,
        resident=planes_to_hold(overlay, resident_bits=resident_bits, max_memory=max_memory),
    )  # fmt: skip
    about = None if context is None else KVContext.load(context, engine)
    hardware.note_about(engine.decoder)
    if guarantee:
        assert target_bits is not None
        engine.hold_budget(target_bits)
    if tpot_ms is not None:
        pairs = 0.0 if about is None else float(about.cache.lengths.sum())
        hold_time(engine, tpot_ms, max_quality_loss=max_quality_loss, headroom=headroom, pairs=pairs)
    if resident_bits is not None or max_memory is not None:
        resident = engine.decoder.groups[0].resident_bits
        note(f"resident: {resident} planes; {engine.decoder.bytes_read / 1e6:.2f} MB read from disk")
    if not chat and about is None:
        note_doubled_start(engine, text)
    note_suggestions(engine, options)
    generation = engine.generate_with(text, options, context=about)
    stream(generation, show=not json)
    summary = summarize(engine, generation)
    if not json:
        sys.stdout.write("\n")
    if generation.shortfall is not None:
        note(str(generation.shortfall))
    if json:
        print_json(summary)
    else:
        note(closing_line(summary, about))
    note_positions(engine, generation)


def read_prompt(prompt: str | None) -> str:
    """The prompt, or standard input for '-'. Raises InputError where there is none."""
    if prompt is None:
        raise InputError("no prompt given. Write dpllm generate 'some text', or '-' to read standard input.")
    return read_stdin() if prompt == "-" else prompt


def check_precision(
    *, bits: int | None, target_bits: float | None, policy: str | None, guarantee: bool
) -> None:
    """Raises InputError for ways to choose the bits that exclude each other."""
    if bits is not None and target_bits is not None:
        raise InputError(
            "--bits and --target-bits exclude each other: one fixes every width, one their mean."
        )
    if bits is not None and policy not in (None, "uniform"):
        raise InputError(
            f"--bits fixes every width, so --policy {policy} has nothing to choose. Use --target-bits."
        )
    if guarantee and (target_bits is None or policy not in (None, "rate-distortion")):
        raise InputError("--guarantee bounds what policy rate-distortion reads: it needs --target-bits.")


def check_targets(
    *,
    tpot_ms: float | None,
    max_quality_loss: str | None,
    bits: int | None,
    target_bits: float | None,
    policy: str | None,
) -> None:
    """Raises InputError for options that --tpot-ms excludes, or that need it."""
    if tpot_ms is not None and (bits is not None or target_bits is not None):
        raise InputError("--tpot-ms chooses the bits itself: leave out --bits and --target-bits.")
    if tpot_ms is not None and policy not in (None, "rate-distortion"):
        raise InputError(f"--tpot-ms steers policy rate-distortion; --policy {policy} cannot be steered.")
    if max_quality_loss is not None and tpot_ms is None:
        raise InputError("--max-quality-loss is a bound for --tpot-ms here. For a plan, run: dpllm plan")


def planes_to_hold(overlay: str | None, *, resident_bits: int | None, max_memory: str | None) -> int | None:
    """The number of planes to read from disk; None for all of them. Raises InputError where none fits."""
    from dpllm import reference
    from dpllm.base.quantities import parse_size
    from dpllm.model.loading import is_overlay
    from dpllm.model.memory import resident_bits_within
    from dpllm.quant.resolve import resolve_model

    if resident_bits is not None and max_memory is not None:
        raise InputError("--resident-bits and --max-memory exclude each other: give one of them.")
    if resident_bits is None and max_memory is None:
        return None
    path = reference.overlay_path() if overlay is None else resolve_model(overlay, note)
    if not is_overlay(path):
        raise InputError(
            f"{path} is not quantised: all of it is resident. Run: {command_line('quantize', path, 'OUT')}"
        )
    return resident_bits if max_memory is None else resident_bits_within(path, parse_size(max_memory))


def open_engine(
    overlay: str | None,
    hardware: Hardware,
    *,
    bits: int | None,
    target_bits: float | None,
    policy: str | None,
    resident: int | None,
) -> Engine:
    """The model at the precision asked for; `resident` is the number of planes to hold, None for all."""
    from dpllm.opening import open_engine as load

    if bits is not None:
        target_bits, policy = float(bits), "uniform"
    options = hardware.load_options(resident)
    return load(overlay, target_bits=target_bits, policy=policy, options=options, progress=note)


def hold_time(
    engine: Engine, tpot_ms: float, *, max_quality_loss: str | None, headroom: float | None, pairs: float
) -> None:
    """Lets a controller hold the time per token.

    pairs: key-value pairs in the cache already. Raises InputError for a time that even the fewest bits exceed.
    """
    from dpllm.api import bits_for_quality
    from dpllm.planning.cost_measurement import cost_of

    with stage_bars() as progress:
        cost = cost_of(engine, progress=progress)
    least = bits_for_quality(engine, max_quality_loss)
    cost.check(tpot_ms, pairs, least)
    engine.hold_latency(tpot_ms, cost, least, headroom)


def stream(generation: Generation, *, show: bool) -> None:
    """Generates, and with `show` prints the text as it comes."""
    for step in generation:
        if show:
            sys.stdout.write(step.text)
            sys.stdout.flush()


def note_suggestions(engine: Engine, options: GenerateOptions) -> None:
    """Says once which sampling options the model's generation_config.json suggests, where none was given."""
    from dpllm.model.generation_config import GENERATION_CONFIG, SAMPLING, suggested_sampling

    found = suggested_sampling(engine.path)
    if not found or any(getattr(options, name) != usual for name, usual in SAMPLING.items()):
        return
    words = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in found.items())
    note(
        f"the model's {GENERATION_CONFIG} suggests: {words}. Give these options to follow it; none of them is in use."
    )


def note_positions(engine: Engine, generation: Generation) -> None:
    """Says where a text ended because the model has no more positions."""
    if generation.stopped_by == "positions":
        note(
            f"the text ends here because the model's {engine.decoder.config.max_positions} positions are used up, "
            f"after {len(generation.steps)} tokens of the answer. Shorten the prompt or the context for a longer one."
        )


def closing_line(summary: dict[str, Any], context: KVContext | None) -> str:
    """The figures of a generation in one line, for people. summary: the object of `summarize`."""
    parts = [f"{summary['new_tokens']} tokens"]
    if summary["effective_bits"] is not None:
        parts.append(f"{summary['effective_bits']:.2f} bits")
    if (tpot := summary["tpot_ms"]) is not None:
        parts.append(f"{tpot['p50']:.1f} ms/token (p95 {tpot['p95']:.1f})")
    if summary["effective_bits"] is not None:
        parts.append(f"{summary['weight_bytes_per_token'] / 1e6:.2f} MB of weights a token")
    if context is not None:
        kept = f"{context.kept_ratio:.0%} of a context of {context.cache.length} tokens kept"
        parts.append(f"{summary['kv_bytes'] / 1e6:.2f} MB of cache ({kept})")
    if (rate := summary["speculation"]["acceptance_rate"]) is not None:
        several = summary["speculation"]["tokens_per_pass"]
        parts.append(f"{rate:.0%} of drafts accepted, {several:.1f} tokens a pass")
    parts += [summary["policy"] or "unquantised", f"{summary['backend']} backend"]
    return f"[{' · '.join(parts)}]"


def summarize(engine: Engine, generation: Generation) -> dict[str, Any]:
    """The object of `dpllm generate --json`. See GenerationStats for its figures."""
    from dpllm.control.controller import LatencyController

    held, target = engine.controller, {"bits": engine.target_bits}
    if isinstance(held, LatencyController):
        target = {"tpot_ms": held.target_ms}
    return {
        "text": generation.text,
        **asdict(generation.stats),
        "policy": engine.policy.name if engine.policy else None,
        "target": target,
        "backend": engine.decoder.backend.name,
    }
