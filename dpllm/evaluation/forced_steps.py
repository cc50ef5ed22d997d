"""The one teacher-forced loop: given tokens are decoded step by step, each at its own widths.

Evaluation, measured quality, reports and benchmarks all decode with this loop, so that what they measure is what
`Engine.generate` does: learn from the step before, choose, step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dpllm.decode.step import Stepped, TokenStep
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.policies.base import PrecisionPolicy


def forced_steps(
    step: TokenStep,
    policy: PrecisionPolicy | None,
    cache: KVCache,
    tokens: Sequence[Any],
    logits: Tensor | None = None,
) -> Iterator[Stepped]:
    """Decodes tokens one after the other after what the cache holds, as a text of its own, and yields each step.

    tokens: ids; or, for a step that decodes several texts side by side, int64 [R] of each position. policy: None for
    a model that is not quantised. logits: float32 [1, V], those from which the first token would have been drawn,
    where a prompt was read. A yielded step's tensors are valid until the next one. The next token is learnt from when
    the following step is asked for, so a caller that times the iterations times what a user waits for.
    """
    text = None if policy is None else policy.begin_text()
    stepped: Stepped | None = None
    for token in tokens:
        if stepped is not None:
            step.learn(text, stepped, token)
        elif logits is not None and text is not None:
            text.learn(logits, torch.tensor([token], device=logits.device))
        stepped = step(token, cache, text)
        yield stepped


def forced_nats(
    step: TokenStep,
    policy: PrecisionPolicy | None,
    cache: KVCache,
    ids: Sequence[int],
    logits: Tensor | None = None,
) -> tuple[list[float], list[Stepped]]:
    """Negative log probabilities (nats) of ids[1:], each predicted by decoding the token before it.

    Returns the log probabilities and the steps, without their logits. Other arguments: as in forced_steps.
    """
    nats, steps = [], []
    for stepped, after in zip(forced_steps(step, policy, cache, ids[:-1], logits), ids[1:], strict=True):
        nats.append(float(stepped.logits.logsumexp(1) - stepped.logits[0, after]))
        bits = None if stepped.bits is None else stepped.bits.clone()
        steps.append(stepped._replace(logits=stepped.logits[:, :0], bits=bits))
    return nats, steps
