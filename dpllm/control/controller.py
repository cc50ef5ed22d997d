"""What holds a target while text is generated: pure arithmetic on what each token took. The caller has the clock.

`LatencyController` holds a time per token. The cost model says what a token should take; the machine takes a factor
more, which drifts as other programs come and go. The factor is followed by the median of the last few ratios (one slow
token is no news, three are), and the cost model, scaled by it, gives the bits that fit: feed-forward. What is left,
because tokens differ in what they read, is removed by integral control on the logarithm of the time. `QueryBudget` is a
token bucket that no query can overdraw.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from dataclasses import dataclass

from dpllm.base.errors import InputError
from dpllm.control.cost_model import CostModel
from dpllm.policies.token_limit import Allowance, Prices


@dataclass(frozen=True)
class Order:
    """For the next token: effective bits to aim at, and what it may not exceed."""

    bits: float
    allowance: Allowance


@dataclass(frozen=True)
class ControlOptions:
    """window: tokens whose median is the machine's speed. gain: of following it. integral: of the remaining error, per
    token; error: largest that one token adds to it, in log time. headroom: time a single token may take, over the
    target. hysteresis: bits that the order must change by before it does."""

    window: int = 5
    gain: float = 0.5
    integral: float = 0.05
    error: float = 0.05
    headroom: float = 1.02
    hysteresis: float = 0.02


class LatencyController:
    """Holds the median time per token at a target. Serves any number of texts, and learns from all of them."""

    def __init__(
        self,
        cost: CostModel,
        target_ms: float,
        prices: Prices,
        options: ControlOptions = ControlOptions(),
        least_bits: float = 0.0,
    ):
        """prices: nanoseconds, by the same cost model. least_bits: to read whatever it takes, for quality's sake.
        Raises InputError for a time that is no target."""
        self.cost, self.options, self.prices = cost, options, prices
        self.target_ms = 0.0
        self._ratios: deque[float] = deque(maxlen=options.window)  # log of time taken over the model's
        self.slowdown = 0.0  # log of the machine's factor
        self.trim = 0.0  # log of what is added to the target's time to make the median right
        self._bits: float | None = None
        self._saturated = 0  # -1 at the fewest bits, +1 at the most
        self._lock = threading.Lock()  # texts in several threads share what is known of the machine
        self.retarget(target_ms, least_bits)

    def retarget(self, target_ms: float, least_bits: float = 0.0) -> None:
        """Another target from the next token on; what is known of the machine stays."""
        if not (math.isfinite(target_ms) and target_ms > 0):
            raise InputError(f"a target of {target_ms:g} ms per token is impossible. Give a time above 0.")
        self.target_ms, self._bits = target_ms, None
        self._low = max(least_bits, self.cost.bits[0])

    def begin_text(self) -> LatencyController:
        """The controller of a new text: all texts of an engine share one."""
        return self

    def order(self, pairs: float) -> Order:
        """For the next token, with so many pairs in the cache."""
        with self._lock:
            return self._order(pairs)

    def _order(self, pairs: float) -> Order:
        budget = self.target_ms * math.exp(self.trim - self.slowdown)  # in the model's own milliseconds
        bits, high = max(self.cost.bits_for(budget, pairs), self._low), self.cost.bits[-1]
        self._saturated = -1 if bits <= self._low else 1 if bits >= high else 0
        if self._bits is None or self._saturated or abs(bits - self._bits) >= self.options.hysteresis:
            self._bits = bits
        most = max(budget * self.options.headroom, self.cost.step_ms(self._bits, pairs)) - self.cost.kv_ms(
            pairs
        )
        return Order(self._bits, Allowance(round(most * 1e6), self.prices))

    def record(self, ms: float, spent: int, pairs: float) -> None:
        """What the token took, the price of what it read, and the pairs that were in the cache."""
        if not (math.isfinite(ms) and ms > 0):
            return  # a clock that stood still says nothing
        with self._lock:
            self._record(ms, spent, pairs)

    def _record(self, ms: float, spent: int, pairs: float) -> None:
        self._ratios.append(math.log(ms / (spent * 1e-6 + self.cost.kv_ms(pairs))))
        gain = max(self.options.gain, 1 / len(self._ratios))  # the first one is all there is to go by
        self.slowdown += gain * (statistics.median(self._ratios) - self.slowdown)
        over = math.log(ms / self.target_ms)
        # At an end of the range more bits, or fewer, cannot be had: adding up that error would have to be undone later.
        if (self._saturated > 0 and over < 0) or (self._saturated < 0 and over > 0):
            return
        limit = self.options.error
        self.trim -= self.options.integral * max(-limit, min(limit, over))
        self.trim = max(-LARGEST_TRIM, min(LARGEST_TRIM, self.trim))


LARGEST_TRIM = 0.15  # more than this is no matter of how tokens differ


class QueryBudget:
    """A token bucket: a query of n tokens reads at most n * rate + burst bytes, whatever its tokens are worth.

    rate: bytes a token earns. burst: what it begins with, and can save up to. prices: bytes of planes, tables and
    scales. Holds where rate is at least what the seed width reads. The service level of DP-LLM's question 'bits per
    query', as a bound instead of an average.
    """

    def __init__(self, bits: float, rate: int, burst: int, prices: Prices):
        if rate <= 0 or burst < 0:
            raise InputError(f"a budget of {rate} bytes a token and {burst} at once is impossible.")
        self.bits, self.rate, self.burst, self.prices = bits, rate, burst, prices
        self.level = burst

    def begin_text(self) -> QueryBudget:
        """The budget of a new query: every query has its own."""
        return QueryBudget(self.bits, self.rate, self.burst, self.prices)

    def order(self, pairs: float = 0.0) -> Order:
        """For the next token; what the cache holds makes no difference."""
        return Order(self.bits, Allowance(self.level + self.rate, self.prices))

    def record(self, ms: float, spent: float, pairs: float = 0.0) -> None:
        """Takes in the bytes of planes, tables and scales that a token has read; time and cache make no difference."""
        self.level = min(self.burst, self.level + self.rate - math.ceil(spent))
