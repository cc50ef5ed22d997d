"""Text in, text out, a token at a time, at a chosen precision.

engine = dpllm.load(target_bits=3.25)
for step in engine.generate("def main():", max_new_tokens=64):
    print(step.text, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dpllm.accounting import Text, accounted_steps
from dpllm.base import forking
from dpllm.base.errors import InputError
from dpllm.base.processes import StaysInProcess
from dpllm.base.progress import Progress, no_progress
from dpllm.base.shell import command_line
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.context.build import build_context, prune_tail
from dpllm.context.kv_context import KVContext
from dpllm.context.options import DEFAULT_KEEP, ContextOptions
from dpllm.control.controller import ControlOptions, LatencyController, QueryBudget
from dpllm.control.cost_model import CostModel
from dpllm.control.pilot import Pilot
from dpllm.decode.choose_step import StepMaker
from dpllm.decode.continuation import Continuation
from dpllm.decode.generation import Generation, Step
from dpllm.decode.gpu_step import GpuStep
from dpllm.decode.options import GenerateOptions, options_of
from dpllm.decode.prompting import Prompts
from dpllm.decode.sampling import Sampler
from dpllm.decode.speculation.continuation import SpeculativeContinuation
from dpllm.decode.speculation.draft_choice import DraftChoice
from dpllm.decode.speculation.drafts import Draft
from dpllm.decode.speculation.tally import Tally
from dpllm.decode.step import TokenStep
from dpllm.evaluation.text_score import TextScore, score_text
from dpllm.kvzip_bridge.budget import Budget
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.model.decoder import Decoder
from dpllm.policies.base import PrecisionPolicy
from dpllm.policies.make import make_policy
from dpllm.policies.token_limit import WidthCosts


class Engine(StaysInProcess):
    """A loaded model, its tokenizer, and the policy that answers to the target.

    Several texts may be generated at once, in one thread or in several: what belongs to a text is not shared. Made by
    `dpllm.load`.
    """

    def __init__(
        self, path: Path, decoder: Decoder, tokenizer: Any, profile: CalibrationProfile | None,
        measure_cost: Callable[[Engine], CostModel] | None = None,
    ):  # fmt: skip
        """measure_cost: gives the cost model of an engine, stored or measured, for targets in milliseconds."""
        self.path, self.decoder, self.profile = path, decoder, profile
        self.prompts = Prompts(tokenizer, decoder.config, path)
        self.quantized = not decoder.groups[0].dense
        self.policy: PrecisionPolicy | None = None
        self.target_bits: float | None = None
        self.controller: LatencyController | QueryBudget | None = None
        self._measure_cost = measure_cost
        self._aiming = forking.lock()  # policy, target and controller change together
        self._steps = StepMaker(decoder)
        self._draft_choice = DraftChoice(decoder, self._steps.new, fast=self._steps.native is not None)
        self._weights = sum(g.weights for g in decoder.groups)

    def __repr__(self) -> str:
        policy = "no policy" if self.policy is None else f"policy {self.policy.name}"
        target = "" if self.target_bits is None else f" at {self.target_bits:g} bits"
        return f"<Engine {self.path}: {policy}{target}, backend {self.decoder.backend.name}>"

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer of the model."""
        return self.prompts.tokenizer

    @property
    def planes(self) -> np.ndarray:
        """int64 [G]: planes held of each group."""
        return np.asarray([g.resident_bits for g in self.decoder.groups])

    def new_step(self) -> TokenStep:
        """A decode step for one text: the fastest that this model and machine have."""
        return self._steps.new()

    def prepare(self, progress: Callable[[str], None]) -> None:
        """Compiles and captures the decode step where the model lies on a GPU; elsewhere there is nothing to do."""
        if isinstance(step := self._steps.new(), GpuStep):
            step.prepare(None if self.policy is None else self.policy.begin_text(), progress)

    def calibration(self) -> CalibrationProfile:
        """The calibration profile. Raises InputError where there is none, so that there are no bits to choose."""
        if self.profile is None or not self.quantized:
            raise InputError(
                f"{self.path} has no calibration profile, so there is nothing to choose or plan with. "
                f"Run: {command_line('calibrate', self.path)}"
            )
        return self.profile

    # -- targets -----------------------------------------------------------------------------------------

    def set_policy(self, name: str, target_bits: float, seed: int = 0) -> None:
        """Changes policy or target; takes effect with the next token. Raises InputError for what cannot be met."""
        policy = make_policy(name, target_bits, self.decoder, self.profile, seed)
        with self._aiming:
            self.policy, self.target_bits, self.controller = policy, target_bits, None

    def set_target(
        self,
        *,
        bits: int | None = None,
        target_bits: float | None = None,
        tpot_ms: float | None = None,
        least_bits: float = 0.0,
        headroom: float | None = None,
    ) -> None:
        """Changes the target from the next token on. Give one of bits, target_bits, tpot_ms.

        bits: read exactly this width everywhere. target_bits: mean bits per weight, chosen per layer and token.
        tpot_ms: milliseconds per token to hold; least_bits: to read at least, whatever time they take; headroom: the
        most that one token may take over the mean, e.g. 1.1 for a tenth (see ControlOptions). Raises InputError for a
        target that cannot be met.
        """
        if sum(x is not None for x in (bits, target_bits, tpot_ms)) != 1:
            raise InputError("a target is one of bits, target_bits and tpot_ms. Give exactly one of them.")
        if bits is not None:
            self.set_policy("uniform", float(bits))
        elif target_bits is not None:
            self.set_policy("rate-distortion", target_bits)
        elif tpot_ms is not None:
            self.calibration()
            if self._measure_cost is None:
                raise InputError(
                    "this engine has no cost model. Load it with dpllm.load, or call hold_latency."
                )
            cost = self._measure_cost(self)
            cost.check(tpot_ms, least_bits=least_bits)
            self.hold_latency(tpot_ms, cost, least_bits, headroom)

    def hold_latency(
        self, target_ms: float, cost: CostModel, least_bits: float = 0.0, headroom: float | None = None
    ) -> None:
        """Holds the time per token at target_ms milliseconds from the next token on, as well as can be.

        Called again with the same cost model, it moves the target and keeps what it knows of the machine. cost: of this
        engine. least_bits: to read at least, whatever time they take. headroom: see ControlOptions.
        """
        current = self.controller
        if isinstance(current, LatencyController) and current.cost is cost:
            current.retarget(target_ms, least_bits)
            return
        width_costs = WidthCosts.in_nanoseconds(self.decoder.groups, cost.weights_ms[0], cost.plane_ms)
        options = ControlOptions() if headroom is None else ControlOptions(headroom=headroom)
        controller = LatencyController(cost, target_ms, width_costs, options, least_bits)
        with self._aiming:
            self.set_policy("rate-distortion", controller.order(0).bits)
            self.controller, self.target_bits = controller, None

    def hold_budget(self, target_bits: float, burst: float = 1.0) -> None:
        """Bounds what each text reads: no more than target_bits per weight on average, beyond a start worth `burst`
        tokens."""
        rate = self.decoder.bytes_for(target_bits)
        width_costs = WidthCosts.in_bytes(self.decoder.groups)
        with self._aiming:
            self.set_policy("rate-distortion", target_bits)
            self.controller = QueryBudget(target_bits, rate, round(burst * rate), width_costs)

    # -- generating --------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_tokens: str | int | Sequence[str | int] = (),
        chat: bool = False,
        context: KVContext | None = None,
        keep: bool = False,
        speculate: str = "auto",
        draft_bits: int | None = None,
    ) -> Generation:
        """Continues a prompt. Returns a Generation: iterate over its steps, or ask for its `text`.

        temperature 0 takes the likeliest token. top_k, top_p, min_p, repetition_penalty, seed: see SamplingOptions.
        stop: strings that end the text and are not part of it. stop_tokens: tokens that do so too, as texts or ids.
        chat: puts the prompt into the model's chat template.
        context: a text read before (`read`), which the prompt is about; the context is as before when the generation
        ends. keep: the prompt and the generated text stay in the context, for another turn. speculate, draft_bits:
        see GenerateOptions.

        The text ends with an end token, a stop token, a stop string, max_new_tokens, or the model's positions. Raises
        InputError for
        arguments that are not possible, before anything is generated.
        """
        options = GenerateOptions(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
            repetition_penalty=repetition_penalty, seed=seed, stop=stop if isinstance(stop, str) else tuple(stop),
            stop_tokens=stop_tokens if isinstance(stop_tokens, str | int) else tuple(stop_tokens), chat=chat,
            speculate=speculate, draft_bits=draft_bits,
        )  # fmt: skip
        return self.generate_with(prompt, options, context=context, keep=keep)

    def generate_with(
        self,
        prompt: str,
        options: GenerateOptions,
        *,
        context: KVContext | None = None,
        keep: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Generation:
        """`generate` with its options as one object. clock: gives the time in seconds."""
        if context is None:
            read, ids = 0, self.prompts.prompt_ids(prompt, options.chat)
        else:
            read = len(context.ids)  # before the question: another thread's turn may end in between
            ids = context.question(self.prompts, prompt, options.chat)
        return self._generation(Text(ids, options, context, keep, clock, read=read))

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Generation:
        """Answers a conversation. messages: dicts with "role" and "content", as transformers' chat templates take.

        options: those of `generate`. Raises InputError where the model has no chat template.
        """
        chosen = options_of(options)
        ids = list(self.prompts.chat_template([dict(m) for m in messages], tokenize=True))
        return self._generation(Text(ids, chosen))

    def read(
        self,
        text: str,
        keep: float = DEFAULT_KEEP,
        *,
        budget: Budget | None = None,
        policy: str = "kvzip",
        allocation: str | None = None,
        block: int | None = None,
        chunk: int | None = None,
        chat: bool = False,
        progress: Progress = no_progress,
    ) -> KVContext:
        """Reads a text once, prunes its KV cache, and returns it to be asked often: `generate(..., context=...)`.

        keep: share of the cache's pairs to keep; or budget: another budget, such as Budget(tokens=1024). policy,
        allocation, block, chunk, chat: see ContextOptions. progress: called with (stage, tokens done, tokens in all).
        Raises InputError for an empty text, a text too long for the model, or a budget that cannot be met.
        """
        options = ContextOptions(budget or Budget(keep_ratio=keep), policy, allocation, block, chunk, chat)
        return build_context(
            text, options, progress, decoder=self.decoder, prompts=self.prompts, profile=self.profile
        )

    def prune(self, context: KVContext, options: ContextOptions = ContextOptions()) -> None:
        """Prunes what a conversation has added to a context since it was last pruned.

        The budget is that of both together. Interrupted, the context is as before. Raises InputError where the budget
        leaves nothing to the conversation, and while a question is being answered.
        """
        with context.at_rest():
            prune_tail(context, options, decoder=self.decoder, prompts=self.prompts, profile=self.profile)

    def score(self, text: str) -> TextScore:
        """Log probabilities of a text's tokens, every token decoded as `generate` would: at its own widths.

        Raises InputError for a text of fewer than two tokens, or of more than the model's positions.
        """
        ids = self.prompts.prompt_ids(text)
        self.prompts.check_prompt(ids[:-1] or ids)
        self.prompts.check_tokens(ids)
        if len(ids) < 2:
            raise InputError("a text of one token has no token to predict. Give a longer text.")
        return score_text(self.new_step(), self.policy, self.decoder.new_cache(len(ids)), ids)

    def _generation(self, text: Text) -> Generation:
        """Checks the rest of what can be checked, and prepares the loop."""
        context, ids, read = text.context, text.ids, text.read
        self.prompts.check_prompt(ids, read)
        stops = self.prompts.stop_ids(text.options.stop_token_names, text.options.stop_strings)
        limit = min(text.options.max_new_tokens, self.decoder.config.max_positions - read - len(ids))
        cache: KVCache = self.decoder.new_cache(len(ids) + limit) if context is None else context.cache
        before = [] if context is None else context.ids[:read]
        continuation = self._continuation(text, cache, before)
        tally = continuation.tally if isinstance(continuation, SpeculativeContinuation) else Tally()
        generation = Generation(quantized=self.quantized, tally=tally)
        generation.begin(self._steps_of(text, continuation, limit, generation, stops))
        return generation

    def _steps_of(
        self,
        text: Text,
        continuation: Continuation,
        limit: int,
        generation: Generation,
        stops: frozenset[int] = frozenset(),
    ) -> Generator[Step, None, None]:
        """The steps of a text. The generator itself is returned, because every frame costs time at each token."""
        pilot = Pilot(self, lambda: self.decoder.pairs_in(continuation.cache), text.policy)
        return accounted_steps(
            text, continuation, pilot, generation, limit=limit, tokenizer=self.tokenizer, stops=stops
        )

    def _continuation(self, text: Text, cache: KVCache, before: Sequence[int]) -> Continuation:
        """The loop of a text, with drafts where they were asked for or pay."""
        sampler = Sampler(text.options.sampling(), self.decoder.backend.cpu)
        sampler.read(before)
        sampler.read(text.ids)
        drafts = self._drafts(text.options, [*before, *text.ids])
        if not drafts:
            return Continuation(self.decoder, self.new_step(), cache, sampler, text.clock)
        lengths = self._draft_choice.lengths(text.options, self.policy, self.target_bits, drafts)
        return SpeculativeContinuation(
            self.decoder, self.new_step(), cache, sampler,
            drafts=drafts, lengths=lengths, clock=text.clock, before=before,
        )  # fmt: skip

    def _drafts(self, options: GenerateOptions, text: Sequence[int]) -> list[Draft]:
        """No drafts under a budget: what a token may read depends on what the one before has read."""
        if not isinstance(self.controller, QueryBudget):
            return self._draft_choice.sources(options, self.policy, self.target_bits, text)
        if options.speculate in ("self", "lookup"):
            raise InputError(
                "a budget is kept token by token, so drafts cannot be checked together. Leave out --speculate."
            )
        return []

    # -- measuring ---------------------------------------------------------------------------------------

    def decode_after(
        self, context: int, tokens: int, policy: PrecisionPolicy, after: KVCache | None = None
    ) -> Iterator[Step]:
        """Steps of `tokens` tokens under a policy, to measure their time alone.

        context: tokens in the cache, whose pairs were never written; or `after`: a cache to decode after, which is as
        before in the end.
        """
        cache: KVCache
        if after is None:
            cache = self.decoder.new_cache(context + tokens + 2)
            cache.advance(context)
        else:
            cache = after
        start = cache.length
        options = GenerateOptions(tokens + 1, speculate="off", ignore_eos=True)
        text = Text([0], options, policy=policy)
        continuation = Continuation(self.decoder, self.new_step(), cache, Sampler())
        generation = Generation(quantized=self.quantized, tally=Tally())
        try:
            yield from islice(self._steps_of(text, continuation, tokens + 1, generation), 1, None)
        finally:
            cache.rewind(start)
