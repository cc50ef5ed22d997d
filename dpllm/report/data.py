"""The contents of a report: plain measured numbers with their units, ready for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dpllm.planning.host import HostFacts


@dataclass(frozen=True)
class Spread:
    """Percentiles of a sample of `count` values, in the sample's unit."""

    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Returns the percentiles of at least one value, with linear interpolation between neighbours."""
        p5, p25, p50, p75, p95 = np.percentile(values, (5, 25, 50, 75, 95)).round(4).tolist()
        return cls(p5, p25, p50, p75, p95, len(values))


@dataclass(frozen=True)
class Difference:
    """Nats per token minus those of another policy on the same text, with a 95% interval over pieces of text."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class CurvePoint:
    """One policy at one target.

    perplexity, effective_bits: means over the scored tokens. weight_bytes: bytes that a token reads, from the planes to
    the head, including those that choosing the widths reads. tpot_ms: time of a decode step, in ms. less_static: the
    difference to static widths with as many effective bits, or None for a single piece of text.
    """

    policy: str
    target_bits: float
    effective_bits: float
    perplexity: float
    weight_bytes: int
    tpot_ms: Spread
    less_static: Difference | None


@dataclass(frozen=True)
class Frontier:
    """Quality against latency and bytes.

    points: every policy at every target. widest: the point that reads every resident plane. text: name of the scored
    text. documents: pieces of it. scored: scored tokens of all pieces. kv_bytes: bytes of the cache when steps were
    timed. notes: sentences that say what is missing, and why.
    """

    points: tuple[CurvePoint, ...]
    widest: CurvePoint
    text: str
    documents: int
    scored: int
    kv_bytes: int
    notes: tuple[str, ...]

    def of(self, policy: str) -> list[CurvePoint]:
        """Returns the points of one policy, sorted by target."""
        return sorted((p for p in self.points if p.policy == policy), key=lambda p: p.target_bits)


@dataclass(frozen=True)
class OperatingPoint:
    """The target that was asked for, and the target in bits that meets it.

    target_tpot_ms: the target in ms per token, or None. log2_lambda: logarithm of the price of a byte at that target,
    before the correction. why: a sentence that explains the target.
    """

    policy: str
    target_bits: float
    target_tpot_ms: float | None
    log2_lambda: float
    why: str


@dataclass(frozen=True)
class GroupInfo:
    """A group of matrices that share a decision.

    weights: their number of weights. static_bits: the group's width under static widths of the same target.
    """

    layer: int
    name: str
    weights: int
    static_bits: int


@dataclass(frozen=True)
class Token:
    """A generated token and the step that produced it.

    label: the token alone, as text. text: the text that became final with it. tpot_ms: time of the step. weight_bytes:
    bytes of weights that the step read. kv_bytes: bytes of the cache after it. bits: width of every group.
    """

    label: str
    text: str
    effective_bits: float
    tpot_ms: float
    weight_bytes: int
    kv_bytes: int
    bits: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """One generation.

    first: text of the first token, which reading the prompt at the resident maximum produced. ttft_ms: time of that.
    tokens: the tokens that decode steps produced. context_tokens: tokens of a pruned context in front of the prompt.
    """

    prompt: str
    prompt_tokens: int
    context_tokens: int
    first: str
    ttft_ms: float
    seed_bits: int
    resident_bits: int
    groups: tuple[GroupInfo, ...]
    tokens: tuple[Token, ...]

    @property
    def effective_bits(self) -> float:
        """Mean effective bits of the decoded tokens."""
        return float(np.mean([t.effective_bits for t in self.tokens]))

    @property
    def tpot_ms(self) -> Spread:
        """Spread of the time per decoded token, in ms."""
        return Spread.of([t.tpot_ms for t in self.tokens])

    @property
    def weight_bytes(self) -> float:
        """Mean bytes of weights read for a token."""
        return float(np.mean([t.weight_bytes for t in self.tokens]))


@dataclass(frozen=True)
class KeptPairs:
    """The pairs that a pruned context keeps.

    policy: the KV policy that chose them. tokens: tokens that were read, which is the number of pairs of each head
    before pruning. pairs: pairs kept, [layer][KV head].
    """

    policy: str
    tokens: int
    pairs: tuple[tuple[int, ...], ...]

    @property
    def ratio(self) -> float:
        """Pairs kept over pairs read."""
        counts = [n for row in self.pairs for n in row]
        return sum(counts) / max(1, len(counts) * self.tokens)


@dataclass(frozen=True)
class KindBytes:
    """Bytes of one kind: `read` by a token of the generation on average, and `held` in memory."""

    kind: str
    read: float
    held: int


@dataclass(frozen=True)
class ServiceLevel:
    """Queries decoded in one mode: for each query its mean effective bits and its mean time of a step, in ms."""

    mode: str
    effective_bits: tuple[float, ...]
    tpot_ms: tuple[float, ...]


@dataclass(frozen=True)
class Service:
    """Distribution over queries, which are pieces of the text: `prompt_tokens` are read, up to `new_tokens` decoded."""

    levels: tuple[ServiceLevel, ...]
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Report:
    """The contents of the page.

    model: name of the model. command: the command line. date: local time of the measurement. seconds: time that all of
    it took.
    """

    model: str
    command: str
    date: str
    seconds: float
    machine: HostFacts
    operating: OperatingPoint
    generation: Generation
    frontier: Frontier
    kept: KeptPairs | None
    nbytes: tuple[KindBytes, ...]
    service: Service

    def as_json(self) -> dict[str, Any]:
        """Returns the object that `dpllm report --json` prints, with a summary."""
        g = self.generation
        summary = {
            "new_tokens": len(g.tokens) + 1, "effective_bits": round(g.effective_bits, 4),
            "tpot_ms": asdict(g.tpot_ms), "weight_bytes_per_token": round(g.weight_bytes),
            "kv_bytes": g.tokens[-1].kv_bytes, "kept_ratio": None if self.kept is None else round(self.kept.ratio, 4),
        }  # fmt: skip
        return {"summary": summary, **asdict(self)}
