"""How many tokens to draft: arithmetic on measured times and measured acceptance, no clock of its own.

With k drafted tokens, each accepted with probability a where those before it were, a round yields
1 + a + ... + a^k tokens (Leviathan et al. 2023, arXiv:2211.17192, eq. 1) in the time of k draft steps and one check of
k + 1 rows. A step without a draft is the case k = 0; the k of the least time a token wins. Nothing is assumed about the
machine: on one that is limited by memory a check costs little more than a step, on one limited by arithmetic nearly
k + 1 of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from dpllm.base import forking

REMEMBERED = 5  # times of a kind; their median shrugs off a pause of the machine
FORGETTING = 0.98  # of acceptance, per drafted token looked at: about the last 50 count
PRIOR = (1.5, 2.0)  # accepted and looked-at tokens before the first draft
GAIN = 0.97  # of the time of a plain step: less is not worth a change
TRIAL = 4  # tokens of a first draft
# Rounds between trials of a draft that does not pay: the first pause, doubled up to the last.
PAUSES = (16, 256)
OUTDATED = 8.0  # drafted tokens that what was learnt before a pause counts for
REFRESH = 64  # rounds after which a plain step is timed again


class Times:
    """The last times of one kind of work, ms."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=REMEMBERED)
        self.typical = 0.0  # their median

    def add(self, ms: float) -> None:
        """One more."""
        self._seen.append(ms)
        self.typical = median(self._seen)

    def __bool__(self) -> bool:
        return bool(self._seen)


@dataclass
class Source:
    """What is known of one source of drafts. longest: tokens it may draft at once."""

    longest: int
    accepted: float = PRIOR[0]
    looked_at: float = PRIOR[1]
    step: Times = field(default_factory=Times)  # of drafting one token
    wait: int = 0  # rounds until the next trial
    pause: int = PAUSES[0]

    @property
    def acceptance(self) -> float:
        """Probability that a drafted token is accepted where those before it were."""
        return self.accepted / self.looked_at

    def learn(self, drafted: int, accepted: int) -> None:
        """Learns from a draft. Tokens after the first rejected one say nothing."""
        for hit in [1] * accepted + [0] * (accepted < drafted):
            self.accepted = self.accepted * FORGETTING + hit
            self.looked_at = self.looked_at * FORGETTING + 1

    def rest(self) -> None:
        """No trial for a while, after which what was learnt before counts little: text or machine may have changed."""
        self.wait, self.pause = self.pause, min(2 * self.pause, PAUSES[1])
        kept = min(1.0, OUTDATED / self.looked_at)
        self.accepted, self.looked_at = self.accepted * kept, self.looked_at * kept


def expected_tokens(acceptance: float, k: int) -> float:
    """Tokens that a round with k drafted ones yields on average."""
    return k + 1.0 if acceptance >= 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)


class DraftLengths:
    """Chooses between sources of drafts, and how much of each; learns from every round. Threads may share it."""

    def __init__(self, longest: Sequence[int]):
        self.sources = [Source(n) for n in longest]
        self._checks: dict[int, Times] = {}  # by rows
        self._since_plain = 0
        self._lock = forking.lock()

    def plans(self, room: int) -> list[tuple[int, int]]:
        """(source, tokens to draft), trials first and then the most promising. A source that has nothing to offer
        leaves the round to the next one, and the last to a plain step. room: tokens that may be drafted at most."""
        with self._lock:
            return self._plans(room)

    def _plans(self, room: int) -> list[tuple[int, int]]:
        if 1 not in self._checks or room < 1 or self._since_plain >= REFRESH:
            return []
        found = []
        for number, source in enumerate(self.sources):
            longest = min(source.longest, room)
            if not source.step:
                found.append((0.0, number, min(TRIAL, longest)))
                continue
            k = min(range(1, longest + 1), key=lambda k: self.ms_per_token(source, k))
            ms = self.ms_per_token(source, k)
            if ms < GAIN * self.check_ms(1):
                found.append((ms, number, k))
            elif source.wait <= 0:
                found.append((0.0, number, k))
        return [(number, k) for _, number, k in sorted(found)]

    def record(self, source: int, drafted: int, accepted: int, draft_ms: float, check_ms: float) -> None:
        """After a round with `drafted` tokens of a source, of which so many were accepted. 0 drafted: a plain step,
        whatever the source."""
        with self._lock:
            self._record(source, drafted, accepted, draft_ms, check_ms)

    def _record(self, source: int, drafted: int, accepted: int, draft_ms: float, check_ms: float) -> None:
        self._checks.setdefault(drafted + 1, Times()).add(check_ms)
        self._since_plain = self._since_plain + 1 if drafted else 0
        for other in self.sources:
            other.wait -= 1
        if not drafted:
            return
        used = self.sources[source]
        used.learn(drafted, accepted)
        used.step.add(draft_ms / drafted)
        if self._pays(used, used.acceptance):
            used.pause = PAUSES[0]
        elif used.wait < 0 and not (accepted == drafted and self._pays(used, 1.0)):
            used.rest()  # the trial did not convince; one that went well, where more of that would pay, is repeated

    def _pays(self, source: Source, acceptance: float) -> bool:
        """Whether some number of drafted tokens would be worth it at this acceptance."""
        goal, counts = GAIN * self.check_ms(1), range(1, source.longest + 1)
        return any(self._round_ms(source, k) < goal * expected_tokens(acceptance, k) for k in counts)

    def ms_per_token(self, source: Source, k: int) -> float:
        """Expected, of a round with k drafted tokens."""
        return self._round_ms(source, k) / expected_tokens(source.acceptance, k)

    def _round_ms(self, source: Source, k: int) -> float:
        return k * source.step.typical + self.check_ms(k + 1)

    def check_ms(self, rows: int) -> float:
        """Of a check of so many rows: as measured, or on the line through the nearest that were."""
        if rows in self._checks:
            return self._checks[rows].typical
        known = sorted(self._checks)
        if len(known) == 1:
            return self._checks[known[0]].typical * rows / known[0]
        at = min(max(bisect_left(known, rows), 1), len(known) - 1)
        low, high = known[at - 1], known[at]
        first, last = self._checks[low].typical, self._checks[high].typical
        slope = max(last - first, 0.0) / (high - low)
        return first + slope * (rows - low)
