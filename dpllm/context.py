"""A text read once, its KV cache pruned, and then asked many questions.

    context = build_context(engine, text, ContextOptions(Budget(keep_ratio=0.3)))
    for step in engine.generate("What does it say about bees?", context=context):
        print(step.text, end="")

A question and its answer are forgotten afterwards, unless the conversation is to go on (`keep=True`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpllm.kernels.errors import InputError
from dpllm.kv_view import view_of
from dpllm.kvzip_bridge.budget import ALLOCATIONS, Budget
from dpllm.kvzip_bridge.policies import make_kv_policy
from dpllm.kvzip_bridge.policy import Context, KVPolicy, RepeatPrompts
from dpllm.kvzip_bridge.ragged import RaggedKVCache
from dpllm.kvzip_bridge.recording import Queries, QueriesWanted, WatchedCache
from dpllm.quant.text import encode

if TYPE_CHECKING:
    from dpllm.engine import Engine

REPEAT_ALL = "\n\nRepeat the previous context exactly."
REPEAT_FROM = "\n\nRepeat the part of the previous context exactly, starting with "
SINKS = (
    4  # first tokens of any text, on which attention rests (StreamingLLM, arXiv:2309.17453): never evicted
)
SMALLEST_BLOCK = 32
REQUEST = 256  # tokens of room for what asks for a repetition
DEFAULT_KEEP = 0.3  # what the paper finds near-lossless
HEADS = "kv.heads"  # of a calibration profile's extra arrays: float32 [P, KVH], the most a head's pairs were ever worth
PIECE = 512  # tokens of the text in one forward pass

Progress = Callable[[str, int, int], None]  # (stage, done, total)


@dataclass(frozen=True)
class ContextOptions:
    """How a context is read and pruned.

    policy: a KV policy's name. allocation: how the budget is spread, by a name of ALLOCATIONS; None: as the policy's
    paper does. block: prune after every so many tokens, so that the whole cache never exists; None: once, at the end.
    chunk: tokens that the model is asked to repeat at a time, by policies that ask it. chat: the text is part of a
    chat message."""

    budget: Budget = field(default_factory=lambda: Budget(keep_ratio=DEFAULT_KEEP))
    policy: str = "kvzip"
    allocation: str | None = None
    block: int | None = None
    chunk: int = 2048
    chat: bool = False

    def __post_init__(self) -> None:
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            known = ", ".join(ALLOCATIONS)
            raise InputError(f"allocation '{self.allocation}' is unknown. Choose one of: {known}.")
        for name, size in (("block", self.block), ("chunk", self.chunk)):
            if size is not None and size < SMALLEST_BLOCK:
                raise InputError(
                    f"a {name} of {size} tokens is too small; at least {SMALLEST_BLOCK} are needed."
                )


@dataclass
class KVContext:
    """A pruned cache and what is needed to go on from it.

    ids: the tokens the cache has read. protected: how many leading ones are never evicted. behind, between: what a chat
    template puts behind a question, and between an answer and the next one. pending: the end of the last answer, not
    read yet. facts: how it was made."""

    cache: RaggedKVCache
    ids: list[int] = field(default_factory=list)
    protected: int = 0
    behind: str = ""
    between: str = ""
    pending: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def question(self, engine: Engine, prompt: str, chat: bool) -> list[int]:
        """Token ids of what is asked next. Raises InputError for an empty prompt, or a chat where there is none."""
        if not prompt:
            raise InputError("the prompt is empty. Give some text, or '-' to read it from standard input.")
        if chat and not self.behind:
            raise InputError(
                "the context was not built as a chat. Leave out --chat, or build it with --chat."
            )
        return [
            *self.pending,
            *plain_ids(engine, (self.between if self.pending else "") + prompt + self.behind),
        ]

    def end_turn(self, tokens: Sequence[int], read: int, keep: bool) -> None:
        """After a question and its answer, of which the cache has read what lies behind its first `read` tokens."""
        if not keep:
            self.cache.rewind(read)
            return
        count = self.cache.length - read
        self.ids += tokens[:count]
        self.pending = list(tokens[count:])

    @property
    def kept_ratio(self) -> float:
        """Pairs held over pairs read, all layers and heads."""
        lengths = self.cache.lengths
        return float(lengths.sum()) / max(1, lengths.numel() * self.cache.length)


def build_context(
    engine: Engine,
    text: str,
    options: ContextOptions = ContextOptions(),
    progress: Progress = lambda *_: None,
) -> KVContext:
    """Reads a text at the resident maximum and prunes its cache.

    Raises InputError for an empty text, one too long for the model, or a budget that cannot be met.
    """
    if not text.strip():
        raise InputError("the context is empty. Give some text.")
    before, behind, between = chat_frame(engine) if options.chat else ("", "", "")
    lead = plain_ids(engine, before)
    ids = [*lead, *plain_ids(engine, text)] if options.chat else encode(engine.tokenizer, text)
    engine.check_prompt(ids)
    context = KVContext(engine.decoder.new_ragged_cache(0), behind=behind, between=between)
    context.protected = max(len(lead), min(SINKS, len(ids)))
    pruner = Pruner(engine, context, options)
    whole = pruner.share(len(ids))  # raises before anything is read
    block = options.block or len(ids)
    for start in range(0, len(ids), block):
        pruner.read(ids[start : start + block], partial(_reading, progress, start, len(ids)))
        pruner.prune(whole)
        progress("pruning", min(len(ids), start + block), len(ids))
    context.facts = {k: v for k, v in asdict(options).items() if k != "chat"}
    return context


def _reading(progress: Progress, before: int, total: int, done: int) -> None:
    progress("reading", before + done, total)


def prune_tail(engine: Engine, context: KVContext, options: ContextOptions = ContextOptions()) -> None:
    """Prunes what a conversation has added since the context was last pruned. The budget is that of both together."""
    cache = context.cache
    if cache.length == cache.base:
        return
    pruner = Pruner(engine, context, options)
    whole = pruner.share(cache.length)
    if pruner.policy.wants != QueriesWanted():  # decoding did not record them
        tail = context.ids[cache.base :]
        cache.rewind(cache.base)
        del context.ids[cache.base :]
        pruner.read(tail)
    pruner.prune(whole)


class Pruner:
    """Reads tokens into a context's cache and prunes them there."""

    def __init__(self, engine: Engine, context: KVContext, options: ContextOptions):
        self.decoder, self.context, self.options = engine.decoder, context, options
        self.view = view_of(engine.decoder)
        self.policy = kv_policy(engine, options)
        self.queries = Queries(self.policy.wants, self.view)
        asked = (REPEAT_ALL, REPEAT_FROM, context.behind)
        self.prompts = RepeatPrompts(*(tuple(plain_ids(engine, text)) for text in asked))

    def share(self, tokens: int) -> float:
        """Pairs to keep of so many tokens, over all pairs of the layers that are pruned. Raises InputError."""
        layers, heads = len(self.view.layers), self.view.kv_heads
        key = self.context.cache.k[0]
        size = 2 * key.shape[1] * key.element_size()
        pairs = self.options.budget.pairs(layers, heads, tokens, self.context.protected, size)
        return pairs / (layers * heads * tokens)

    def read(self, ids: Sequence[int], progress: Callable[[int], None] = lambda done: None) -> None:
        """Prefill, in pieces."""
        cache = self.context.cache
        cache.reserve(len(ids) + min(self.policy.scratch, len(ids) + REQUEST))
        watched = WatchedCache(cache, self.queries.watch)
        done = 0
        for piece in torch.tensor(ids, device=self.decoder.device).split(PIECE):
            self.view.forward(piece, watched)
            done += len(piece)
            progress(done)
        self.context.ids += ids

    def prune(self, share: float) -> None:
        """Drops what does not fit of the tail."""
        pairs, every = self.pairs(share)
        name = self.options.allocation
        allocate = self.policy.allocate if name is None else ALLOCATIONS[name]
        self.drop(None if pairs == every else allocate(self.policy.score(self.seen()), pairs))

    def pairs(self, share: float) -> tuple[int, int]:
        """How many pairs of the tail to keep, so that this share of all is held then; and how many it has."""
        cache, layers = self.context.cache, list(self.view.layers)
        heads, tail = len(layers) * self.view.kv_heads, cache.length - cache.base
        held = int(cache.lengths[layers].sum()) - heads * tail
        forced = heads * max(0, self.context.protected - cache.base)
        return min(max(round(share * heads * cache.length) - held, forced), heads * tail), heads * tail

    def drop(self, keep: Tensor | None) -> None:
        """Keeps what the mask [P, KVH, tail] of the prunable layers says; None: everything."""
        cache = self.context.cache
        shape = (*cache.lengths.shape, cache.length - cache.base)
        whole = torch.ones(shape, dtype=torch.bool, device=self.decoder.device)
        if keep is not None:
            whole[list(self.view.layers)] = keep
        cache.prune(whole, self.decoder.config.windows)

    def seen(self) -> Context:
        """The tail as a policy sees it."""
        c = self.context
        ids = torch.tensor(c.ids, device=self.decoder.device)
        return Context(ids, c.cache, c.cache.base, c.protected, self.queries, self.prompts, self.view)


