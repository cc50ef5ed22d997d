"""Draws the frontier: perplexity against time, perplexity against bytes, and the loss relative to static widths."""

from __future__ import annotations

from collections.abc import Callable

from dpllm.report.data import CurvePoint, Frontier, OperatingPoint
from dpllm.report.formatting import POLICY_NAMES, digits, milliseconds, size
from dpllm.report.frontier import OURS
from dpllm.report.svg import Scale, apart, figure, line, mark, path, scale_over, text, x_axis, y_axis

WIDTH, HEIGHT = 430, 350
LEFT, RIGHT, TOP, BOTTOM = 46, 412, 34, 300
LOOKS = {OURS: ("ours", "circle"), "static": ("static", "square"), "dp-llm": ("dp", "triangle")}
OTHER = ("other", "diamond")


def quality_against_time(frontier: Frontier, chosen: OperatingPoint) -> str:
    """Draws perplexity against the median time of a step, with quartiles as whiskers."""
    return _curves(
        frontier, chosen, lambda p: p.tpot_ms.p50, "time of a step, ms (median; line: quartiles)",
        "Perplexity against time", whiskers=True,
    )  # fmt: skip


def quality_against_bytes(frontier: Frontier, chosen: OperatingPoint) -> str:
    """Draws perplexity against the bytes of weights that a token reads."""
    return _curves(
        frontier, chosen, lambda p: p.weight_bytes / 1e6, "weights read for a token, MB",
        "Perplexity against bytes read",
    )  # fmt: skip


def _curves(
    frontier: Frontier, chosen: OperatingPoint, along: Callable[[CurvePoint], float], label: str, title: str,
    whiskers: bool = False,
) -> str:  # fmt: skip
    points = [*frontier.points, frontier.widest]
    across = [along(p) for p in points]
    if whiskers:
        across += [v for p in points for v in (p.tpot_ms.p25, p.tpot_ms.p75)]
    x = scale_over(across, LEFT + 8, RIGHT)
    y = scale_over([p.perplexity for p in points], BOTTOM, TOP, pad=0.1)
    best = y(frontier.widest.perplexity)
    parts = [x_axis(x, BOTTOM, label), y_axis(y, LEFT, RIGHT, "perplexity (lower is better)")]
    parts.append(line(LEFT, best, RIGHT, best, "level note"))
    parts.append(text(LEFT + 4, best + 14, f"every plane: {frontier.widest.perplexity:.3f}", class_="note"))
    names = list(dict.fromkeys(p.policy for p in frontier.points))
    for name in sorted(names, key=lambda n: n == OURS):  # ours on top
        parts.append(_curve(frontier.of(name), name, x, y, along, whiskers))
    parts.append(mark(x(along(frontier.widest)), best, "diamond", "other point", _tip(frontier.widest)))
    parts.append(_chosen(frontier, chosen, x, y, along))
    parts.append(_names(frontier, names, x, y, along))
    return figure(WIDTH, HEIGHT, title, _description(frontier, label, along), *parts)


def _curve(
    points: list[CurvePoint],
    name: str,
    x: Scale,
    y: Scale,
    along: Callable[[CurvePoint], float],
    whiskers: bool,
) -> str:
    kind, shape = LOOKS.get(name, OTHER)
    parts = [path([(x(along(p)), y(p.perplexity)) for p in points], f"curve {kind}")]
    for p in points:
        at = y(p.perplexity)
        if whiskers:
            parts.append(line(x(p.tpot_ms.p25), at, x(p.tpot_ms.p75), at, f"whisker {kind}"))
        parts.append(mark(x(along(p)), at, shape, f"point {kind}", _tip(p)))
    return "".join(parts)


def _names(
    frontier: Frontier, names: list[str], x: Scale, y: Scale, along: Callable[[CurvePoint], float]
) -> str:
    """Draws the name of each curve next to its upper end."""
    ends = [frontier.of(n)[0] for n in names]
    heights = apart([y(p.perplexity) for p in ends], 16, TOP + 4, BOTTOM - 24)
    parts = []
    for name, end, height in zip(names, ends, heights, strict=True):
        kind, _ = LOOKS.get(name, OTHER)
        at = x(along(end))
        left = at > (LEFT + RIGHT) / 2 + 60
        parts.append(
            text(at + (-10 if left else 10), height + 4, POLICY_NAMES.get(name, name), class_=f"name {kind}",
                 text_anchor="end" if left else "start")
        )  # fmt: skip
    return "".join(parts)


