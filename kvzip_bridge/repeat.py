"""The model is asked to repeat a context, a chunk at a time, on top of its whole cache (KVzip, arXiv:2505.23416)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpllm.kernels.errors import InputError
from dpllm.kvzip_bridge.policy import Context, Hidden
from dpllm.kvzip_bridge.recording import Watch, watched

PIECE = 512  # tokens in one forward pass
CUE = 8  # tokens of the chunk before, which say where to go on


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
    _check_room(context, max((len(r.ids) for r in found), default=0))
    return found


@torch.no_grad()
def repeat(context: Context, ids: Tensor, watch: Watch, hidden: Hidden | None = None) -> None:
    """Forwards ids behind the context and forgets them again, whatever happens. `watch` sees the queries of every layer
    once the piece's keys are written, `hidden` each layer's input before that."""
    cache = watched(context.cache, watch)
    try:
        for piece in ids.split(PIECE):
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


def _check_room(context: Context, longest: int) -> None:
    model, prompts, tokens = context.model, context.prompts, len(context.ids)
    over = tokens + longest - model.max_positions
    if over <= 0:
        return
    frame = max(len(prompts.first), len(prompts.later) + CUE) + len(prompts.after)
    fits = model.max_positions - tokens - frame
    cure = f"Choose a chunk of {fits} tokens, or shorten" if fits > 0 else "Shorten"
    raise InputError(
        f"a context of {tokens} tokens and {longest} to repeat it are {over} more than the {model.max_positions} "
        f"positions of this model. {cure} the context, or choose a policy that does not repeat it."
    )
