"""The model is asked to repeat a context, a chunk at a time, on top of its whole cache (KVzip, arXiv:2505.23416)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.kvzip_bridge.interfaces import Context, RepeatPrompts
from dpllm.kvzip_bridge.model_view import Hidden, ModelView
from dpllm.kvzip_bridge.query_recording import Watch, watched

PIECE = 512  # tokens in one forward pass, about
CUE = 8  # tokens of the chunk before, which say where to go on
USEFUL = 32  # tokens of a chunk worth suggesting


@dataclass(frozen=True)
class Repetition:
    """Positions start .. end - 1 of the context, and the ids int64 [q] that ask for them and then are them."""

    start: int
    end: int
    ids: Tensor


def repetitions(context: Context, chunk: int) -> list[Repetition]:
    """The scored positions that are not protected, in chunks of at most so many tokens.

    The first chunk behind the protected prefix is asked for with the prompt for beginnings. Raises InputError where the
    context and a repetition together are longer than the model's positions.
    """
    begin = max(context.first, context.protected)
    starts = range(begin, len(context.ids), chunk)
    found = [_repetition(context, s, min(s + chunk, len(context.ids))) for s in starts]
    longest = max((r.end - r.start for r in found), default=0)
    check_room(context.model, context.prompts, len(context.ids), longest)
    return found


@torch.no_grad()
def repeat(context: Context, ids: Tensor, watch: Watch, hidden: Hidden | None = None) -> None:
    """Forwards ids behind the context and forgets them again, whatever happens. `watch` sees the queries of every layer
    once the piece's keys are written, `hidden` each layer's input before that."""
    cache = watched(context.cache, watch)
    try:
        # Even pieces: a short rest would read all weights too.
        for piece in ids.tensor_split(max(1, round(len(ids) / PIECE))):
            context.model.forward(piece, cache, hidden)
    finally:
        context.cache.rewind(len(context.ids))


def _repetition(context: Context, start: int, end: int) -> Repetition:
    ids, prompts = context.ids, context.prompts
    if start <= context.protected:
        asked = [ids.new_tensor(prompts.first)]
    else:
        asked = [ids.new_tensor(prompts.later), ids[max(0, start - CUE) : start]]
    return Repetition(start, end, torch.cat([*asked, ids.new_tensor(prompts.after), ids[start:end]]))


def largest_chunk(model: ModelView, prompts: RepeatPrompts, tokens: int) -> int:
    """How many tokens can be repeated at a time behind a context of so many; none where it is not positive."""
    return model.max_positions - tokens - _frame(prompts)


def check_room(model: ModelView, prompts: RepeatPrompts, tokens: int, chunk: int) -> None:
    """Raises InputError where a context and the repetition of a chunk are longer than the model's positions."""
    fits = largest_chunk(model, prompts, tokens)
    if chunk <= fits:
        return
    cure = f"Choose a chunk of {fits} tokens, or shorten" if fits >= USEFUL else "Shorten"
    raise InputError(
        f"a context of {tokens} tokens and {chunk + _frame(prompts)} to repeat it are {chunk - fits} more than the "
        f"{model.max_positions} positions of this model. {cure} the context, or choose a policy that does not "
        "repeat it."
    )


def _frame(prompts: RepeatPrompts) -> int:
    return max(len(prompts.first), len(prompts.later) + CUE) + len(prompts.after)
