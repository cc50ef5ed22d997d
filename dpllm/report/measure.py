"""Gathers a report: chooses the operating point, generates at it, and measures what surrounds it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpllm.base.errors import InputError
from dpllm.context.kv_context import KVContext
from dpllm.control.cost_model import CostModel
from dpllm.engine import DEFAULT_TARGET_BITS, Engine, GenerateOptions, Step
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.planning.cost_measurement import cost_of
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.make import make_policy, resident_mean
from dpllm.policies.rate_distortion import RateDistortionPolicy
from dpllm.report import service
from dpllm.report.accounting import bytes_by_kind
from dpllm.report.data import (
    Frontier,
    Generation,
    GroupInfo,
    KeptPairs,
    KindBytes,
    OperatingPoint,
    Service,
    Token,
)
from dpllm.report.decoding import BLOCK, Progress, read
from dpllm.report.frontier import (
    OURS,
    cells_of,
    default_targets,
    measure_frontier,
)

WINDOW, PIECES = 256, 8  # tokens of a scored piece of text at most; pieces at least, for the intervals


@dataclass(frozen=True)
class ReportOptions:
    """target_bits or tpot_ms (ms a token): what is asked; neither: 3.5 bits, or what is resident. policies: of the
    curves, beside ours; None: static and, where it was calibrated, DP-LLM. targets: of the curves, None: five.
    scored_tokens, queries: how much text."""

    target_bits: float | None = None
    tpot_ms: float | None = None
    policies: tuple[str, ...] | None = None
    targets: tuple[float, ...] | None = None
    scored_tokens: int = 2000
    queries: int = 32

    def __post_init__(self) -> None:
        if self.target_bits is not None and self.tpot_ms is not None:
            raise InputError("--target-bits and --tpot-ms exclude each other: one target decides the other.")
        if self.tpot_ms is not None and not 0 < self.tpot_ms < math.inf:
            raise InputError(
                f"--tpot-ms {self.tpot_ms:g} is no time. Give milliseconds per token, such as 25."
            )


@dataclass(frozen=True)
class Measured:
    """The parts of a report that come from the engine."""

    operating: OperatingPoint
    generation: Generation
    frontier: Frontier
    kept: KeptPairs | None
    nbytes: tuple[KindBytes, ...]
    service: Service


def measure(
    engine: Engine, prompt: str, documents: Sequence[Sequence[int]], text: str, options: ReportOptions,
    generate: GenerateOptions, context: KVContext | None, progress: Progress,
) -> Measured:  # fmt: skip
    """Everything, on this machine, now. documents: token ids of the text that is scored; text: what to call it.

    Raises InputError for a target that cannot be met, a policy that was not calibrated, or text that is too short.
    """
    if generate.max_new_tokens < 2:
        raise InputError(
            "--max-new-tokens 1 decodes nothing: the prompt gives the first token. Ask for more."
        )
    window = max(32, min(WINDOW, options.scored_tokens // PIECES))
    pieces, queries = windows(documents, window, options.scored_tokens, 2), _queries(documents, options)
    targets = list(options.targets or default_targets(engine))
    if options.target_bits is not None:
        targets.append(options.target_bits)
    names = options.policies or ("static", "dp-llm")
    explicit = options.policies is not None
    cells_of(engine, names, targets, explicit)  # an impossible target costs no minutes of the others
    cache = _cache_behind(engine, prompt, context, generate.chat)
    cost = None if options.tpot_ms is None else cost_of(engine, progress=progress)
    operating = _operating_point(engine, options, cost, cache)
    cells, notes = cells_of(engine, names, sorted({*targets, operating.target_bits}), explicit)
    _aim(engine, operating, cost)
    generation, nbytes = generate_at(engine, operating, prompt, generate, context, progress)
    frontier = measure_frontier(engine, cells, cache, pieces, text, notes, progress)
    levels = service.measure_service(engine, operating.target_bits, queries, progress)
    return Measured(operating, generation, frontier, kept_pairs(context), nbytes, levels)


def windows(documents: Sequence[Sequence[int]], size: int, total: int, shortest: int) -> list[list[int]]:
    """Pieces of at most `size` tokens and at least `shortest`, about `total` in all, spread evenly over the text."""
    pieces = [list(d[i : i + size]) for d in documents for i in range(0, len(d), size)]
    pieces = [p for p in pieces if len(p) >= shortest]
    wanted = max(1, round(total / size))
    if len(pieces) <= wanted:
        return pieces
    return [pieces[i] for i in np.linspace(0, len(pieces) - 1, wanted).round().astype(int)]


def _queries(documents: Sequence[Sequence[int]], options: ReportOptions) -> list[list[int]]:
    size = service.PROMPT + service.NEW
    shortest = service.PROMPT + service.SHORTEST
    found = windows(documents, size, size * options.queries, shortest)
    if not found:
        raise InputError(
            f"the text is too short: its longest document has {max(map(len, documents))} tokens, and {shortest} are "
            "needed to decode a query. Give a longer --text."
        )
    return found


def _cache_behind(engine: Engine, prompt: str, context: KVContext | None, chat: bool) -> KVCache:
    """A cache of the context and the prompt, with room to time steps behind them."""
    ids = _prompt_ids(engine, prompt, context, chat)
    before, room = 0 if context is None else context.cache.length, BLOCK + 1
    engine.prompts.check_prompt(ids, before)
    if (left := engine.decoder.config.max_positions - before - len(ids)) < room:
        raise InputError(
            f"the prompt leaves {left} of the model's {engine.decoder.config.max_positions} positions; {room} are "
            "needed to time steps behind it. Shorten it."
        )
    cache: KVCache
    if context is None:
        cache = engine.decoder.new_cache(len(ids) + room)
    else:
        cache = context.cache.fork(len(ids) + room)
    read(engine, ids, cache)
    return cache


def _prompt_ids(engine: Engine, prompt: str, context: KVContext | None, chat: bool) -> list[int]:
    if context is None:
        return engine.prompts.prompt_ids(prompt, chat)
    return context.question(engine.prompts, prompt, chat)


def _operating_point(
    engine: Engine, options: ReportOptions, cost: CostModel | None, cache: KVCache
) -> OperatingPoint:
    """The target in bits, from what was asked; of a time, what the cost model expects to fit."""
    if cost is not None and options.tpot_ms is not None:
        cost.check(options.tpot_ms, engine.pairs(cache))
        target = round(cost.bits_for(options.tpot_ms, engine.pairs(cache)), 3)
        bound = (
            "memory binds: there are no more planes" if target >= cost.bits[-1] - 1e-3 else "latency binds"
        )
        why = (
            f"{options.tpot_ms:g} ms a token are held while text is generated; about {target:.2f} bits fit into them. "
            f"{bound[0].upper()}{bound[1:]}."
        )
    elif options.target_bits is not None:
        target, why = options.target_bits, f"The target of {options.target_bits:g} bits was asked for."
    else:
        target = min(DEFAULT_TARGET_BITS, resident_mean(engine.decoder))
        why = f"Nothing was asked for: the target is the default, {target:g} bits."
    policy = make_policy(OURS, target, engine.decoder, engine.profile)
    assert isinstance(policy, RateDistortionPolicy)
    lam = policy.profile.lambda_for(target, policy.planes) if policy.thresholds.numel() else 1.0
    return OperatingPoint(OURS, target, options.tpot_ms, round(math.log2(lam), 3), why)


def _aim(engine: Engine, operating: OperatingPoint, cost: CostModel | None) -> None:
    if cost is not None and operating.target_tpot_ms is not None:
        engine.hold_latency(operating.target_tpot_ms, cost)
    else:
        engine.set_policy(OURS, operating.target_bits)


def generate_at(
    engine: Engine, operating: OperatingPoint, prompt: str, options: GenerateOptions, context: KVContext | None,
    progress: Progress,
) -> tuple[Generation, tuple[KindBytes, ...]]:  # fmt: skip
    """A real generation at the operating point, and the bytes it read and held by kind."""
    read_before = 0 if context is None else context.cache.length
    asked = _prompt_ids(engine, prompt, context, options.chat)
    steps = []
    for step in engine.generate(prompt, options, context=context):
        steps.append(step)
        progress("generate", len(steps), options.max_new_tokens)
    progress("generate", len(steps), len(steps))
    if len(steps) < 2:
        raise InputError(
            "nothing was decoded: the text ended with its first token. Give another prompt, or more --max-new-tokens."
        )
    first = engine.decoder.groups[0]
    generation = Generation(
        prompt=prompt, prompt_tokens=len(asked), context_tokens=read_before, first=steps[0].text,
        ttft_ms=round(steps[0].tpot_ms, 3), seed_bits=first.seed_bits,
        resident_bits=max(g.resident_bits for g in engine.decoder.groups),
        groups=_groups(engine, operating.target_bits), tokens=tuple(_token(engine, s) for s in steps[1:]),
    )  # fmt: skip
    assert engine.policy is not None
    widths, cached = [t.bits for t in generation.tokens], [t.kv_bytes for t in generation.tokens]
    return generation, bytes_by_kind(engine.decoder, widths, engine.policy.extra_bytes, cached)


def _token(engine: Engine, step: Step) -> Token:
    return Token(
        label=engine.tokenizer.decode([step.token]), text=step.text, effective_bits=round(step.effective_bits, 4),
        tpot_ms=round(step.tpot_ms, 4), weight_bytes=step.weight_bytes, kv_bytes=step.kv_bytes, bits=tuple(step.bits),
    )  # fmt: skip


def _groups(engine: Engine, target_bits: float) -> tuple[GroupInfo, ...]:
    fixed = make_policy("static", target_bits, engine.decoder, engine.profile)
    assert isinstance(fixed, StaticPolicy)
    return tuple(
        GroupInfo(layer.index, g.name.rpartition(".")[2], g.weights, fixed.bits[g.index])
        for layer in engine.decoder.layers
        for g in (*layer.qkv, layer.o, *layer.gate_up, layer.down)
    )


def kept_pairs(context: KVContext | None) -> KeptPairs | None:
    """What a pruned context holds before the question."""
    if context is None:
        return None
    pairs = tuple(tuple(row) for row in context.cache.lengths.tolist())
    return KeptPairs(str(context.facts.get("policy", "unknown")), context.cache.length, pairs)
