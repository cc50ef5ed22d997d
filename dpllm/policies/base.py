"""Precision policies: the interface, its defaults, and the recorder of what a policy chose.

A `PrecisionPolicy` is immutable and may be shared by any number of texts and threads. `begin_text` gives a
`TextPolicy`, which belongs to one text: it chooses the widths of the text's tokens and learns from the text's
finished steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpllm.calib.runtime.bits_correction import Correction
from dpllm.calib.runtime.threshold_rule import ThresholdRule
from dpllm.model.decoder import Decoder, Group
from dpllm.policies.token_limit import SpendingPace, TokenLimit


class TextPolicy:
    """Chooses the widths of one text. The defaults are those of a policy that is called for every group.

    name: of the policy. extra_bytes: bytes that choosing itself reads per token. stepwise: whether a token's widths
    depend on finished steps, so that tokens must be decoded one after the other.

    A decode step evaluates two kinds of policy by itself, without calling: `fixed_bits`, one width for each group; or
    `rule` with `thresholds` float32 [G, steps]. `previous` (float32 [1, 3] or None) and `correction` enter the
    multiplier of each token; `limit` with `pace` limits what one token may cost. bits_correction: moves
    `correction` so that effective bits meet a target; None where a policy has no such target.
    """

    name: str
    extra_bytes: int = 0
    stepwise: bool = False
    fixed_bits: Sequence[int] | None = None
    rule: ThresholdRule | None = None
    thresholds: Tensor | None = None
    previous: Tensor | None = None
    correction: float | Tensor = 0.0
    bits_correction: Correction | None = None
    estimates: object | None = None  # a DPLLMPolicy whose estimates a GPU's step computes by itself
    limit: TokenLimit | None = None
    pace: SpendingPace | None = None

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """Bits int32 [T] of T tokens at this group. x: [T, K], the group's input."""
        raise NotImplementedError

    def learn(self, logits: Tensor, tokens: Tensor, read_bits: float | Tensor | None = None) -> None:
        """Learns from a finished step. logits: [R, V] of R texts side by side (one text: R = 1). tokens: int64 [R], the
        token that follows in each. read_bits: effective bits that the step read, a number or [R]; None for a prompt.
        With fewer rows than before, the last texts have ended."""

    def steer(self, target_bits: float, limit: TokenLimit | None = None) -> None:
        """Moves the target before the next token. limit: the most that one token may cost, or None for no limit.
        A policy that cannot be steered ignores the call."""

    def passes_limited_to_one(self) -> str | None:
        """The reason why several tokens cannot be decoded in one pass, or None where they can be."""
        return f"policy '{self.name}' decides one token at a time"

    def delay(self, tokens: int) -> None:
        """Lets each token use only what was known `tokens` tokens before, for passes over several tokens."""

    def corrections(self, count: int) -> list[float]:
        """The corrections of the next `count` tokens."""
        return [float(self.correction)] * count


class PrecisionPolicy:
    """A way to choose widths, shared by all texts. Subclasses set `name` and define `begin_text`."""

    name: str
    extra_bytes: int = 0
    stepwise: bool = False

    def begin_text(self) -> TextPolicy:
        """The state of one new text."""
        raise NotImplementedError

    def reading_from(self, decoder: Decoder) -> PrecisionPolicy:
        """This policy for another view of the same decoder. Only a policy that reads matrices is another object
        then."""
        return self


class WidthSums:
    """Effective bits and bytes of chosen widths. All sums are exact: weights and bytes are integers."""

    def __init__(self, groups: Sequence[Group]):
        self.seed_bits = groups[0].seed_bits if groups else 0
        self._weights = torch.tensor([float(g.weights) for g in groups], dtype=torch.float64)
        self._total = self._weights.sum()
        width = max((len(g.bytes_at) for g in groups), default=0)
        rows = [list(g.bytes_at) + [0] * (width - len(g.bytes_at)) for g in groups]
        self._bytes = torch.tensor(rows, dtype=torch.float64)

    def effective_bits(self, bits: Tensor) -> Tensor:
        """Mean width of each token, weighted by matrix size, float64 [T]. bits: int32 [T, G] on the CPU."""
        return (bits.double() @ self._weights) / self._total

    def read_bytes(self, bits: Tensor) -> Tensor:
        """Bytes of planes, tables and scales that each token reads, float64 [T]. bits: int32 [T, G] on the CPU."""
        index = (bits - self.seed_bits).long().T  # [G, T]
        return self._bytes.gather(1, index).sum(0)

    def read_together(self, bits: Tensor) -> int:
        """Bytes that one pass over T tokens reads: each group once, at the widest of its widths."""
        return int(self.read_bytes(bits.amax(0, keepdim=True))[0])


class Recorder:
    """Wraps a text's policy and keeps what it chose: `bits()` is int32 [T, G] of the last forward pass."""

    def __init__(self, policy: TextPolicy, groups: Sequence[Group]):
        self.policy, self.sums = policy, WidthSums(groups)
        self._chosen: list[Tensor] = []

    def __call__(self, group: Group, x: Tensor) -> Tensor:
        """The policy's choice, which is remembered."""
        bits = self.policy(group, x)
        if group.index == 0:
            self._chosen.clear()
        self._chosen.append(bits)
        return bits

    def bits(self) -> Tensor:
        """int32 [T, G] on the CPU."""
        return torch.stack(self._chosen, dim=1).cpu()

    def effective_bits(self) -> Tensor:
        """Mean width of each token, weighted by matrix size, float64 [T]."""
        return self.sums.effective_bits(self.bits())

    def weight_bytes(self) -> Tensor:
        """Bytes that each token reads, float64 [T]: planes, tables, scales, and the policy's own."""
        return self.sums.read_bytes(self.bits()) + self.policy.extra_bytes
