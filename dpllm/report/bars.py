"""Draws bytes by kind, kept pairs, and the spread over queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpllm.report.data import KeptPairs, KindBytes, OperatingPoint, Service
from dpllm.report.formatting import digits, size
from dpllm.report.svg import Scale, apart, element, figure, line, scale_over, text, x_axis

BINS = 28


def bytes_chart(kinds: Sequence[KindBytes]) -> str:
    """Draws one row for each kind: the bytes held, and inside them the bytes that a token reads."""
    left, right, row = 74, 282, 29
    x = Scale(0.0, max(max(k.held, k.read) for k in kinds), left, right)
    parts = []
    for i, k in enumerate(kinds):
        top = 6 + row * i
        tip = f"{k.kind}: {size(k.read)} read for a token, {size(k.held)} held"
        parts.append(text(left - 8, top + 15, k.kind, text_anchor="end"))
        for value, inset, kind in ((k.held, 0, "held"), (k.read, 5, "read")):
            parts.append(
                element("rect", element("title", tip), x=left, y=top + inset, width=max(0.5, x(value) - left),
                        height=20 - 2 * inset, class_=kind)
            )  # fmt: skip
        end = max(x(k.held), x(k.read))
        parts.append(
            text(
                end + 8,
                top + 15,
                f"{size(k.read)} of {size(k.held)}" if k.held else f"{size(k.read)} of the head",
            )
        )
    read, held = sum(k.read for k in kinds), sum(k.held for k in kinds)
    bottom = 6 + row * len(kinds)
    parts.append(line(left, 0, left, bottom, "axis"))
    parts.append(text(left, bottom + 18, f"a token reads {size(read)} of {size(held)} held", class_="label"))
    description = "; ".join(f"{k.kind}: {size(k.read)} read, {size(k.held)} held" for k in kinds)
    return figure(
        430, bottom + 28, "Bytes by kind: read for a token (dark), held (light)", description, *parts
    )


def kept_chart(kept: KeptPairs) -> str:
    """Draws the share of pairs kept: one row for each layer, one column for each KV head."""
    heads, left, top = len(kept.pairs[0]), 62, 34
    width, height = max(16.0, min(62.0, 360 / heads)), 24 if len(kept.pairs) <= 32 else 14
    parts = [text(left, 12, "KV head", class_="label")]
    parts += [text(left + width * (h + 0.5), 28, h, text_anchor="middle") for h in range(heads)]
    for layer, row in enumerate(kept.pairs):
        y = top + height * layer
        parts.append(text(left - 8, y + height / 2 + 4, f"layer {layer}", text_anchor="end"))
        for head, pairs in enumerate(row):
            share = pairs / max(1, kept.tokens)
            tip = f"layer {layer}, KV head {head}: {pairs:,} of {kept.tokens:,} pairs kept"
            level = min(8, int(share * 9))
            parts.append(element("rect", element("title", tip), x=left + width * head, y=y, width=width - 1.5,
                                 height=height - 1.5, class_=f"e{level} edge"))  # fmt: skip
            if width >= 34 and height >= 20:
                parts.append(text(left + width * (head + 0.5) - 0.75, y + height / 2 + 3.5, f"{share:.0%}",
                                  class_=f"one{level} tiny", text_anchor="middle"))  # fmt: skip
    description = "; ".join(
        f"layer {i}: " + ", ".join(f"{n / max(1, kept.tokens):.0%}" for n in row)
        for i, row in enumerate(kept.pairs)
    )
    size_ = (max(430.0, left + width * heads + 10), top + height * len(kept.pairs) + 6)
    return figure(*size_, "Share of pairs kept by layer and KV head", description, *parts)


def service_chart(service: Service, what: str, operating: OperatingPoint) -> str:
    """Draws histograms over queries, one row for each mode, on one scale. what: 'bits' or 'ms'."""
    samples = {s.mode: s.effective_bits if what == "bits" else s.tpot_ms for s in service.levels}
    target = operating.target_bits if what == "bits" else operating.target_tpot_ms
    left, right, row = 10, 420, 112
    everything = [v for values in samples.values() for v in values]
    high = max(everything)
    if what == "ms":  # one slow query must not flatten the rest: later values join the last bin
        high = min(high, 3 * float(np.percentile(everything, 75)))
    x = scale_over([min(everything), high, *([target] if target is not None else [])], left, right)
    edges = np.linspace(x.low, x.high, BINS + 1)
    counts = {m: np.histogram(np.clip(v, x.low, x.high), edges)[0] for m, v in samples.items()}
    most = max(int(c.max()) for c in counts.values())
    parts, bottom = [], 0.0
    for i, (mode, found) in enumerate(counts.items()):
        bottom = 24.0 + row * i + 84
        kind = "ours" if i == 0 else "other"
        y = Scale(0.0, most, bottom, bottom - 62)
        parts.append(_bars(found, edges, x, y, kind))
        parts.append(text(left, bottom - 72, mode, class_=f"name {kind}"))
        parts.append(line(left, bottom, right, bottom, "axis"))
        parts.append(_percentiles(samples[mode], x, bottom, what))
        if target is not None:
            parts.append(line(x(target), bottom - 64, x(target), bottom, "target"))
            if i == 0:
                parts.append(
                    text(x(target), bottom - 68, f"target {target:g}", class_="chosen", text_anchor="middle")
                )
    label = (
        "effective bits of a query (mean)" if what == "bits" else "time of a token, ms (mean over a query)"
    )
    parts.append(x_axis(x, bottom + 30, label))
    named = "Effective bits over queries" if what == "bits" else "Time of a token over queries"
    description = "; ".join(
        f"{mode}: " + ", ".join(f"p{p} {np.percentile(v, p):.3f}" for p in (5, 50, 95))
        for mode, v in samples.items()
    )
    return figure(
        430, bottom + 74, named, f"{len(everything) // len(samples)} queries. {description}.", *parts
    )


def _bars(counts: np.ndarray, edges: np.ndarray, x: Scale, y: Scale, kind: str) -> str:
    return "".join(
        element(
            "rect", element("title", f"{n} queries, {digits(float(a))} to {digits(float(b))}"), x=x(float(a)) + 0.5,
            y=y(int(n)), width=x(float(b)) - x(float(a)) - 1, height=y(0) - y(int(n)), class_=f"bar {kind}",
        )
        for n, a, b in zip(counts, edges[:-1], edges[1:], strict=True)
        if n
    )  # fmt: skip


def _percentiles(values: Sequence[float], x: Scale, y: float, what: str) -> str:
    """Draws p5, p50 and p95 below the axis."""
    found = [(p, float(np.percentile(values, p))) for p in (5, 50, 95)]
    spots = [min(max(x(v), x.start), x.end) for _, v in found]
    places = apart(spots, 66, x.start + 20, x.end - 20)
    write = (lambda v: f"{v:.2f}") if what == "bits" else digits
    return "".join(
        line(spot, y, spot, y + 6, "mark")
        + text(at, y + 19, f"p{p} {write(v)}", class_="tiny", text_anchor="middle")
        for (p, v), spot, at in zip(found, spots, places, strict=True)
    )
