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
    """The controller's state.

    value: to be added to the log multiplier of the next token; a tensor [R] where R texts are decoded side by side,
    each with its own correction.
    """

    target_bits: float
    rate: float = RATE
    limit: float = LIMIT
    value: float | Tensor = 0.0

    def update(self, bits: float | Tensor) -> None:
        """Updates the correction after one token of each text.

        bits: effective bits of the token, or a tensor [R] of R texts side by side. R may fall from step to step: the
        last texts have then ended.
        """
        if (
            isinstance(bits, Tensor)
            and bits.shape == (1,)
            and not bits.is_cuda
            and not isinstance(self.value, Tensor)
        ):
            bits = float(bits)  # one text: plain arithmetic is faster than tensor operations
        if isinstance(bits, Tensor):
            before = self.value[: len(bits)] if isinstance(self.value, Tensor) else self.value
            self.value = (before + self.rate * (self.target_bits - bits)).clamp(-self.limit, self.limit)
        else:
            moved = self.value + self.rate * (self.target_bits - bits)
            self.value = min(max(moved, -self.limit), self.limit)
