"""Keeps the effective bits of any text on target, by integral control.

The miss of each token moves one number, the correction. It is added to the exponent of the next token's multiplier,
so it scales the next token's signals:

    c <- clamp(c + rate * (target - bits))

Summed over n tokens the misses are (c_n - c_0) / rate. So the mean misses its target by at most 2 * limit / (rate * n),
and by far less where the calibration was nearly right.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Change of the correction per bit missed. Where a factor e is worth 0.7 bits, the time constant is about 30 tokens. A
# lower rate misses the target on short texts; a higher one takes bits from the tokens that need most (docs/log.md).
RATE = 0.05
LIMIT = 4.0


@dataclass
class Correction:
    """The state of the integral control. value: what to add to the log multiplier of the next token; a tensor [R]
    where R texts are decoded side by side, each with a correction of its own. rate 0: effective bits are not
    corrected."""

    target_bits: float
    rate: float = RATE
    limit: float = LIMIT
    value: float | Tensor = 0.0

    def update(self, bits: float | Tensor) -> None:
        """Takes in the effective bits that a token has read; [R] of texts side by side, of which the last may have
        ended since the step before."""
        if isinstance(bits, Tensor):
            before = self.value[: len(bits)] if isinstance(self.value, Tensor) else self.value
            self.value = (before + self.rate * (self.target_bits - bits)).clamp(-self.limit, self.limit)
        else:
            moved = self.value + self.rate * (self.target_bits - bits)
            self.value = min(max(moved, -self.limit), self.limit)
