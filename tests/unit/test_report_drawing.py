"""Scales, ticks, labels, colours and figures in words."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpllm.report.colours import DARK, LEVELS, LIGHT, blend, ink_on, luminance, style
from dpllm.report.formatting import digits, milliseconds, size, visible
from dpllm.report.svg import Scale, apart, decimals, element, escape, figure, scale_over, text, ticks

finite = st.floats(-1e6, 1e6)


@given(finite, st.floats(1e-6, 1e6), st.integers(2, 12))
def test_ticks_are_round_and_within(low, span, most):
    high = low + span
    if high == low:
        return
    found = ticks(low, high, most)
    assert len(found) <= most + 1
    slack = 1e-6 * (span + abs(low) * 1e-6)
    assert all(low - slack <= v <= high + slack for v in found)
    if len(found) > 1:
        step = (found[-1] - found[0]) / (len(found) - 1)
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6 * (1 + abs(low) / span)


@given(st.lists(finite, min_size=1, max_size=20), st.booleans())
def test_a_scale_holds_its_values(values, zero):
    scale = scale_over([abs(v) for v in values] if zero else values, 10, 200, zero=zero)
    for v in values:
        assert 10 - 1e-6 <= scale(abs(v) if zero else v) <= 200 + 1e-6


def test_a_scale_is_linear():
    scale = Scale(2.0, 6.0, 100.0, 0.0)
    assert [scale(v) for v in (2, 3, 6)] == [100, 75, 0]
    assert scale.ticks == [2, 4, 6]


@given(st.lists(st.floats(0, 300), min_size=1, max_size=8))
def test_labels_are_moved_apart(wanted):
    placed = apart(wanted, 15, 0, 300)
    order = sorted(range(len(wanted)), key=lambda i: (placed[i], wanted[i]))
    assert all(placed[b] - placed[a] >= 15 - 1e-6 for a, b in pairwise(order))
    assert all(-1e-6 <= p <= 300 + 1e-6 for p in placed)
    assert sorted(wanted) == [wanted[i] for i in order] or len(set(wanted)) < len(wanted)


def test_labels_that_are_apart_stay():
    assert apart([10.0, 90.0, 50.0], 15, 0, 100) == [10, 90, 50]


def test_ticks_are_written_alike():
    assert [decimals([0.0, 0.05])(v) for v in (0.0, 0.05, -1e-17)] == ["0.00", "0.05", "0.00"]
    assert [decimals([10, 20])(v) for v in (10, 20)] == ["10", "20"]


def test_elements_escape_attributes_and_text():
    assert element("a", "x", title='"<&>', class_="c", data_t=3, href=None) == (
        '<a title="&quot;&lt;&amp;&gt;" class="c" data-t="3">x</a>'
    )
    assert text(1, 2.5, "<b>") == '<text x="1" y="2.5">&lt;b&gt;</text>'
    assert escape("a\x00\x1bb\ud800\n") == "a\ufffd\ufffdb\ufffd\n"
    drawn = figure(10, 5, "<t>", "<d>")
    assert (
        "<title" in drawn and "&lt;t&gt;" in drawn and "&lt;d&gt;" in drawn and 'viewBox="0 0 10 5"' in drawn
    )


@pytest.mark.parametrize("anchors", [LIGHT, DARK])
@pytest.mark.parametrize("count", [2, 5, 7])
def test_widths_differ_in_lightness(anchors, count):
    """Whoever sees no hue, and a printer without colour, can still order them."""
    shades = [luminance(blend(anchors, 0.1 + 0.85 * i / (count - 1))) for i in range(count)]
    steps = [b - a for a, b in pairwise(shades)]
    assert all(s > 0 for s in steps) or all(s < 0 for s in steps)
    ratios = [(max(a, b) + 0.05) / (min(a, b) + 0.05) for a, b in pairwise(shades)]
    assert min(ratios) > 1.1


@pytest.mark.parametrize("anchors", [LIGHT, DARK])
def test_text_on_a_colour_can_be_read(anchors):
    for level in range(LEVELS):
        shade = luminance(blend(anchors, 0.02 + 0.5 * level / (LEVELS - 1)))
        ink = luminance(
            {"#000": "#000000", "#fff": "#ffffff"}[ink_on(blend(anchors, 0.02 + 0.5 * level / (LEVELS - 1)))]
        )
        assert (max(shade, ink) + 0.05) / (min(shade, ink) + 0.05) >= 4.5  # WCAG AA


def test_the_style_has_every_width_in_both_themes():
    css = style(range(3, 9))
    assert all(css.count(f".w{w}{{") == 2 for w in range(3, 9)) and css.count("{") == css.count("}")


def test_figures_in_words():
    assert [digits(v) for v in (0, 0.0123, 1.0, 9.996, 45.67, 123.4)] == [
        "0",
        "0.012",
        "1.00",
        "10.0",
        "45.7",
        "123",
    ]
    assert milliseconds(1.834) == "1.83 ms"
    assert [size(v) for v in (17, 1500, 3.75e6, 999_999, 2.5e9)] == [
        "17 B",
        "1.50 kB",
        "3.75 MB",
        "1.00 MB",
        "2.50 GB",
    ]
    assert [visible(t) for t in (" def", "\n\t", "\x1b[0m", "", "é")] == [
        "␣def",
        "↵⇥",
        "\\x1b[0m",
        "(nothing)",
        "é",
    ]