def kv_policy(engine: Engine, options: ContextOptions) -> KVPolicy:
    """The policy that the options name."""
    if options.policy.startswith("kvzip"):
        return make_kv_policy(options.policy, chunk=options.chunk)
    if options.policy == "heads":
        stored = {} if engine.profile is None else engine.profile.extra
        if HEADS not in stored:
            raise InputError(
                "KV policy 'heads' needs a profile of heads, and there is none beside this model. "
                "Run: dpllm calibrate OVERLAY --kv-heads"
            )
        return make_kv_policy("heads", profile=torch.from_numpy(stored[HEADS]))
    return make_kv_policy(options.policy)


def plain_ids(engine: Engine, text: str) -> list[int]:
    """Token ids of a text in the middle of another: nothing is put in front."""
    return list(engine.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def chat_frame(engine: Engine) -> tuple[str, str, str]:
    """What the model's chat template puts before a user's first message, between a message's end and the answer, and
    between the answer's end token and the next message."""
    marks = [f"\u241e{i}\u241e" for i in range(3)]
    roles = ("user", "assistant", "user")
    text = engine.chat_template([{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)])
    before, rest = text.split(marks[0])
    _, rest = rest.split(marks[1])
    between, behind = rest.split(marks[2])
    return before, behind, between.removeprefix(engine.tokenizer.eos_token or "")
