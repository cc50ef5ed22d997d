"""Draws the generation, token by token: widths of every group, effective bits, and time, in three panels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dpllm.report.data import Generation, GroupInfo, OperatingPoint
from dpllm.report.formatting import milliseconds, visible
from dpllm.report.svg import (
    Scale,
    apart,
    element,
    figure,
    line,
    number,
    path,
    scale_over,
    text,
    x_axis,
    y_axis,
)

WIDTH, LEFT, RIGHT = 1200, 112, 1010
PANEL, BETWEEN = 112, 52  # heights of a lower panel and of the gap between two panels
MARGIN = (RIGHT + 24, WIDTH - 14)  # x range in which the groups' means are drawn


@dataclass(frozen=True)
class Layout:
    """Positions in the figure, in pixels.

    column: width of a token's column. rows: top of each group's row. bits, times: top and bottom of the panels of
    effective bits and of time.
    """

    column: float
    rows: tuple[float, ...]
    row_height: float
    bits: tuple[float, float]
    times: tuple[float, float]

    @property
    def height(self) -> float:
        """Height of the whole figure."""
        return self.times[1] + 48

    def middle(self, token: int) -> float:
        """Returns the x of the middle of a token's column."""
        return LEFT + self.column * (token + 0.5)


def layout_of(generation: Generation) -> Layout:
    """Lays out one row for each group, with a gap between layers, and one column for each token."""
    groups = generation.groups
    row_height = max(4.0, min(13.0, 400 / len(groups)))
    gap, top, rows = max(2.0, row_height / 3), 46.0, []
    for i, group in enumerate(groups):
        if i and group.layer != groups[i - 1].layer:
            top += gap
        rows.append(top)
        top += row_height
    bits = top + BETWEEN
    times = bits + PANEL + BETWEEN
    column = (RIGHT - LEFT) / len(generation.tokens)
    return Layout(column, tuple(rows), row_height, (bits, bits + PANEL), (times, times + PANEL))


def timeline(generation: Generation, operating: OperatingPoint) -> str:
    """Draws the figure. It needs no script; page.js adds a cursor that names the token and group under it."""
    at = layout_of(generation)
    x = Scale(0.5, len(generation.tokens) + 0.5, LEFT, RIGHT)
    parts = [
        _legend(generation),
        _cells(generation, at),
        _row_names(generation.groups, at),
        _means(generation, at),
        _bits_panel(generation, operating, at),
        _time_panel(generation, operating, at),
        x_axis(x, at.times[1], "decoded token"),
        element(
            "rect",
            id="cell",
            class_="cursor",
            x=0,
            y=0,
            width=at.column,
            height=at.row_height,
            visibility="hidden",
        ),
        element(
            "line", id="hair", class_="hair", y1=at.rows[0], y2=at.times[1], x1=0, x2=0, visibility="hidden"
        ),
    ]
    description = (
        f"Rows are groups of matrices, columns the {len(generation.tokens)} decoded tokens; colour is the number of "
        f"bit planes read, {generation.seed_bits} to {generation.resident_bits}. Below: effective bits of each token "
        f"(mean {generation.effective_bits:.3f}, target {operating.target_bits:g}) and the time it took "
        f"(median {milliseconds(generation.tpot_ms.p50)}). The arrow keys move a cursor."
    )
    return figure(
        WIDTH, at.height, "Planes read by every group for every token", description, *parts, id="timeline",
        role="group", tabindex=0,
    )  # fmt: skip


def cursor_data(generation: Generation) -> dict[str, Any]:
    """Returns the data from which page.js finds the token and group under the pointer."""
    at = layout_of(generation)
    return {
        "left": LEFT, "right": RIGHT, "rows": at.rows, "rowHeight": at.row_height,
        "bottom": at.times[1],
        "groups": [f"layer {g.layer} · {g.name}" for g in generation.groups],
        "tokens": [
            {"text": visible(t.label), "bits": "".join(map(str, t.bits)), "effective": f"{t.effective_bits:.2f}",
             "ms": milliseconds(t.tpot_ms)}
            for t in generation.tokens
        ],
    }  # fmt: skip


def _legend(generation: Generation) -> str:
    parts = [text(LEFT, 20, "planes read:", class_="label")]
    for i, width in enumerate(range(generation.seed_bits, generation.resident_bits + 1)):
        x = LEFT + 84 + 30 * i
        parts.append(element("rect", x=x, y=8, width=27, height=17, class_=f"w{width} edge"))
        parts.append(text(x + 13.5, 21, width, class_=f"on{width}", text_anchor="middle"))
    x = MARGIN[0] + 4
    parts.append(element("circle", cx=x + 4, cy=16, r=3.2, class_="ours point"))
    parts.append(text(x + 13, 20, "mean", class_="label"))
    parts.append(line(x + 58, 10, x + 58, 22, "static") + text(x + 65, 20, "static width", class_="label"))
    return "".join(parts)


def _cells(generation: Generation, at: Layout) -> str:
    """Draws the cells: one path for each width, one rectangle for each run of equal columns.

    Thousands of cells take a few kilobytes.
    """
    runs: dict[int, list[str]] = {}
    bits = np.asarray([t.bits for t in generation.tokens]).T
    for top, row in zip(at.rows, bits, strict=True):
        changes = np.flatnonzero(np.diff(row)) + 1
        for first, last in zip([0, *changes], [*changes, len(row)], strict=True):
            x, width = LEFT + at.column * float(first), at.column * float(last - first)
            piece = f"M{number(x)} {number(top)}h{number(width)}v{number(at.row_height)}h{number(-width)}z"
            runs.setdefault(int(row[first]), []).append(piece)
    return "".join(element("path", d="".join(runs[w]), class_=f"w{w}") for w in sorted(runs))


