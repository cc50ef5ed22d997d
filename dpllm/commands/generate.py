"""`dpllm generate`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpllm import reference
from dpllm.base.errors import InputError
from dpllm.commands.common import (
    Hardware,
    note,
    parse_share,
    parse_size,
    print_json,
    stage_bars,
)
from dpllm.context.saved import load_context
from dpllm.control.controller import LatencyController
from dpllm.engine import Engine, GenerateOptions, Step, load
from dpllm.model.loading import is_overlay
from dpllm.model.memory import resident_bits_within
from dpllm.planning.cost_measurement import cost_of
from dpllm.planning.quality_model import quality_of


@dataclass(frozen=True)
class GenerateArguments:
    """The command's arguments but the sampling ones."""

    prompt: str | None
    overlay: str | None
    target_bits: float | None
    bits: int | None
    policy: str | None
    resident_bits: int | None
    max_memory: str | None
    hardware: Hardware
    json: bool
    context: str | None
    tpot_ms: float | None = None
    max_quality_loss: str | None = None
    guarantee: bool = False


def read_prompt(prompt: str | None) -> str:
    """The prompt, or standard input for '-'. Raises InputError where there is none."""
    if prompt is None:
        raise InputError("no prompt given. Write dpllm generate 'some text', or '-' to read standard input.")
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as e:
        raise InputError(f"standard input is not UTF-8 text ({e}).") from None


def open_engine(args: GenerateArguments) -> Engine:
    """Loads what the arguments name, at the precision they ask for."""
    if args.bits is not None and args.target_bits is not None:
        raise InputError(
            "--bits and --target-bits exclude each other: one fixes every width, one their mean."
        )
    if args.bits is not None and args.policy not in (None, "uniform"):
        raise InputError(
            f"--bits fixes every width, so --policy {args.policy} has nothing to choose. Use --target-bits."
        )
    if args.tpot_ms is not None and (args.bits is not None or args.target_bits is not None):
        raise InputError("--tpot-ms chooses the bits itself: leave out --bits and --target-bits.")
    if args.tpot_ms is not None and args.policy not in (None, "rate-distortion"):
        raise InputError(
            f"--tpot-ms steers policy rate-distortion; --policy {args.policy} cannot be steered."
        )
    if args.max_quality_loss is not None and args.tpot_ms is None:
        raise InputError("--max-quality-loss is a bound for --tpot-ms here. For a plan, run: dpllm plan")
    if args.guarantee and (args.target_bits is None or args.policy not in (None, "rate-distortion")):
        raise InputError("--guarantee bounds what policy rate-distortion reads: it needs --target-bits.")
    if args.resident_bits is not None and args.max_memory is not None:
        raise InputError("--resident-bits and --max-memory exclude each other: give one of them.")
    resident = args.resident_bits
    if resident is not None or args.max_memory is not None:
        path = reference.overlay_path() if args.overlay is None else Path(args.overlay)
        if path.is_dir() and not is_overlay(path):
            raise InputError(f"{path} is not quantised: all of it is resident. Run dpllm quantize first.")
        if args.max_memory is not None:
            resident = resident_bits_within(path, parse_size(args.max_memory))
    options = args.hardware.load_options(resident)
    if args.bits is not None:
        return load(
            args.overlay, target_bits=float(args.bits), policy="uniform", options=options, progress=note
        )
    return load(
        args.overlay, target_bits=args.target_bits, policy=args.policy, options=options, progress=note
    )


def aim(engine: Engine, args: GenerateArguments, pairs: float) -> None:
    """Hands the target to a controller. pairs: already in the cache. Raises InputError for a time that even the fewest
    bits do not keep to."""
    if args.guarantee:
        assert args.target_bits is not None
        engine.hold_budget(args.target_bits)
    if args.tpot_ms is None:
        return
    with stage_bars() as progress:
        cost = cost_of(engine, progress=progress)
    least = 0.0
    if args.max_quality_loss is not None:
        quality, share = quality_of(engine), parse_share(args.max_quality_loss)
        least = next((b for b in quality.bits if math.expm1(quality.loss(b)) <= share), quality.bits[-1])
    cost.check(args.tpot_ms, pairs, least)
    engine.hold_latency(args.tpot_ms, cost, least)


