"""Which heads of a model hold what it needs later, whatever the text: for KV policy 'heads'."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dpllm.context.kv_context import KVContext
from dpllm.context.options import ContextOptions
from dpllm.context.pruner import Pruner
from dpllm.engine import Engine


@torch.no_grad()
def head_profile(
    engine: Engine, texts: Iterable[Sequence[int]], progress: Callable[[int], None] = lambda done: None
) -> Tensor:
    """float32 [P, KVH]: the largest KVzip score that a pair of each head of the pruned layers had in texts of token ids
    (section 4.2 of KVzip, arXiv:2505.23416: scores that do not depend on the context, cheap where they are used)."""
    best: list[Tensor] = []
    for ids in texts:
        context = KVContext(engine.decoder.new_ragged_cache(0), protected=1)
        pruner = Pruner(engine, context, ContextOptions(), len(ids))
        pruner.read(ids)
        best.append(pruner.policy.score(pruner.seen())[..., 1:].amax(-1))
        progress(len(best))
    return torch.stack(best).amax(0)
