"""What a precision policy is, and the recorder of its choices."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor

from dpllm.model.decoder import Group


class PrecisionPolicy(Protocol):
    """Chooses widths. `extra_bytes` is what choosing itself reads per token."""

    name: str
    extra_bytes: int

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """Bits of each token at this group. x: [T, K], the group's input. Returns int32 [T]."""
        ...


def begin_text(policy: PrecisionPolicy) -> PrecisionPolicy:
    """The policy to decode one text with: its tables are shared, what it learns from finished steps is not."""
    if not getattr(policy, "stepwise", False):
        return policy
    own = copy.copy(policy)
    own.reset()  # type: ignore[attr-defined]
    return own


def observe(policy: object, logits: Tensor, tokens: Tensor) -> None:
    """Tells a policy that learns from finished steps: logits [R, V] of the step, tokens int64 [R] that follow."""
    if getattr(policy, "stepwise", False):
        policy.observe(logits, tokens)  # type: ignore[attr-defined]


class Learner(Protocol):
    """Who learns from finished steps in a policy's stead while it decodes with the policy's rule elsewhere."""

    def observe(self, logits: Tensor, tokens: Tensor) -> bool:
        """What the policy would take in; False where it is to do so itself."""
        ...

    def release(self) -> None:
        """Gives what has been learnt back to the policy."""
        ...


class Recorder:
    """Wraps a policy and keeps what it chose: `bits()` is int32 [T, G] of the last forward pass."""

    def __init__(self, policy: PrecisionPolicy, groups: list[Group]):
        self.policy, self.groups = policy, groups
        self._chosen: list[Tensor] = []
        self._weights = torch.tensor([float(g.weights) for g in groups], dtype=torch.float64)
        width = max((len(g.bytes_at) for g in groups), default=0)
        rows = [list(g.bytes_at) + [0] * (width - len(g.bytes_at)) for g in groups]
        self._bytes = torch.tensor(rows, dtype=torch.float64)

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """The policy's choice, remembered."""
        bits = self.policy(group, x)
        if group.index == 0:
            self._chosen.clear()
        self._chosen.append(bits)
        return bits

    def take(self, bits: Tensor) -> None:
        """What a native step chose: int32 [T, G]."""
        self._chosen = list(bits.unbind(1))

    def bits(self) -> Tensor:
        """int32 [T, G] on the CPU."""
        return torch.stack(self._chosen, dim=1).cpu()

    def effective_bits(self) -> Tensor:
        """float64 [T]: mean width per token, weighted by matrix size."""
        return (self.bits().double() @ self._weights) / self._weights.sum()

    def weight_bytes(self) -> Tensor:
        """float64 [T]: planes, tables and scales read per token, the selector's own bytes included."""
        index = (self.bits() - self.groups[0].seed_bits).long().T  # [G, T]
        return self._bytes.gather(1, index).sum(0) + self.policy.extra_bytes
