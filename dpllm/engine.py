"""Text in, text out, a token at a time, at a chosen precision.

engine = load(target_bits=3.25)
for step in engine.generate("def main():", GenerateOptions(max_new_tokens=64)):
    print(step.text, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dpllm import reference
from dpllm.calib.profile import PROFILE_NAME, CalibrationProfile
from dpllm.decoder import Decoder
from dpllm.gpu_step import GpuStep, fast_step
from dpllm.kernels.errors import InputError
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.loading import LoadOptions, is_overlay, load_decoder
from dpllm.native import decode_one
from dpllm.policy import PrecisionPolicy, StaticPolicy, begin_text, make_policy, observe, resident_mean
from dpllm.quant.overlay import Overlay
from dpllm.quant.text import check_text, encode, load_tokenizer
from dpllm.sampling import sample

if TYPE_CHECKING:
    from dpllm.context import KVContext

PREFILL_CHUNK = 512
DEFAULT_TARGET_BITS = 3.5


@dataclass(frozen=True)
class GenerateOptions:
    """temperature 0 is greedy. stop: strings that end the text (not part of it)."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    chat: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; at least 1 is needed.")
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must lie in (0, 1].")
        if "" in self.stop:
            raise InputError("an empty stop string would stop at once. Give at least one character.")


