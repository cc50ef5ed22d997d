"""What a report says, as measured: plain numbers with their units, ready for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dpllm.planning.host import HostFacts


@dataclass(frozen=True)
class Spread:
    """Percentiles of a sample, in the sample's unit; `count` values."""

    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; linear between neighbours."""
        p5, p25, p50, p75, p95 = np.percentile(values, (5, 25, 50, 75, 95)).round(4).tolist()
        return cls(p5, p25, p50, p75, p95, len(values))


@dataclass(frozen=True)
class Difference:
    """Nats per token less another policy's on the same text, with a 95% interval over pieces of text."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class CurvePoint:
    """A policy at a target. perplexity, effective_bits: means over the scored tokens. weight_bytes: read for a token,
    planes to head and the selector's own included. tpot_ms: time of a decode step, ms. less_static: against the static
    allotment of as many effective bits, where there is more than one piece of text."""

    policy: str
    target_bits: float
    effective_bits: float
    perplexity: float
    weight_bytes: int
    tpot_ms: Spread
    less_static: Difference | None


@dataclass(frozen=True)
class Frontier:
    """Quality against latency and bytes. `widest` reads every resident plane. text: what was scored, `scored` tokens
    of `documents` documents. kv_bytes: of the cache behind which steps were timed. notes: what is missing, and why."""

    points: tuple[CurvePoint, ...]
    widest: CurvePoint
    text: str
    documents: int
    scored: int
    kv_bytes: int
    notes: tuple[str, ...]

    def of(self, policy: str) -> list[CurvePoint]:
        """One policy's curve, by target."""
        return sorted((p for p in self.points if p.policy == policy), key=lambda p: p.target_bits)


@dataclass(frozen=True)
class OperatingPoint:
    """What was asked, and the target in bits that answers it. log2_lambda: the price of a byte there, before the
    correction. why: a sentence."""

    policy: str
    target_bits: float
    target_tpot_ms: float | None
    log2_lambda: float
    why: str


@dataclass(frozen=True)
class GroupInfo:
    """A group of matrices that share a decision. static_bits: its width in the best fixed allotment of the same
    target."""

    layer: int
    name: str
    weights: int
    static_bits: int


@dataclass(frozen=True)
class Token:
    """A generated token: as text by itself (`label`), what became final with it (`text`), and the step that produced
    it: tpot_ms, widths of every group."""

    label: str
    text: str
    effective_bits: float
    tpot_ms: float
    weight_bytes: int
    kv_bytes: int
    bits: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """One generation. `first` was produced by reading the prompt (at the resident maximum, ttft_ms); `tokens` by decode
    steps. context_tokens: in front of the prompt, in a pruned cache."""

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
        """Mean over the decoded tokens."""
        return float(np.mean([t.effective_bits for t in self.tokens]))

    @property
    def tpot_ms(self) -> Spread:
        """Over the decoded tokens."""
        return Spread.of([t.tpot_ms for t in self.tokens])

    @property
    def weight_bytes(self) -> float:
        """Mean bytes of weights read for a token."""
        return float(np.mean([t.weight_bytes for t in self.tokens]))


@dataclass(frozen=True)
class KeptPairs:
    """A pruned context: pairs [layer][KV head] that are left of `tokens` each."""

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
    """Bytes of one kind: `read` for a token of the generation, on average, and `held` in memory."""

    kind: str
    read: float
    held: int


@dataclass(frozen=True)
class ServiceLevel:
    """Queries decoded in one mode. Per query: mean effective bits, mean time of a step in ms."""

    mode: str
    effective_bits: tuple[float, ...]
    tpot_ms: tuple[float, ...]


@dataclass(frozen=True)
class Service:
    """Distribution over queries: pieces of the text, `prompt_tokens` read and `new_tokens` decoded each."""

    levels: tuple[ServiceLevel, ...]
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Report:
    """Everything on the page."""

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
        """The object of `dpllm report --json`, summaries included."""
        g = self.generation
        summary = {
            "new_tokens": len(g.tokens) + 1, "effective_bits": round(g.effective_bits, 4),
            "tpot_ms": asdict(g.tpot_ms), "weight_bytes_per_token": round(g.weight_bytes),
            "kv_bytes": g.tokens[-1].kv_bytes, "kept_ratio": None if self.kept is None else round(self.kept.ratio, 4),
        }  # fmt: skip
        return {"summary": summary, **asdict(self)}