def run(args: GenerateArguments, options: GenerateOptions) -> None:
    """Streams the text to stdout, a summary to stderr (or JSON to stdout)."""
    prompt = read_prompt(args.prompt)
    if not prompt:
        raise InputError("the prompt is empty. Give some text, or '-' to read it from standard input.")
    engine = open_engine(args)
    context = (
        None
        if args.context is None
        else load_context(Path(args.context).expanduser(), decoder=engine.decoder, model=engine.path)
    )
    args.hardware.note_if_slow(engine.decoder.backend)
    aim(engine, args, 0.0 if context is None else float(context.cache.lengths.sum()))
    if args.resident_bits is not None or args.max_memory is not None:
        resident = engine.decoder.groups[0].resident_bits
        note(f"resident: {resident} planes; {engine.decoder.bytes_read / 1e6:.2f} MB read from disk")
    steps = []
    for step in engine.generate(prompt, options, context=context):
        steps.append(step)
        if not args.json:
            sys.stdout.write(step.text)
            sys.stdout.flush()
    summary = summarize(engine, steps)
    if args.json:
        print_json(summary)
        return
    sys.stdout.write("\n")
    tpot = summary["tpot_ms"]
    bits = "" if summary["effective_bits"] is None else f" · {summary['effective_bits']:.2f} bits"
    speed = "" if tpot is None else f" · {tpot['p50']:.1f} ms/token (p95 {tpot['p95']:.1f})"
    traffic = f" · {summary['weight_bytes_per_token'] / 1e6:.2f} MB of weights a token" if bits else ""
    if context is not None:
        kept = f"{context.kept_ratio:.0%} of a context of {context.cache.length} tokens kept"
        traffic += f" · {summary['kv_bytes'] / 1e6:.2f} MB of cache ({kept})"
    if (rate := summary["speculation"]["acceptance_rate"]) is not None:
        traffic += (
            f" · {rate:.0%} of drafts accepted, {summary['speculation']['tokens_per_pass']:.1f} tokens a pass"
        )
    note(
        f"[{summary['new_tokens']} tokens{bits}{speed}{traffic} · {summary['policy']} · {summary['backend']} backend]"
    )


def _target(engine: Engine) -> dict[str, float | None]:
    held = engine.controller
    return (
        {"tpot_ms": held.target_ms} if isinstance(held, LatencyController) else {"bits": engine.target_bits}
    )


def summarize(engine: Engine, steps: Sequence[Step]) -> dict[str, Any]:
    """The object of `dpllm generate --json`. Figures are over decode steps: the first token, which comes from
    reading the prompt at the resident maximum, counts as ttft only."""
    decoded = steps[1:]
    times = [s.tpot_ms for s in decoded]
    dynamic = engine.quantized and bool(decoded)
    return {
        "text": "".join(s.text for s in steps),
        "new_tokens": len(steps),
        "effective_bits": round(float(np.mean([s.effective_bits for s in decoded])), 4) if dynamic else None,
        "ttft_ms": round(steps[0].tpot_ms, 3),
        "tpot_ms": {f"p{p}": round(float(np.percentile(times, p)), 3) for p in (50, 95)} if times else None,
        "policy": engine.policy.name if engine.policy else None,
        "target": _target(engine),
        "backend": engine.decoder.backend.name,
        "weight_bytes_per_token": round(float(np.mean([s.weight_bytes for s in decoded])))
        if dynamic
        else None,
        "kv_bytes": steps[-1].kv_bytes,
        "speculation": engine.tally.summary(),
    }
