"""Writes small pieces of SVG: elements, scales, axes. Functions take and return strings; all text is escaped."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from scipy.optimize import isotonic_regression

_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]"
)  # control characters and lone surrogates
_numbers = count(1)  # numbers of figures, for the ids of their labels


def escape(value: object) -> str:
    """Escapes text or an attribute's value for HTML. Characters that HTML does not allow become U+FFFD."""
    return html.escape(_FORBIDDEN.sub("\ufffd", str(value)), quote=True)


def element(name: str, *children: str, **attributes: object) -> str:
    """Returns <name attributes>children</name>.

    `class_` is written as class; other underscores become hyphens; an attribute that is None is left out. Children are
    markup; escape text first.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{number(v) if isinstance(v, (int, float)) else escape(v)}"'
        for key, v in attributes.items()
        if v is not None
    )
    return f"<{name}{given}>{''.join(children)}</{name}>"


def number(value: float) -> str:
    """Formats a coordinate to a hundredth, without trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(x: float, y: float, content: object, **attributes: object) -> str:
    """Draws a text. Its class may be `label` (title of an axis), `name` (of a curve), or none."""
    return element("text", escape(content), x=float(x), y=float(y), **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """Draws a straight line."""
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str) -> str:
    """Draws an open line through points."""
    return element("path", d="M" + "L".join(f"{number(x)} {number(y)}" for x, y in points), class_=class_)


def figure(
    width: float, height: float, title: str, description: str, *content: str, **attributes: object
) -> str:
    """Returns an <svg> that scales with its box, with a title and a description for screen readers."""
    n = next(_numbers)
    head = element("title", escape(title), id=f"t{n}") + element("desc", escape(description), id=f"d{n}")
    options = {"role": "img"} | attributes
    return element(
        "svg", head, *content, viewBox=f"0 0 {number(width)} {number(height)}", aria_labelledby=f"t{n} d{n}", **options
    )  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """A linear map from [low, high] in units to [start, end] in pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Returns the position of a value, in pixels."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round values, about one every 60 pixels across or every 32 pixels down (start > end)."""
        apart = 60 if self.end > self.start else 32
        return ticks(self.low, self.high, max(2, int(abs(self.end - self.start) / apart)))


def ticks(low: float, high: float, most: int) -> list[float]:
    """Returns about `most` or fewer multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    step = next_step((high - low) / most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def next_step(least: float) -> float:
    """Returns the smallest 1, 2 or 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))


def scale_over(
    values: Sequence[float], start: float, end: float, *, zero: bool = False, pad: float = 0.06
) -> Scale:
    """Returns a scale that holds all values, with a margin. zero: the scale starts at zero."""
    low, high = float(min(values)), float(max(values))
    room = (high - low) * pad or abs(high) * 0.05 or 1.0
    return Scale(0.0 if zero else low - room, high + room, start, end)


def decimals(values: Sequence[float]) -> Callable[[float], str]:
    """Returns a function that formats all ticks alike, with as many decimals as their distance needs."""
    apart = abs(values[1] - values[0]) if len(values) > 1 else abs(values[0] if values else 1) or 1
    places = max(0, -math.floor(math.log10(apart) + 1e-9))
    return lambda v: f"{0.0 if abs(v) < apart / 1e6 else v:.{places}f}"


def x_axis(scale: Scale, y: float, label: str) -> str:
    """Draws ticks below y, and the label, which includes the unit."""
    shown = scale.ticks
    write = decimals(shown)
    marks = [line(scale(v), y, scale(v), y + 4, "tick") + text(scale(v), y + 17, write(v), text_anchor="middle")
             for v in shown]  # fmt: skip
    middle = (scale.start + scale.end) / 2
    return (
        line(scale.start, y, scale.end, y, "axis")
        + "".join(marks)
        + text(middle, y + 36, label, class_="label", text_anchor="middle")
    )


def y_axis(scale: Scale, x: float, right: float, label: str | None = None) -> str:
    """Draws ticks left of x with light lines to `right`. The label is above the axis, so that it is not rotated."""
    shown = scale.ticks
    write = decimals(shown)
    marks = [
        line(x, scale(v), right, scale(v), "grid") + text(x - 6, scale(v) + 4, write(v), text_anchor="end")
        for v in shown
    ]
    top = text(0, scale.end - 12, label, class_="label") if label else ""
    return "".join(marks) + top


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Returns positions near the wanted ones, in the same order, at least `gap` apart.

    Where [low, high] has too little room, the gap is smaller. The positions are the least squares solution: minus
    i * gap, they only need to be ascending, which is isotonic regression.
    """
    order = np.argsort(wanted, kind="stable")
    gap = min(gap, (high - low) / max(1, len(order) - 1))
    steps = gap * np.arange(len(order))
    nearest = isotonic_regression(np.asarray(wanted, dtype=float)[order] - steps).x
    placed = np.clip(nearest, low, max(low, high - steps[-1])) + steps
    out = np.empty(len(placed))
    out[order] = placed
    return [float(v) for v in out]


MARKS = {"circle": "M0-4.2A4.2 4.2 0 1 1 0 4.2A4.2 4.2 0 1 1 0-4.2Z", "square": "M-3.8-3.8H3.8V3.8H-3.8Z",
         "triangle": "M0-4.8L4.6 3.4H-4.6Z", "diamond": "M0-5.2L5.2 0L0 5.2L-5.2 0Z"}  # fmt: skip


def mark(x: float, y: float, shape: str, class_: str, tip: str | None = None) -> str:
    """Draws a marker. tip: the text that a browser shows under the pointer."""
    inner = element("title", escape(tip)) if tip else ""
    where = f"translate({number(float(x))} {number(float(y))})"
    return element("path", inner, d=MARKS[shape], transform=where, class_=class_)
