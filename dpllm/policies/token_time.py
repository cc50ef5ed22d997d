"""The parts of a token's time: the decode step, which widths change, and the rest, which they do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Rest(NamedTuple):
    """Time of a token that no width changes, in ms: drawing it, turning it into text, and other work."""

    sampling: float = 0.0
    text: float = 0.0
    other: float = 0.0

    @property
    def ms(self) -> float:
        """All of it."""
        return self.sampling + self.text + self.other


NO_REST = Rest()


@dataclass(frozen=True)
class Shortfall:
    """Why a time per token is out of reach at any width.

    target_ms: the time that was asked for. step_ms: the decode step at `bits`, the fewest effective bits that may be
    read. sampling_ms, text_ms, other_ms: the rest, see Rest. All in ms, as measured.
    """

    target_ms: float
    step_ms: float
    bits: float
    sampling_ms: float
    text_ms: float
    other_ms: float

    @property
    def shortest_ms(self) -> float:
        """The shortest time per token that was within reach."""
        return self.step_ms + self.sampling_ms + self.text_ms + self.other_ms

    def __str__(self) -> str:
        return (
            f"{self.target_ms:g} ms per token are out of reach: the shortest here is {self.shortest_ms:.3g} ms "
            f"(sampling {self.sampling_ms:.2g}, text {self.text_ms:.2g}, other work {self.other_ms:.2g}, the model at "
            f"{self.bits:.2f} bits {self.step_ms:.3g}). Fewer bits shorten only the last part. "
            f"Ask for {self.shortest_ms * 1.05:.3g} ms or more."
        )