def _row_names(groups: tuple[GroupInfo, ...], at: Layout) -> str:
    parts = []
    first = 0
    for i, group in enumerate(groups):
        if at.row_height >= 9:
            parts.append(
                text(
                    LEFT - 6,
                    at.rows[i] + at.row_height / 2 + 3.5,
                    group.name,
                    class_="tiny",
                    text_anchor="end",
                )
            )
        if i + 1 == len(groups) or groups[i + 1].layer != group.layer:
            middle = (at.rows[first] + at.rows[i] + at.row_height) / 2
            if at.rows[i] + at.row_height - at.rows[first] >= 12:
                parts.append(text(0, middle + 4, f"layer {group.layer}"))
            first = i + 1
    return "".join(parts)


def _means(generation: Generation, at: Layout) -> str:
    """Draws the mean width of each group at its row, and the width that static widths of the same target give it."""
    x = Scale(generation.seed_bits, generation.resident_bits, MARGIN[0] + 4, MARGIN[1] - 4)
    means = np.mean([t.bits for t in generation.tokens], axis=0)
    parts = []
    for top, group, mean in zip(at.rows, generation.groups, means, strict=True):
        middle, fixed = top + at.row_height / 2, x(group.static_bits)
        parts.append(line(x.start, middle, x(float(mean)), middle, "stem"))
        parts.append(
            element(
                "circle", cx=x(float(mean)), cy=middle, r=min(3.2, at.row_height / 2.4), class_="ours point"
            )
        )
        parts.append(line(fixed, top + 1, fixed, top + at.row_height - 1, "static"))
    bottom = at.rows[-1] + at.row_height
    for width in range(generation.seed_bits, generation.resident_bits + 1):
        parts.append(line(x(width), at.rows[0], x(width), bottom, "grid"))
        parts.append(text(x(width), bottom + 15, width, text_anchor="middle"))
    return "".join(parts)


def _bits_panel(generation: Generation, operating: OperatingPoint, at: Layout) -> str:
    values = [t.effective_bits for t in generation.tokens]
    so_far = np.cumsum(values) / np.arange(1, len(values) + 1)
    y = scale_over([*values, operating.target_bits], at.bits[1], at.bits[0])
    target = y(operating.target_bits)
    (mean,) = apart([y(float(so_far[-1]))], 15, at.bits[0], at.bits[1])
    names = apart([target, mean], 15, at.bits[0] + 4, at.bits[1])
    return "".join([
        y_axis(y, LEFT, RIGHT), text(0, at.bits[0] - 12, "effective bits of a token", class_="label"),
        line(LEFT, target, RIGHT, target, "target"),
        path([(at.middle(i), y(v)) for i, v in enumerate(values)], "each"),
        path([(at.middle(i), y(float(v))) for i, v in enumerate(so_far)], "curve ours"),
        text(RIGHT + 8, names[0] + 4, f"target {operating.target_bits:g}", class_="chosen"),
        text(RIGHT + 8, names[1] + 4, f"mean so far: {so_far[-1]:.3f}", class_="name ours"),
        line(LEFT, at.bits[1], RIGHT, at.bits[1], "axis"),
    ])  # fmt: skip


def _time_panel(generation: Generation, operating: OperatingPoint, at: Layout) -> str:
    values, spread = [t.tpot_ms for t in generation.tokens], generation.tpot_ms
    highest = 1.6 * max(
        spread.p95, operating.target_tpot_ms or 0.0
    )  # one slow token must not flatten the rest
    y = Scale(
        0.0, min(highest, 1.05 * max([*values, operating.target_tpot_ms or 0.0])), at.times[1], at.times[0]
    )
    lines = [
        (spread.p50, f"median {milliseconds(spread.p50)}", "ours"),
        (spread.p95, f"p95 {milliseconds(spread.p95)}", "note"),
    ]
    if operating.target_tpot_ms is not None:
        lines.append((operating.target_tpot_ms, f"target {operating.target_tpot_ms:g} ms", "chosen"))
    parts = [y_axis(y, LEFT, RIGHT), text(0, at.times[0] - 12, "time of a token, ms", class_="label")]
    for i, v in enumerate(values):
        x = at.middle(i)
        if v <= y.high:
            parts.append(element("circle", cx=x, cy=y(v), r=2.0, class_="dot"))
        else:
            parts.append(element("path", d=f"M{number(x)} {number(at.times[0] - 3)}l3.5 6h-7z", class_="dot"))
    heights = apart([y(v) for v, _, _ in lines], 15, at.times[0] + 4, at.times[1])
    for (value, name, kind), height in zip(lines, heights, strict=True):
        parts.append(line(LEFT, y(value), RIGHT, y(value), "target" if kind == "chosen" else f"level {kind}"))
        parts.append(text(RIGHT + 8, height + 4, name, class_=kind if kind != "ours" else "name ours"))
    if beyond := sum(v > y.high for v in values):
        words = f"▲ {beyond} beyond, up to {milliseconds(max(values))}"
        parts.append(text(RIGHT, at.times[0] - 12, words, class_="note", text_anchor="end"))
    return "".join(parts)