@dataclass(frozen=True)
class Step:
    """One generated token. `text` is what became final with it (it may lag behind a stop string or a
    character that spans tokens); `tpot_ms` the time this token took, for the first one that of reading the
    prompt (at the resident maximum); `bits` the width of each group."""

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
        self.path, self.decoder, self.tokenizer, self.profile = path, decoder, tokenizer, profile
        self.quantized = not decoder.groups[0].dense
        self.native = fast_step(decoder)
        self._weights = sum(g.weights for g in decoder.groups)
        self._head_bytes = decoder.head_bytes()
        self.policy: PrecisionPolicy | None = None
        self.target_bits: float | None = None

    def set_policy(self, name: str, target_bits: float, seed: int = 0) -> None:
        """Changes policy or target; takes effect with the next token."""
        self.policy = make_policy(name, target_bits, self.decoder, self.profile, seed)
        self.target_bits = target_bits

    def prompt_ids(self, prompt: str, chat: bool = False) -> list[int]:
        """Token ids of a prompt. Raises InputError where it is empty, or a chat template is missing."""
        if not prompt:
            raise InputError("the prompt is empty. Give some text, or '-' to read it from standard input.")
        check_text(prompt, "the prompt")
        if chat:
            return list(self.chat_template([{"role": "user", "content": prompt}], tokenize=True))
        return encode(self.tokenizer, prompt)

    def chat_template(self, messages: list[dict[str, str]], tokenize: bool = False) -> Any:
        """Messages in the model's own frame, up to where its answer begins: text, or token ids."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(f"{self.path} has no chat template. Leave out --chat.")
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=tokenize, return_dict=False
        )

    def check_prompt(self, ids: Sequence[int], read: int = 0) -> None:
        """Raises InputError where the model cannot continue these tokens behind `read` others."""
        c = self.decoder.config
        if not ids:
            raise InputError("the prompt has no tokens: the tokenizer drops all of it. Give other text.")
        if max(ids) >= c.vocab_size:
            raise InputError(
                f"the tokenizer in {self.path} gives token {max(ids)}; the model knows {c.vocab_size}. "
                "Copy the model's own tokenizer files there."
            )
        if read + len(ids) >= c.max_positions:
            behind = f" behind {read} of context" if read else ""
            raise InputError(
                f"the prompt has {len(ids)} tokens{behind}; the model has {c.max_positions} positions. Shorten it."
            )

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
            self.prompt_ids(prompt, options.chat)
            if context is None
            else context.question(self, prompt, options.chat)
        )
        read = 0 if context is None else context.cache.length
        self.check_prompt(ids, read)
        budget = min(options.max_new_tokens, self.decoder.config.max_positions - read - len(ids))
        cache = self.decoder.new_cache(len(ids) + budget) if context is None else context.cache
        said: list[int] = []
        if context is not None:
            context.begin_turn()
        try:
            yield from self._generate(ids, cache, replace(options, max_new_tokens=budget), clock, began, said)
        finally:
            if context is not None:
                context.end_turn(ids, said, read, keep)

    def _generate(
        self, ids: list[int], cache: KVCache, options: GenerateOptions, clock: Callable[[], float], began: float,
        said: list[int],
    ) -> Iterator[Step]:  # fmt: skip
        """The steps behind ids; the tokens go to `said`."""
        budget = options.max_new_tokens
        generator = None if options.seed is None else torch.Generator().manual_seed(options.seed)
        cache.runs(len(ids) + budget)  # room for all of it at once
        pending = _Pending(self.tokenizer, options.stop)
        bits, chosen = None, self.policy
        deciding = None if chosen is None else begin_text(chosen)

        logits = self._prefill(torch.tensor(ids, device=self.decoder.device), cache)
        for count in range(budget):
            token, bits = self._token(logits, bits, options, generator)
            said.append(token)
            ms, ended = (clock() - began) * 1e3, token in self.decoder.config.eos_ids
            last = ended or count == budget - 1
            text = pending.push(None if ended else token, last=last)
            yield self._step(token, text, ms, cache, bits)
            if last or pending.stopped:
                return
            began = clock()
            if self.policy is not chosen:  # set_policy has been called since the last token
                chosen = self.policy
                deciding = None if chosen is None else begin_text(chosen)
            observe(deciding, logits, torch.tensor([token]))
            logits, bits = self._decode(token, cache, deciding)

    def _token(
        self, logits: torch.Tensor, bits: torch.Tensor | None, options: GenerateOptions,
        generator: torch.Generator | None,
    ) -> tuple[int, torch.Tensor | None]:  # fmt: skip
        """The next token, and the widths behind these logits on the CPU. On a GPU the one wait of a token is here."""
        step = self.native if bits is not None else None  # the first token comes from the prompt's logits
        if isinstance(step, GpuStep) and options.temperature == 0:
            return step.finished()
        token = sample(logits[-1], options.temperature, options.top_p, generator)
        return token, step.finished()[1] if isinstance(step, GpuStep) else bits

    @torch.no_grad()
    def _prefill(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits after the prompt, read at the resident maximum, chunk by chunk."""
        for chunk in ids.split(PREFILL_CHUNK):
            logits = self.decoder.forward(chunk, cache, last_only=True)
        return logits

    def _decode(
        self, token: int, cache: KVCache, policy: PrecisionPolicy | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [1, vocab] behind one more token, and the width of each group, int32 [1, G], if quantised."""
        if policy is None:
            if isinstance(self.native, GpuStep):
                return self.native(token, cache, None)
            with torch.no_grad():
                return self.decoder.forward(torch.tensor([token], device=self.decoder.device), cache), None
        return decode_one(self.decoder, self.native, token, cache, policy)

    def _step(self, token: int, text: str, ms: float, cache: KVCache, bits: torch.Tensor | None) -> Step:
        """bits: what this token read; None: the resident maximum, as for a prompt (0: never quantised)."""
        first = self.decoder.groups[0]
        widths = [g.resident_bits for g in self.decoder.groups] if bits is None else bits[0].tolist()
        if first.dense:
            return Step(token, text, 0.0, ms, self._head_bytes, cache.nbytes)
        used = sum(b * g.weights for b, g in zip(widths, self.decoder.groups, strict=True))
        read = sum(g.bytes_at[b - g.seed_bits] for b, g in zip(widths, self.decoder.groups, strict=True))
        choosing = self.policy.extra_bytes if bits is not None and self.policy is not None else 0
        return Step(
            token=token,
            text=text,
            effective_bits=used / self._weights,
            tpot_ms=ms,
            weight_bytes=read + self._head_bytes + choosing,
            kv_bytes=cache.nbytes,
            bits=widths if bits is not None else (),
        )


class _Pending:
    """Text that is decoded but not final: an unfinished character, or the start of a stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.sent = ""
        self.stopped = False

    def push(self, token: int | None, last: bool) -> str:
        """Adds a token (None: end of text) and returns what became final."""
        if token is not None:
            self.tokens.append(token)
        full = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        cut = min(
            (i for s in self.stop if (i := full.find(s, max(0, len(self.sent) - len(s)))) >= 0), default=-1
        )
        if cut >= 0:
            self.stopped = True
            full = full[:cut]
        elif not last:
            full = full[: len(full) - self._held_back(full)]
        text = full[len(self.sent) :]
        self.sent += text
        return text

    def _held_back(self, full: str) -> int:
        whole = full.rstrip("\ufffd")  # behind it, a character whose bytes are not all there yet
        starts = (
            n for s in self.stop for n in range(min(len(s) - 1, len(whole)), 0, -1) if whole.endswith(s[:n])
        )
        return len(full) - len(whole) + max(starts, default=0)


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
    if isinstance(engine.native, GpuStep):
        engine.native.prepare(engine.policy, progress)
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