def _chosen(
    frontier: Frontier, chosen: OperatingPoint, x: Scale, y: Scale, along: Callable[[CurvePoint], float]
) -> str:
    """Draws a ring around the operating point, and a line to its name."""
    point = next(p for p in frontier.of(chosen.policy) if p.target_bits == chosen.target_bits)
    at, height = x(along(point)), y(point.perplexity)
    name = f"chosen: {chosen.target_bits:g} bits"
    right = at + 130 < RIGHT
    return (
        mark(at, height, "circle", "ring")
        + line(at + (5 if right else -5), height - 7, at + (20 if right else -20), height - 30, "leader")
        + text(
            at + (23 if right else -23),
            height - 32,
            name,
            class_="chosen",
            text_anchor="start" if right else "end",
        )
    )


def _tip(p: CurvePoint) -> str:
    return (
        f"{POLICY_NAMES.get(p.policy, p.policy)}, target {p.target_bits:g} bits: perplexity {p.perplexity:.3f}, "
        f"{p.effective_bits:.3f} bits read, {milliseconds(p.tpot_ms.p50)}, {size(p.weight_bytes)} a token"
    )


def _description(frontier: Frontier, label: str, along: Callable[[CurvePoint], float]) -> str:
    found = "; ".join(
        f"{POLICY_NAMES.get(p.policy, p.policy)} at {p.target_bits:g} bits: {digits(along(p))}, {p.perplexity:.3f}"
        for p in (*frontier.points, frontier.widest)
    )
    return f"Pairs of {label} and perplexity. {found}."


def difference_to_static(frontier: Frontier) -> str:
    """Draws nats per token minus those of static widths at equal bits, with intervals; returns "" if there are none."""
    points = [p for p in frontier.points if p.less_static is not None]
    if not points:
        return ""
    values = [v for p in points if (d := p.less_static) for v in (1e3 * d.low, 1e3 * d.high, 0.0)]
    x = scale_over([p.effective_bits for p in points], LEFT + 14, RIGHT - 8)
    y = scale_over(values, BOTTOM - 16 * (len({p.policy for p in points}) + 1), TOP, pad=0.06)
    zero = y(0.0)
    parts = [
        x_axis(x, BOTTOM, "effective bits"),
        y_axis(
            y,
            LEFT,
            RIGHT,
            f"loss minus that of static, 0.001 nats per token (bar: 95%, {frontier.documents} pieces)",
        ),
        line(LEFT, zero, RIGHT, zero, "axis"),
        text(RIGHT, zero - 6, "static", class_="name static", text_anchor="end"),
    ]
    names = list(dict.fromkeys(p.policy for p in points))
    for i, name in enumerate(names):
        kind, shape = LOOKS.get(name, OTHER)
        offset = 9.0 * (i - (len(names) - 1) / 2)
        own = sorted((p for p in points if p.policy == name), key=lambda p: p.target_bits)
        for p in own:
            assert p.less_static is not None
            d, at = p.less_static, x(p.effective_bits) + offset
            tip = f"{_tip(p)}: {1e3 * d.mean:+.1f} [{1e3 * d.low:+.1f}, {1e3 * d.high:+.1f}] thousandths of a nat"
            parts.append(line(at, y(1e3 * d.low), at, y(1e3 * d.high), f"whisker {kind}"))
            parts.append(mark(at, y(1e3 * d.mean), shape, f"point {kind}", tip))
        name_at = BOTTOM - 8 - 16 * (len(names) - 1 - i)
        parts.append(
            text(RIGHT, name_at, POLICY_NAMES.get(name, name), class_=f"name {kind}", text_anchor="end")
        )
    return figure(WIDTH, HEIGHT, "Loss relative to static widths at equal bits", _differences(points), *parts)


def _differences(points: list[CurvePoint]) -> str:
    return "; ".join(
        f"{POLICY_NAMES.get(p.policy, p.policy)} at {p.target_bits:g} bits: {1e3 * d.mean:+.1f} thousandths of a nat "
        f"({1e3 * d.low:+.1f} to {1e3 * d.high:+.1f})"
        for p in points
        if (d := p.less_static)
    )
