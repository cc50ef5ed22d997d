"""Scores the KV heads of a model by what they hold in any text, for KV policy 'whole-heads'."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dpllm.context.kv_context import KVContext
from dpllm.context.options import ContextOptions
from dpllm.context.pruner import Pruner
from dpllm.decode.prompting import Prompts
from dpllm.model.decoder import Decoder


@torch.no_grad()
def head_profile(
    texts: Iterable[Sequence[int]],
    *,
    decoder: Decoder,
    prompts: Prompts,
) -> Tensor:
    """Returns the largest KVzip score of each head's pairs over several texts, float32 [P, KVH].

    P counts the pruned layers. These scores do not depend on the context that is pruned later, so using them is cheap
    (section 4.2 of KVzip, arXiv:2505.23416). texts: token ids.
    """
    best: list[Tensor] = []
    for ids in texts:
        context = KVContext(decoder.new_ragged_cache(0), protected=1)
        pruner = Pruner(context, ContextOptions(), len(ids), decoder=decoder, prompts=prompts)
        pruner.read(ids)
        best.append(pruner.policy.score(pruner.scoring_input())[..., 1:].amax(-1))
    return torch.stack(best).amax(0)
