"""Text in, text out, a token at a time, at a chosen precision.

engine = load(target_bits=3.25)
for step in engine.generate("def main():", GenerateOptions(max_new_tokens=64)):
    print(step.text, end="", flush=True)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dpllm import reference
from dpllm.base.errors import InputError
from dpllm.base.text import load_tokenizer
from dpllm.calib.runtime.profile import PROFILE_NAME, CalibrationProfile
from dpllm.control.controller import LatencyController, QueryBudget
from dpllm.control.cost_model import CostModel
from dpllm.decode.choose_step import fast_step
from dpllm.decode.continuation import Continuation, Passed, Tally
from dpllm.decode.cpu_step import NativeStep
from dpllm.decode.gpu_step import GpuStep
from dpllm.decode.options import GenerateOptions
from dpllm.decode.prompting import Prompts
from dpllm.decode.sampling import Sampler
from dpllm.decode.speculation.draft_choice import Drafting
from dpllm.decode.speculation.drafts import Draft
from dpllm.decode.text_stream import TextStream
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.model.decoder import Decoder
from dpllm.model.loading import LoadOptions, is_overlay, load_decoder
from dpllm.policies.base import PrecisionPolicy, begin_text, observe
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.make import make_policy, resident_mean
from dpllm.policies.rate_distortion import RateDistortionPolicy
from dpllm.policies.token_limit import Prices
from dpllm.quant.overlay import Overlay

if TYPE_CHECKING:
    from dpllm.context.kv_context import KVContext

PREFILL_CHUNK = 512
DEFAULT_TARGET_BITS = 3.5


@dataclass(frozen=True)
class Step:
    """One generated token. `text` is what became final with it (it may lag behind a stop string or a
    character that spans tokens); `tpot_ms` the time this token took, for the first one that of reading the
    prompt (at the resident maximum); `bits` the width of each group. Tokens that one pass has checked share its time
    and its `weight_bytes`, those of drafting included, evenly; `bits` are those of the check."""

    token: int
    text: str
    effective_bits: float
    tpot_ms: float
    weight_bytes: int
    kv_bytes: int
    bits: Sequence[int] = field(default=(), repr=False)


class Engine:
    """A loaded model, its tokenizer, and the policy that answers to the target."""

    def __init__(self, path: Path, decoder: Decoder, tokenizer: Any, profile: CalibrationProfile | None):
        self.path, self.decoder, self.profile = path, decoder, profile
        self.prompts = Prompts(tokenizer, decoder.config, path)
        self.quantized = not decoder.groups[0].dense
        self.step = fast_step(decoder)
        self.native = self.step if isinstance(self.step, NativeStep) else None
        self._weights = sum(g.weights for g in decoder.groups)
        read = (g.bytes_at[-1] for g in decoder.groups) if self.quantized else ()
        self._resident_bytes = sum(read) + decoder.head_bytes()  # what a prompt reads
        self.policy: PrecisionPolicy | None = None
        self.target_bits: float | None = None
        self.tally = Tally()  # of the drafts of the last generation
        self.controller: LatencyController | QueryBudget | None = None
        self.drafting = Drafting(decoder)

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer of the model."""
        return self.prompts.tokenizer

    @property
    def planes(self) -> np.ndarray:
        """int64 [G]: planes held of each group."""
        return np.asarray([g.resident_bits for g in self.decoder.groups])

    def calibration(self) -> CalibrationProfile:
        """The profile. Raises InputError where there is none, so that there are no bits to choose or plan with."""
        if self.profile is None or not self.quantized:
            raise InputError(
                f"{self.path} has no calibration profile, so there is nothing to choose or plan with. "
                f"Run: dpllm calibrate {self.path}"
            )
        return self.profile

    def set_policy(self, name: str, target_bits: float, seed: int = 0) -> None:
        """Changes policy or target; takes effect with the next token."""
        self.policy = make_policy(name, target_bits, self.decoder, self.profile, seed)
        self.target_bits, self.controller = target_bits, None

    def hold_latency(self, target_ms: float, cost: CostModel, least_bits: float = 0.0) -> None:
        """From the next token on every token is to take this long, as well as can be. Called again, it moves the target
        and keeps what it knows of the machine. cost: of this engine. least_bits: to read whatever it
        takes."""
        if isinstance(self.controller, LatencyController) and self.controller.cost is cost:
            self.controller.retarget(target_ms, least_bits)
            return
        prices = Prices.in_nanoseconds(self.decoder.groups, cost.weights_ms[0], cost.plane_ms)
        controller = LatencyController(cost, target_ms, prices, least_bits=least_bits)
        self.set_policy("rate-distortion", controller.order(0).bits)
        self.controller, self.target_bits = controller, None

    def hold_budget(self, target_bits: float, burst: float = 1.0) -> None:
        """No text reads more than this many bits a weight on average, each by itself, beyond a start of `burst` tokens'
        worth."""
        self.set_policy("rate-distortion", target_bits)
        rate = self.bytes_for(target_bits)
        prices = Prices.in_bytes(self.decoder.groups)
        self.controller = QueryBudget(target_bits, rate, round(burst * rate), prices)

    def bytes_for(self, bits: float) -> int:
        """Bytes of planes, tables and scales that a token reads at so many bits everywhere, whole or in between."""
        low = math.floor(bits)
        below, above = (
            sum(
                g.bytes_at[min(max(b, g.seed_bits), g.resident_bits) - g.seed_bits]
                for g in self.decoder.groups
            )
            for b in (low, low + 1)
        )
        return math.floor(below + (bits - low) * (above - below))

    def generate(
        self,
        prompt: str,
        options: GenerateOptions = GenerateOptions(),
        clock: Callable[[], float] = time.perf_counter,
        *,
        context: KVContext | None = None,
        keep: bool = False,
    ) -> Iterator[Step]:
        """Yields a Step per token until the end-of-text token, a stop string or max_new_tokens.

        context: what the prompt is about; it is as before when the generator ends. keep: the prompt and what was
        generated stay in it, for another turn.
        """
        began = clock()
        ids = (
            self.prompts.prompt_ids(prompt, options.chat)
            if context is None
            else context.question(self.prompts, prompt, options.chat)
        )
        read = 0 if context is None else context.cache.length
        self.prompts.check_prompt(ids, read)
        budget = min(options.max_new_tokens, self.decoder.config.max_positions - read - len(ids))
        cache = self.decoder.new_cache(len(ids) + budget) if context is None else context.cache
        ahead = Continuation(self.decoder, self.step, cache, _sampler(options), clock)
        text = ids if context is None else [*context.ids, *ids]
        if drafts := self._drafts(options, text):
            pacer = self.drafting.pacer(options, self.policy, self.target_bits, drafts)
            ahead.speculate(text, drafts, pacer)
        self.tally = ahead.tally
        said: list[int] = []
        if isinstance(self.controller, QueryBudget):
            self.controller.reset()
        if context is not None:
            context.begin_turn()
        try:
            yield from self._generate(ids, ahead, replace(options, max_new_tokens=budget), began, said)
        finally:
            ahead.drop()
            if context is not None:
                context.end_turn(ids, said, read, keep)

    def _generate(
        self, ids: list[int], ahead: Continuation, options: GenerateOptions, began: float, said: list[int]
    ) -> Iterator[Step]:
        """The steps behind ids; the tokens go to `said`."""
        budget, clock, eos = options.max_new_tokens, ahead.clock, self._eos(options)
        ahead.cache.runs(len(ids) + budget)  # room for all of it at once
        pending = TextStream(self.tokenizer, options.stop)
        chosen = self.policy
        deciding = None if chosen is None else begin_text(chosen)
        ahead.follow(deciding)

        logits = self._prefill(torch.tensor(ids, device=self.decoder.device), ahead.cache)
        passed = Passed(ahead.draw(logits[-1]), logits, nbytes=self._resident_bytes)
        for count in range(budget):
            token = passed.token
            said.append(token)
            last = token in eos or count == budget - 1
            text = pending.push(None if token in eos else token, last=last)
            ms, nbytes = ahead.rest() if last or pending.stopped else (0.0, 0.0)
            ms += (clock() - began) * 1e3 + passed.ms
            step = self._step(replace(passed, ms=ms, nbytes=passed.nbytes + nbytes), text, ahead.cache)
            yield step
            self._record(step, ahead.cache)
            if last or pending.stopped:
                return
            began = clock()
            if self.policy is not chosen:  # set_policy has been called since the last token
                chosen = self.policy
                deciding = None if chosen is None else begin_text(chosen)
                ahead.follow(deciding)
            observe(deciding, passed.logits, torch.tensor([token]))
            self._steer(deciding, ahead.cache)
            passed = ahead.next(token, budget - count - 1)

    def _drafts(self, options: GenerateOptions, text: Sequence[int]) -> list[Draft]:
        """None under a budget: what a token may read depends on what the one before has read."""
        if not isinstance(self.controller, QueryBudget):
            return self.drafting.sources(options, self.policy, self.native, self.target_bits, text)
        if options.speculate in ("self", "lookup"):
            raise InputError(
                "a budget is kept token by token, so drafts cannot be checked together. Leave out --speculate."
            )
        return []

    def _eos(self, options: GenerateOptions) -> tuple[int, ...]:
        return () if options.ignore_eos else self.decoder.config.eos_ids

    def _steer(self, policy: PrecisionPolicy | None, cache: KVCache) -> None:
        """The controller's order for the next token."""
        if self.controller is None or not isinstance(policy, RateDistortionPolicy):
            return
        order = self.controller.order(self.pairs(cache))
        policy.steer(order.bits, order.allowance)

    def _record(self, step: Step, cache: KVCache) -> None:
        """Tells the controller what a token took; the first one is the prompt's."""
        if self.controller is None or not step.bits:
            return
        spent = self.controller.prices.of(step.bits)
        if isinstance(self.controller, QueryBudget):
            self.controller.record(spent)
        else:
            self.controller.record(step.tpot_ms, spent, self.pairs(cache))

    def pairs(self, cache: KVCache) -> float:
        """Pairs the cache holds, over all layers and heads."""
        c = self.decoder.config
        return cache.nbytes / (2 * c.head_dim * self.decoder.kv_dtype.itemsize)

    def decode_after(
        self, context: int, tokens: int, policy: PrecisionPolicy, behind: KVCache | None = None
    ) -> Iterator[Step]:
        """Steps of so many tokens behind a cache of `context` ones that were never read, or a given cache, which is as
        before in the end: for measuring time alone."""
        cache: KVCache
        if behind is None:
            cache = self.decoder.new_cache(context + tokens + 2)
            cache.advance(context)
        else:
            cache = behind
        start = cache.length
        ahead = Continuation(self.decoder, self.step, cache, Sampler(), time.perf_counter)
        before, self.policy, controller = self.policy, policy, self.controller
        self.controller = None
        options = GenerateOptions(tokens + 1, speculate="off", ignore_eos=True)
        try:
            yield from islice(self._generate([0], ahead, options, time.perf_counter(), []), 1, None)
        finally:
            self.policy, self.controller = before, controller
            cache.rewind(start)

    @torch.no_grad()
    def _prefill(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits after the prompt, read at the resident maximum, chunk by chunk."""
        for chunk in ids.split(PREFILL_CHUNK):
            logits = self.decoder.forward(chunk, cache, last_only=True)
        return logits

    def _step(self, passed: Passed, text: str, cache: KVCache) -> Step:
        """Of a token; without bits it was read at the resident maximum, as a prompt is, or never quantised."""
        if not self.quantized:
            return Step(passed.token, text, 0.0, passed.ms, round(passed.nbytes), cache.nbytes)
        read = None if passed.bits is None else passed.bits[0].tolist()
        widths = [g.resident_bits for g in self.decoder.groups] if read is None else read
        used = sum(b * g.weights for b, g in zip(widths, self.decoder.groups, strict=True))
        return Step(
            token=passed.token,
            text=text,
            effective_bits=used / self._weights,
            tpot_ms=passed.ms,
            weight_bytes=round(passed.nbytes),
            kv_bytes=cache.nbytes,
            bits=read or (),
        )


def _sampler(options: GenerateOptions) -> Sampler:
    if options.seed is None:
        return Sampler(options.temperature, options.top_p)
    return Sampler(options.temperature, options.top_p, torch.Generator().manual_seed(options.seed))


def load(
    path: str | Path | None = None,
    *,
    target_bits: float | None = None,
    policy: str | None = None,
    profile: str | Path | None = None,
    options: LoadOptions | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Engine:
    """Loads an overlay or a plain checkpoint (None: the bundled reference model's overlay).

    target_bits, policy: default rate-distortion at 3.5 bits where a profile lies beside the overlay, else
    every resident plane. progress: told what takes a while on a GPU, where the decode step is compiled and captured.
    Raises InputError for anything that cannot be loaded or met.
    """
    engine = _loaded(path, target_bits, policy, profile, options)
    if isinstance(engine.step, GpuStep):
        engine.step.prepare(engine.policy, progress)
    return engine


def _loaded(
    path: str | Path | None, target_bits: float | None, policy: str | None, profile: str | Path | None,
    options: LoadOptions | None,
) -> Engine:  # fmt: skip
    where = reference.overlay_path() if path is None else Path(path)
    if not where.is_dir():
        raise InputError(
            f"{where} is no directory. Give an overlay (dpllm quantize MODEL OUT) or a model directory."
        )
    quantized = is_overlay(where)
    beside = where / PROFILE_NAME if profile is None else Path(profile)
    found = None
    if quantized and (profile is not None or beside.exists()):
        found = CalibrationProfile.load(beside, Overlay.open(where).hash)
    options = options or LoadOptions()
    if found is not None:
        options = LoadOptions(**options.__dict__ | {"granularity": found.granularity})
    engine = Engine(where, load_decoder(where, options), load_tokenizer(where), found)
    if not quantized:
        if target_bits is not None or policy is not None:
            raise InputError(
                f"{where} is not quantised, so it has one precision. Run: dpllm quantize {where} OUT"
            )
        return engine
    held = resident_mean(engine.decoder)
    if policy is None and target_bits is None and found is None:
        engine.policy = StaticPolicy([g.resident_bits for g in engine.decoder.groups], name="uniform")
        engine.target_bits = held
        return engine
    if target_bits is None:
        target_bits = min(DEFAULT_TARGET_BITS, held)
    engine.set_policy(policy or ("rate-distortion" if found else "uniform"), target_bits)
    return engine
