"""Feedback controllers for time per token and for bytes per query. They do no I/O; callers pass measured times in.

`LatencyController` holds a time per token, in two parts:

1. Feed-forward. The cost model predicts the time of a token. The machine is slower by a factor that drifts as other
   programs come and go. The controller follows this factor by the median of the last few ratios of measured to
   predicted time, because one slow token is noise and three are a change. The cost model, scaled by the factor, gives
   the bits that fit into the target.
2. Integral control on the logarithm of the time. It removes the error that remains because tokens read different
   numbers of bits.

The target is the whole time of a token, as a user sees it. Bits change the decode step only. The rest (drawing the
token, text, Python) is measured apart, and the step is given what the rest leaves of the target. Where that is less
than the step takes at the fewest bits, the target is out of reach. Then `LatencyController.shortfall` says what takes
the time, and the step may take the time of the fewest bits and SPARED of the rest: where the rest is long, bits are not
given up for the little that they would save.

`QueryBudget` is a token bucket that no query can overdraw.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

from dpllm.base import forking
from dpllm.base.errors import InputError
from dpllm.control.cost_model import CostModel
from dpllm.policies.token_limit import TokenLimit, WidthCosts
from dpllm.policies.token_time import NO_REST, Rest, Shortfall

SPARED = 0.05  # share of the rest that a step may take longer where the target is out of reach
PATIENCE = 8  # tokens in a row for which a target is out of reach before that is said


@dataclass(frozen=True)
class Order:
    """Instructions for the next token.

    bits: effective bits to aim at. limit: the most that the token may cost.
    """

    bits: float
    limit: TokenLimit


@dataclass(frozen=True)
class ControlOptions:
    """Parameters of `LatencyController`. Raises InputError for a headroom that is not a number of 1 or more.

    window: tokens whose median ratio is the machine's speed. gain: share of a change of speed that one token corrects,
    0 to 1. integral: share of the remaining error that one token corrects. error: largest error that one token adds, in
    log time. headroom: longest time of a single token over the target; 1.02 allows 2% more. hysteresis: smallest change
    of the ordered bits.
    """

    window: int = 5
    gain: float = 0.5
    integral: float = 0.05
    error: float = 0.05
    headroom: float = 1.2
    hysteresis: float = 0.02

    def __post_init__(self) -> None:
        if not (math.isfinite(self.headroom) and self.headroom >= 1):
            raise InputError(
                f"headroom is {self.headroom:g}; it must be 1 or more (1.02 allows a single token 2% more time than "
                "the target)."
            )


class LatencyController:
    """Holds the median time per token at a target. Serves any number of texts, and learns from all of them."""

    def __init__(
        self,
        cost: CostModel,
        target_ms: float,
        width_costs: WidthCosts,
        options: ControlOptions = ControlOptions(),
        least_bits: float = 0.0,
    ):
        """Starts with the target `target_ms`, in ms per token.

        width_costs: in nanoseconds, by the same cost model. least_bits: effective bits that are read even if the target
        is missed, to bound the loss of quality. Raises InputError for a time that is not above 0.
        """
        self.cost, self.options, self.width_costs = cost, options, width_costs
        self.target_ms = 0.0
        self._ratios: deque[float] = deque(
            maxlen=options.window
        )  # log of measured over predicted time of the step
        self._rests: deque[Rest] = deque(maxlen=options.window)
        self.rest = Rest(other=cost.other_ms)  # medians
        self.slowdown = 0.0  # log of the factor by which the machine is slower than the cost model
        self.trim = 0.0  # log of the factor on the target that makes the median right
        self._bits: float | None = None
        self._missed = 0  # tokens in a row for which the target was out of reach
        self._pairs = 0.0  # of the last token
        self._saturated = 0  # -1 at the fewest bits, +1 at the most
        self._lock = forking.lock()  # texts in several threads share what is known of the machine
        self.retarget(target_ms, least_bits)

    def retarget(self, target_ms: float, least_bits: float = 0.0) -> None:
        """Sets another target from the next token on. The measured speed of the machine is kept.

        Raises InputError for a time that is not above 0.
        """
        if not (math.isfinite(target_ms) and target_ms > 0):
            raise InputError(f"a target of {target_ms:g} ms per token is impossible. Give a time above 0.")
        with self._lock:  # not between the two halves of another thread's order
            self.target_ms, self._bits, self._missed = target_ms, None, 0
            self._low = max(least_bits, self.cost.bits[0])

    def begin_text(self) -> LatencyController:
        """The controller of a new text: all texts of an engine share one."""
        return self

    def order(self, pairs: float) -> Order:
        """Returns the order for the next token. pairs: pairs in the cache, over all layers and heads."""
        with self._lock:
            return self._order(pairs)

    def _order(self, pairs: float) -> Order:
        rest, scale = (
            self.rest.ms,
            math.exp(self.trim - self.slowdown),
        )  # scale: to milliseconds of the cost model
        budget, out_of_reach = (self.target_ms - rest) * scale, self._out_of_reach(pairs)
        if out_of_reach:
            budget = self.cost.step_ms(self._low, pairs) + SPARED * rest * math.exp(-self.slowdown)
        bits, high = max(self.cost.bits_for(budget, pairs), self._low), self.cost.bits[-1]
        self._saturated = -1 if out_of_reach or bits <= self._low else 1 if bits >= high else 0
        if self._bits is None or self._saturated or abs(bits - self._bits) >= self.options.hysteresis:
            self._bits = bits
        longest = (self.target_ms * self.options.headroom - rest) * scale
        most = max(longest, self.cost.step_ms(self._bits, pairs)) - self.cost.kv_ms(pairs)
        return Order(self._bits, TokenLimit(round(most * 1e6), self.width_costs))

    def _out_of_reach(self, pairs: float) -> bool:
        return self.target_ms - self.rest.ms < self._shortest_step(pairs)

    def _shortest_step(self, pairs: float) -> float:
        return self.cost.step_ms(self._low, pairs) * math.exp(self.slowdown)

    @property
    def shortfall(self) -> Shortfall | None:
        """Why the target is out of reach at any width; None where it is not, or has not been for PATIENCE tokens."""
        if self._missed < PATIENCE:
            return None
        return Shortfall(self.target_ms, self._shortest_step(self._pairs), self._low, *self.rest)

    def record(self, ms: float, spent: int, pairs: float, rest: Rest = NO_REST) -> None:
        """Learns from one token.

        ms: the time it took. spent: the cost of the widths it read, in ns. pairs: pairs that were in the cache. rest:
        the part of `ms` that is not the decode step. A time that is not above 0 is ignored.
        """
        if not (math.isfinite(ms) and ms > 0):
            return  # the clock did not advance, so nothing was measured
        with self._lock:
            self._record(ms, spent, pairs, rest)

    def _record(self, ms: float, spent: int, pairs: float, rest: Rest) -> None:
        self._rests.append(rest)
        self.rest, self._pairs = Rest(*map(statistics.median, zip(*self._rests, strict=True))), pairs
        if (step_ms := ms - rest.ms) > 0:
            self._ratios.append(math.log(step_ms / (spent * 1e-6 + self.cost.kv_ms(pairs))))
            gain = max(self.options.gain, 1 / len(self._ratios))  # the first tokens count fully
            self.slowdown += gain * (statistics.median(self._ratios) - self.slowdown)
        self._missed = self._missed + 1 if self._out_of_reach(pairs) else 0
        over = math.log(ms / self.target_ms)
        # At an end of the range the bits cannot follow. An error summed up there would have to be removed later.
        if (self._saturated > 0 and over < 0) or (self._saturated < 0 and over > 0):
            return
        limit = self.options.error
        self.trim -= self.options.integral * max(-limit, min(limit, over))
        self.trim = max(-LARGEST_TRIM, min(LARGEST_TRIM, self.trim))


LARGEST_TRIM = 0.15  # in log time; differences between tokens explain no more than this


class QueryBudget:
    """A token bucket: a query of n tokens reads at most n * rate + burst bytes.

    The bound holds if `rate` is at least the bytes that the seed width reads. DP-LLM (arXiv:2508.06041) reports the
    average bits of a query; this class bounds them.
    """

    def __init__(self, bits: float, rate: int, burst: int, width_costs: WidthCosts):
        """Starts with a full bucket.

        bits: effective bits to aim at. rate: bytes that each token adds to the bucket. burst: bytes in the bucket at
        the start of a query, and the most it can hold. width_costs: in bytes of planes, tables and scales. Raises
        InputError for a rate that is not above 0 or a negative burst.
        """
        if rate <= 0 or burst < 0:
            raise InputError(
                f"a budget of {rate} bytes a token and {burst} at once is impossible. "
                "Give a rate above 0 and a burst of 0 or more."
            )
        self.bits, self.rate, self.burst, self.width_costs = bits, rate, burst, width_costs
        self.level = burst

    @property
    def shortfall(self) -> None:
        """There is none: the seed width is always within the rate."""

    def begin_text(self) -> QueryBudget:
        """The budget of a new query: every query has its own."""
        return QueryBudget(self.bits, self.rate, self.burst, self.width_costs)

    def order(self, pairs: float = 0.0) -> Order:
        """Returns the order for the next token. pairs: ignored, because the cache is not counted."""
        return Order(self.bits, TokenLimit(self.level + self.rate, self.width_costs))

    def record(self, ms: float, spent: float, pairs: float = 0.0, rest: Rest = NO_REST) -> None:
        """Takes in the bytes of planes, tables and scales that a token has read; time and cache make no difference."""
        self.level = min(self.burst, self.level + self.rate - math.ceil(spent))
