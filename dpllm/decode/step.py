"""What decodes one token: a native or GPU step where there is one, else the decoder."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dpllm.kvzip_bridge.cache import KVCache
from dpllm.model.decoder import Decoder
from dpllm.policies.base import PrecisionPolicy, Recorder


class TokenStep(Protocol):
    """What decodes whole tokens faster than the decoder does: NativeStep, GpuStep."""

    def __call__(self, token: int, cache: KVCache, policy: PrecisionPolicy) -> tuple[Tensor, Tensor]:
        """(logits [1, vocab], bits int32 [1, G]) behind one more token; both may be overwritten by the next call."""
        ...


def decode_one(
    decoder: Decoder, step: TokenStep | None, token: int, cache: KVCache, policy: PrecisionPolicy
) -> tuple[Tensor, Tensor]:
    """(logits [1, vocab], bits int32 [1, G]) behind one more token, by the step where there is one."""
    if step is not None:
        return step(token, cache, policy)
    recorder = Recorder(policy, decoder.groups)
    with torch.no_grad():
        logits = decoder.forward(torch.tensor([token], device=decoder.device), cache, recorder)
    return logits, recorder.bits()
