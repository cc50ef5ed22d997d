"""A text read once, its KV cache pruned, and then asked many questions.

    context = build_context(engine, text, ContextOptions(Budget(keep_ratio=0.3)))
    for step in engine.generate("What does it say about bees?", context=context):
        print(step.text, end="")

A question and its answer are forgotten afterwards, unless the conversation is to go on (`keep=True`).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from dpllm.base.errors import InputError
from dpllm.base.progress import Progress, no_progress
from dpllm.base.text import check_text, encode
from dpllm.context.kv_context import KVContext
from dpllm.context.options import ContextOptions
from dpllm.context.pruner import Pruner, plain_ids
from dpllm.kvzip_bridge.attention import SINKS
from dpllm.kvzip_bridge.query_recording import QueriesWanted
from dpllm.kvzip_bridge.ragged_cache import SLACK

if TYPE_CHECKING:
    from dpllm.engine import Engine


def build_context(
    engine: Engine,
    text: str,
    options: ContextOptions = ContextOptions(),
    progress: Progress = no_progress,
) -> KVContext:
    """Reads a text at the resident maximum and prunes its cache.

    Raises InputError for an empty text, one too long for the model, or a budget that cannot be met.
    """
    if not text.strip():
        raise InputError("the context is empty. Give some text.")
    check_text(text, "the context")
    before, behind, between = chat_frame(engine) if options.chat else ("", "", "")
    lead = plain_ids(engine, before)
    ids = [*lead, *plain_ids(engine, text)] if options.chat else encode(engine.tokenizer, text)
    engine.check_prompt(ids)
    context = KVContext(engine.decoder.new_ragged_cache(0), behind=behind, between=between)
    context.protected = max(len(lead), min(SINKS, len(ids)))
    pruner = Pruner(engine, context, options, len(ids))
    share = pruner.share()
    blocks = _blocks(ids, options.block, context.protected)
    for block, after in zip(blocks, [*blocks[1:], []], strict=True):
        pruner.read(block, partial(_reading, progress, len(context.ids), len(ids)))
        pruner.prune(share, pruner.room(len(after)) if after else SLACK)
        progress("pruning", len(context.ids), len(ids))
    context.facts = {k: v for k, v in asdict(options).items() if k != "chat"}
    return context


def prune_tail(engine: Engine, context: KVContext, options: ContextOptions = ContextOptions()) -> None:
    """Prunes what a conversation has added since the context was last pruned.

    The budget is that of both together. Raises InputError where it leaves nothing to the conversation. Interrupted, the
    context is as before.
    """
    cache, ids = context.cache, list(context.ids)
    if cache.length == cache.base:
        return
    pruner = Pruner(engine, context, options, cache.length)
    share = pruner.share()
    if pruner.pairs(share)[0] == 0 and pruner.held():
        raise InputError(
            f"{pruner.held():,} pairs of the context were kept before, and {options.budget} holds no more: nothing of "
            "the conversation would be kept. Give a larger budget."
        )
    saved = cache.fork(SLACK)
    try:
        if pruner.policy.wants != QueriesWanted():  # decoding did not record them
            cache.rewind(cache.base)
            del context.ids[cache.base :]
            pruner.read(ids[cache.base :])
        pruner.prune(share)
    except BaseException:
        context.cache, context.ids = saved, ids
        raise


def _blocks(ids: list[int], size: int | None, protected: int) -> list[list[int]]:
    """The tokens between two prunings. The protected ones belong to the first block, whatever its size."""
    if size is None:
        return [ids]
    first = protected + size
    return [ids[:first], *(ids[i : i + size] for i in range(first, len(ids), size))]


def _reading(progress: Progress, before: int, total: int, done: int) -> None:
    progress("reading", before + done, total)


def chat_frame(engine: Engine) -> tuple[str, str, str]:
    """What the model's chat template puts before a user's first message, between a message's end and the answer, and
    between an answer and the next message. Raises InputError for a template that cannot be taken apart like this."""
    marks = [f"\u241e{i}\u241e" for i in range(3)]
    roles = ("user", "assistant", "user")
    try:
        text = engine.chat_template([{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)])
        before, rest = text.split(marks[0])
        _, rest = rest.split(marks[1])
        between, behind = rest.split(marks[2])
    except InputError:
        raise
    except Exception as e:  # a template may raise anything
        raise InputError(
            f"the chat template of {engine.path} does not frame a conversation message by message ({e}). "
            "Leave out --chat."
        ) from None
    return before, behind, between
