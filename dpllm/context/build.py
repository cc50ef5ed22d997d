"""Reads a text once and prunes its KV cache, so that many questions can be asked about it.

    context = build_context(
        text, ContextOptions(Budget(keep_ratio=0.3)),
        decoder=engine.decoder, prompts=engine.prompts, profile=engine.profile,
    )
    for step in engine.generate("What does it say about bees?", context=context):
        print(step.text, end="")

A question and its answer are forgotten afterwards, unless the conversation is to go on (`keep=True`).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from dpllm.base.errors import InputError
from dpllm.base.progress import Progress, no_progress
from dpllm.base.text import check_text
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.context.kv_context import KVContext
from dpllm.context.options import ContextOptions
from dpllm.context.pruner import Pruner
from dpllm.decode.prompting import Prompts
from dpllm.kvzip_bridge.attention import SINKS
from dpllm.kvzip_bridge.query_recording import QueriesWanted
from dpllm.kvzip_bridge.ragged_cache import SLACK
from dpllm.model.decoder import Decoder


def build_context(
    text: str,
    options: ContextOptions = ContextOptions(),
    progress: Progress = no_progress,
    *,
    decoder: Decoder,
    prompts: Prompts,
    profile: CalibrationProfile | None = None,
) -> KVContext:
    """Reads a text with every resident plane and prunes its cache.

    progress: called with a stage ('reading', 'pruning'), the tokens done, and all tokens. decoder, prompts: of the
    model that reads the text. profile: the calibration profile, which policy 'whole-heads' needs. Raises InputError
    for an empty text, a text that is too long for the model, or a budget that cannot be met.
    """
    if not text.strip():
        raise InputError("the context is empty. Give some text.")
    check_text(text, "the context")
    before, behind, between = prompts.chat_frame() if options.chat else ("", "", "")
    lead = prompts.plain_ids(before)
    ids = [*lead, *prompts.plain_ids(text)] if options.chat else prompts.prompt_ids(text)
    prompts.check_prompt(ids)
    context = KVContext(decoder.new_ragged_cache(0), behind=behind, between=between, model=prompts.path)
    context.protected = max(len(lead), min(SINKS, len(ids)))
    pruner = Pruner(context, options, len(ids), decoder=decoder, prompts=prompts, profile=profile)
    share = pruner.share()
    blocks = _blocks(ids, options.block, context.protected)
    for block, after in zip(blocks, [*blocks[1:], []], strict=True):
        pruner.read(block, partial(_reading, progress, len(context.ids), len(ids)))
        pruner.prune(share, pruner.room(len(after)) if after else SLACK)
        progress("pruning", len(context.ids), len(ids))
    context.facts = {k: v for k, v in asdict(options).items() if k != "chat"}
    return context


def prune_tail(
    context: KVContext,
    options: ContextOptions = ContextOptions(),
    *,
    decoder: Decoder,
    prompts: Prompts,
    profile: CalibrationProfile | None = None,
) -> None:
    """Prunes what a conversation has added since the context was last pruned.

    The budget covers the context and the conversation together. decoder, prompts, profile: as in `build_context`.
    Raises InputError where the budget leaves nothing to the conversation. If pruning is interrupted, the context is
    as before.
    """
    cache, ids = context.cache, list(context.ids)
    if cache.length == cache.base:
        return
    pruner = Pruner(context, options, cache.length, decoder=decoder, prompts=prompts, profile=profile)
    share = pruner.share()
    if pruner.pairs_to_keep(share)[0] == 0 and pruner.held():
        raise InputError(
            f"{pruner.held():,} pairs of the context were kept before, and {options.budget} holds no more: nothing "
            "of the conversation would be kept. Give a larger budget."
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
    """Splits ids into the blocks after each of which the cache is pruned.

    Every protected token belongs to the first block, which is longer by their number."""
    if size is None:
        return [ids]
    first = protected + size
    return [ids[:first], *(ids[i : i + size] for i in range(first, len(ids), size))]


def _reading(progress: Progress, before: int, total: int, done: int) -> None:
    progress("reading", before + done, total)
