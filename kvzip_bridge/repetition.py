"""Asks the model to repeat its context, one chunk at a time, over its whole cache (KVzip, arXiv:2505.23416)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.kvzip_bridge.interfaces import RepeatPrompts, ScoringInput
from dpllm.kvzip_bridge.model_view import Hidden, ModelView
from dpllm.kvzip_bridge.query_recording import Watch, watched

PIECE = 512  # approximate number of tokens in one forward pass
CUE = 8  # tokens of the previous chunk, which tell the model where to continue
USEFUL = 32  # the smallest chunk, in tokens, that an error message suggests


@dataclass(frozen=True)
class Repetition:
    """Positions start .. end - 1 of the context. ids int64 [q]: a request for these tokens, then the tokens."""

    start: int
    end: int
    ids: Tensor


def repetitions(context: ScoringInput, chunk: int) -> list[Repetition]:
    """Splits the scored positions that are not protected into repetitions of at most `chunk` tokens.

    The first chunk after the protected prefix is requested by `prompts.first`, every other one by `prompts.later`.
    Raises InputError where the context and a repetition together exceed the model's positions.
    """
    begin = max(context.first, context.protected)
    starts = range(begin, len(context.ids), chunk)
    found = [_repetition(context, s, min(s + chunk, len(context.ids))) for s in starts]
    longest = max((r.end - r.start for r in found), default=0)
    check_room(context.model, context.prompts, len(context.ids), longest)
    return found


@torch.no_grad()
def repeat(context: ScoringInput, ids: Tensor, watch: Watch, hidden: Hidden | None = None) -> None:
    """Runs the model over ids int64 [q] after the context, and always removes them from the cache again.

    watch: called with the queries of every layer after the piece's keys are written. hidden: called with each layer's
    input before that."""
    cache = watched(context.cache, watch)
    try:
        # Pieces are even, because a short last piece would read all weights too.
        for piece in ids.tensor_split(max(1, round(len(ids) / PIECE))):
            context.model.forward(piece, cache, hidden)
    finally:
        context.cache.rewind(len(context.ids))


def _repetition(context: ScoringInput, start: int, end: int) -> Repetition:
    ids, prompts = context.ids, context.prompts
    if start <= context.protected:
        asked = [ids.new_tensor(prompts.first)]
    else:
        asked = [ids.new_tensor(prompts.later), ids[max(0, start - CUE) : start]]
    return Repetition(start, end, torch.cat([*asked, ids.new_tensor(prompts.after), ids[start:end]]))


def largest_chunk(model: ModelView, prompts: RepeatPrompts, tokens: int) -> int:
    """Returns how many tokens can be repeated at a time after `tokens` tokens of context; may be negative."""
    return model.max_positions - tokens - _frame(prompts)


def check_room(model: ModelView, prompts: RepeatPrompts, tokens: int, chunk: int) -> None:
    """Raises InputError where a context and the repetition of a chunk exceed the model's positions."""
    fits = largest_chunk(model, prompts, tokens)
    if chunk <= fits:
        return
    cure = f"Choose a chunk of {fits} tokens, or shorten" if fits >= USEFUL else "Shorten"
    raise InputError(
        f"a context of {tokens} tokens and {chunk + _frame(prompts)} tokens to repeat it exceed the "
        f"{model.max_positions} positions of this model by {chunk - fits}. {cure} the context, or choose a policy that "
        "does not repeat it."
    )


def _frame(prompts: RepeatPrompts) -> int:
    return max(len(prompts.first), len(prompts.later) + CUE) + len(prompts.after)
