"""Colours of widths.

The sequence darkens evenly in the light theme and lightens evenly in the dark theme. It stays readable for people with
red-green colour blindness, and in greyscale print. The anchors are ColorBrewer's YlGnBu.
"""

from __future__ import annotations

from collections.abc import Sequence

LIGHT = ("#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494", "#081d58")
DARK = ("#14234f", "#253494", "#225ea8", "#1d91c0", "#41b6c4", "#7fcdbb", "#c7e9b4", "#edf8b1", "#ffffd9")
LEVELS = 9  # classes e0 .. e8, for a continuous quantity


def style(widths: Sequence[int]) -> str:
    """Returns the CSS of the colour classes, for both themes.

    `w2`, `w3`, ...: a width as fill. `on2`, ...: text on that fill. `e0`, `e1`, ...: a level as fill and background.
    `one0`, ...: text on that level.
    """
    return f"{_rules(widths, LIGHT)}@media (prefers-color-scheme: dark){{{_rules(widths, DARK)}}}"


def _rules(widths: Sequence[int], anchors: Sequence[str]) -> str:
    rules = []
    for i, width in enumerate(widths):
        # The palest anchor is left out: a cell has to stand out from the page.
        colour = blend(anchors, 0.1 + 0.85 * i / max(1, len(widths) - 1))
        rules.append(f".w{width}{{fill:{colour}}}svg .on{width}{{fill:{ink_on(colour)}}}")
    for level in range(LEVELS):
        colour = blend(anchors, 0.02 + 0.5 * level / (LEVELS - 1))  # far from the colour of text
        ink = ink_on(colour)
        rules.append(
            f".e{level}{{fill:{colour};background:{colour};color:{ink}}}svg .one{level}{{fill:{ink}}}"
        )
    return "".join(rules)


def blend(anchors: Sequence[str], share: float) -> str:
    """Returns the colour, as #rrggbb, at a share [0, 1] of the way along the anchors."""
    at = share * (len(anchors) - 1)
    i = min(int(at), len(anchors) - 2)
    pairs = zip(_channels(anchors[i]), _channels(anchors[i + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02x}" for a, b in pairs)


def ink_on(colour: str) -> str:
    """Returns black or white, whichever contrasts more by WCAG's relative luminance."""
    return "#000" if luminance(colour) > 0.179 else "#fff"


def luminance(colour: str) -> float:
    """Returns the relative luminance of #rrggbb, 0 to 1, as WCAG 2 defines it."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (v / 255 for v in _channels(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
