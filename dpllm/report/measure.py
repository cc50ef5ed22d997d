"""Measures a report: chooses the operating point, generates text there, and measures quality, time and memory."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from dpllm.base.errors import InputError
from dpllm.base.progress import Progress
from dpllm.context.kv_context import KVContext
from dpllm.control.cost_model import CostModel
from dpllm.decode.continuation import read_prompt
from dpllm.decode.generation import Step
from dpllm.decode.options import GenerateOptions
from dpllm.engine import Engine
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.opening import DEFAULT_TARGET_BITS
from dpllm.planning.cost_measurement import cost_of
from dpllm.planning.host import host_facts
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.make import make_policy, resident_mean
from dpllm.policies.rate_distortion import RateDistortionPolicy
from dpllm.report import query_spread
from dpllm.report.accounting import bytes_by_kind
from dpllm.report.data import Generation, GroupInfo, KeptPairs, KindBytes, OperatingPoint, Report, Token
from dpllm.report.frontier import OURS, cells_of, default_targets, measure_frontier
from dpllm.report.timed_steps import BLOCK

WINDOW, PIECES = 256, 8  # most tokens of a scored piece of text; fewest pieces, for the intervals


@dataclass(frozen=True)
class ReportOptions:
    """The targets of a report and the amount of text to measure.

    target_bits or tpot_ms: the target, in effective bits or in ms per token; if both are None, 3.5 bits or all that is
    resident. policies: the policies of the curves in addition to rate-distortion; None: static and, if it was
    calibrated, DP-LLM. targets: the targets of the curves, in bits; None: five. scored_tokens: tokens to score.
    queries: queries to decode. Raises InputError for targets that exclude each other or are out of range.
    """

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
                f"--tpot-ms {self.tpot_ms:g} is not a time. Give milliseconds per token, such as 25."
            )


@dataclass(frozen=True)
class ReportInputs:
    """The model's input and the names that a report shows.

    prompt: the text to continue. documents: token ids of the text that is scored; text: its name. generate: how to
    continue the prompt. context: a pruned context in front of the prompt, or None. model: the model's name. command:
    the command line. began: `time.perf_counter()` at the start of the command, in seconds.
    """

    prompt: str
    documents: Sequence[Sequence[int]]
    text: str
    generate: GenerateOptions
    context: KVContext | None
    model: str
    command: str
    began: float


def measure_report(engine: Engine, given: ReportInputs, options: ReportOptions, progress: Progress) -> Report:
    """Measures everything that a report shows, now and on this machine.

    Raises InputError for a target that cannot be met, a policy that was not calibrated, or text that is too short.
    """
    prompt, documents, generate, context = given.prompt, given.documents, given.generate, given.context
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
    cells_of(
        engine, names, targets, explicit
    )  # refuse an impossible target before minutes are spent on the others
    cache = _prompt_cache(engine, prompt, context, generate.chat)
    cost = None if options.tpot_ms is None else cost_of(engine, progress=progress)
    operating = _operating_point(engine, options, cost, cache)
    cells, notes = cells_of(engine, names, sorted({*targets, operating.target_bits}), explicit)
    _aim(engine, operating, cost)
    generation, nbytes = generate_at(engine, operating, prompt, generate, context, progress)
    frontier = measure_frontier(engine, cells, cache, pieces, given.text, notes, progress)
    levels = query_spread.measure_query_spread(engine, operating.target_bits, queries, progress)
    return Report(
        model=given.model, command=given.command, date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        seconds=round(time.perf_counter() - given.began, 1), machine=host_facts(engine.decoder), operating=operating,
        generation=generation, frontier=frontier, kept=kept_pairs(context), nbytes=nbytes, service=levels,
    )  # fmt: skip


def windows(documents: Sequence[Sequence[int]], size: int, total: int, shortest: int) -> list[list[int]]:
    """Returns pieces of `shortest` to `size` tokens, spread evenly over the documents, about `total` tokens in all."""
    pieces = [list(d[i : i + size]) for d in documents for i in range(0, len(d), size)]
    pieces = [p for p in pieces if len(p) >= shortest]
    wanted = max(1, round(total / size))
    if len(pieces) <= wanted:
        return pieces
    return [pieces[i] for i in np.linspace(0, len(pieces) - 1, wanted).round().astype(int)]


def _queries(documents: Sequence[Sequence[int]], options: ReportOptions) -> list[list[int]]:
    size = query_spread.PROMPT + query_spread.NEW
    shortest = query_spread.PROMPT + query_spread.SHORTEST
    found = windows(documents, size, size * options.queries, shortest)
    if not found:
        raise InputError(
            f"the text is too short: its longest document has {max(map(len, documents))} tokens, and {shortest} are "
            "needed to decode a query. Give a longer --text."
        )
    return found


def _prompt_cache(engine: Engine, prompt: str, context: KVContext | None, chat: bool) -> KVCache:
    """Reads the context and the prompt into a cache that has room to time steps after them."""
    ids = _prompt_ids(engine, prompt, context, chat)
    before, room = 0 if context is None else context.cache.length, BLOCK + 1
    engine.prompts.check_prompt(ids, before)
    if (left := engine.decoder.config.max_positions - before - len(ids)) < room:
        raise InputError(
            f"the prompt leaves {left} of the model's {engine.decoder.config.max_positions} positions; {room} are "
            "needed to time steps after it. Shorten the prompt."
        )
    cache: KVCache
    if context is None:
        cache = engine.decoder.new_cache(len(ids) + room)
    else:
        cache = context.cache.fork(len(ids) + room)
    read_prompt(engine.decoder, ids, cache)
    return cache


def _prompt_ids(engine: Engine, prompt: str, context: KVContext | None, chat: bool) -> list[int]:
    if context is None:
        return engine.prompts.prompt_ids(prompt, chat)
    return context.question(engine.prompts, prompt, chat)


def _operating_point(
    engine: Engine, options: ReportOptions, cost: CostModel | None, cache: KVCache
) -> OperatingPoint:
    """Returns the target in bits that meets the options. For a target in ms, the cost model predicts the bits."""
    if cost is not None and options.tpot_ms is not None:
        cost.check(options.tpot_ms, engine.decoder.pairs_in(cache))
        target = round(cost.bits_for(options.tpot_ms - cost.other_ms, engine.decoder.pairs_in(cache)), 3)
        bound = (
            "memory binds: there are no more planes" if target >= cost.bits[-1] - 1e-3 else "latency binds"
        )
        why = (
            f"{options.tpot_ms:g} ms a token are held while text is generated; about {target:.2f} bits fit into that "
            f"time. {bound[0].upper()}{bound[1:]}."
        )
    elif options.target_bits is not None:
        target, why = options.target_bits, f"The target of {options.target_bits:g} bits was asked for."
    else:
        target = min(DEFAULT_TARGET_BITS, resident_mean(engine.decoder))
        why = f"Nothing was asked for: the target is the default, {target:g} bits."
    policy = make_policy(OURS, target, engine.decoder, engine.profile)
    assert isinstance(policy, RateDistortionPolicy)
    return OperatingPoint(OURS, target, options.tpot_ms, round(math.log2(policy.lam), 3), why)


def _aim(engine: Engine, operating: OperatingPoint, cost: CostModel | None) -> None:
    if cost is not None and operating.target_tpot_ms is not None:
        engine.hold_latency(operating.target_tpot_ms, cost)
    else:
        engine.set_policy(OURS, operating.target_bits)


def generate_at(
    engine: Engine, operating: OperatingPoint, prompt: str, options: GenerateOptions, context: KVContext | None,
    progress: Progress,
) -> tuple[Generation, tuple[KindBytes, ...]]:  # fmt: skip
    """Generates text at the operating point. Returns the generation and the bytes it read and held, by kind."""
    read_before = 0 if context is None else context.cache.length
    asked = _prompt_ids(engine, prompt, context, options.chat)
    steps = []
    for step in engine.generate_with(prompt, options, context=context):
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
        ttft_ms=round(steps[0].ms, 3), seed_bits=first.seed_bits,
        resident_bits=max(g.resident_bits for g in engine.decoder.groups),
        groups=_groups(engine, operating.target_bits), tokens=tuple(_token(engine, s) for s in steps[1:]),
    )  # fmt: skip
    assert engine.policy is not None
    widths, cached = [t.bits for t in generation.tokens], [t.kv_bytes for t in generation.tokens]
    return generation, bytes_by_kind(engine.decoder, widths, engine.policy.extra_bytes, cached)


def _token(engine: Engine, step: Step) -> Token:
    return Token(
        label=engine.tokenizer.decode([step.token]), text=step.text, effective_bits=round(step.effective_bits, 4),
        tpot_ms=round(step.ms, 4), weight_bytes=step.weight_bytes, kv_bytes=step.kv_bytes, bits=tuple(step.bits),
    )  # fmt: skip


def _groups(engine: Engine, target_bits: float) -> tuple[GroupInfo, ...]:
    fixed = make_policy("static", target_bits, engine.decoder, engine.profile)
    assert isinstance(fixed, StaticPolicy)
    return tuple(
        GroupInfo(layer.index, g.name.rpartition(".")[2], g.weights, fixed.fixed_bits[g.index])
        for layer in engine.decoder.layers
        for g in (*layer.qkv, layer.o, *layer.gate_up, layer.down)
    )


def kept_pairs(context: KVContext | None) -> KeptPairs | None:
    """Returns the pairs that a pruned context holds before the question, or None without a context."""
    if context is None:
        return None
    pairs = tuple(tuple(row) for row in context.cache.lengths.tolist())
    return KeptPairs(str(context.facts.get("policy", "unknown")), context.cache.length, pairs)
