"""The report in a real browser: it shows, it answers the pointer and the keyboard, and says nothing in the console."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from browser import browser_page, find_browser
from PIL import Image
from report_cases import HOSTILE, hostile

from dpllm.report.formatting import visible
from dpllm.report.page import render

pytestmark = pytest.mark.skipif(
    find_browser() is None,
    reason="no Chromium found (apt-get install chromium, or name one in DPLLM_BROWSER)",
)
PLACE_OF_CELL = """(() => {
  const data = JSON.parse(document.getElementById('cursor-data').textContent);
  const svg = document.getElementById('timeline');
  svg.scrollIntoView();
  const column = (data.right - data.left) / data.tokens.length;
  const at = new DOMPoint(data.left + column * (%d + 0.5), data.rows[%d] + data.rowHeight / 2);
  const p = at.matrixTransform(svg.getScreenCTM());
  return [p.x, p.y];
})()"""
TIP = "document.getElementById('tip').hidden ? null : document.getElementById('tip').innerText"


@pytest.fixture(scope="module")
def files(report, tmp_path_factory):
    """The page as measured, and the hostile one."""
    folder = tmp_path_factory.mktemp("pages")
    for name, content in (("plain", report), ("hostile", hostile(report))):
        (folder / f"{name}.html").write_text(render(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    command = find_browser()
    assert command is not None
    with browser_page(command, tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def quiet(tab):
    """The tab, whose console has to stay empty and which may ask for nothing but the file."""
    tab.problems.clear()
    yield tab
    assert tab.problems == []


def colours(png: bytes) -> Counter:
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return Counter(map(tuple, np.asarray(image).reshape(-1, 3)[::7].tolist()))


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_it_shows(quiet, files, width, dark):
    quiet.open(files / "plain.html", width=width, dark=dark)
    found = colours(quiet.screenshot())
    paper, count = found.most_common(1)[0]
    assert (sum(paper) < 150) == dark, "the theme follows the system"
    assert len(found) > 60 and count < 0.97 * sum(found.values()), "the page is not blank"
    assert quiet.value("document.documentElement.scrollWidth <= innerWidth"), (
        "nothing is wider than the window"
    )
    boxes = quiet.value("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)")
    assert len(boxes) == 7 and min(boxes) > 80


def test_the_pointer_names_token_group_and_bits(quiet, files, report):
    quiet.open(files / "plain.html")
    for token, group in ((0, 0), (5, 6), (12, len(report.generation.groups) - 1)):
        quiet.hover(*quiet.value(PLACE_OF_CELL % (token, group)))
        said, t, g = quiet.value(TIP), report.generation.tokens[token], report.generation.groups[group]
        assert said.startswith(f"token {token + 1}: {visible(t.label)}"), said
        assert f"layer {g.layer} · {g.name}: {t.bits[group]} bits" in said
        assert f"{t.effective_bits:.2f} effective bits" in said
    quiet.hover(3, 3)
    assert quiet.value(TIP) is None


def test_the_pointer_on_the_text(quiet, files, report):
    quiet.open(files / "plain.html")
    number = next(i for i, t in enumerate(report.generation.tokens) if t.text.strip())
    place = f"""(() => {{ const s = document.querySelector('pre span[data-t="{number}"]');
      s.scrollIntoView({{block: 'center'}}); const b = s.getClientRects()[0];
      return [b.x + b.width / 2, b.y + b.height / 2]; }})()"""
    quiet.hover(*quiet.value(place))
    assert quiet.value(TIP).startswith(f"token {number + 1}: ")


def test_the_keyboard_moves_the_cursor_and_is_not_held(quiet, files, report):
    quiet.open(files / "plain.html")
    quiet.press("Tab")
    assert quiet.value("document.activeElement.id") == "timeline"
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        quiet.press(key)
    t = report.generation.tokens[1]
    said = quiet.value("document.getElementById('live').textContent")
    assert said.startswith(f"token 2: {visible(t.label)}") and f"{t.bits[1]} bits" in said
    quiet.press("End")
    assert quiet.value(TIP).startswith(f"token {len(report.generation.tokens)}: ")
    quiet.press("Escape")
    assert quiet.value(TIP) is None
    quiet.press("Tab")
    assert quiet.value("document.activeElement.id") != "timeline"


def test_hostile_text_stays_text(quiet, files):
    quiet.open(files / "hostile.html")
    assert quiet.value("document.title").startswith("dpllm report: ")
    assert quiet.value("document.images.length") == 0 and quiet.value("document.scripts.length") == 2
    for token in (0, 1, 6):
        quiet.hover(*quiet.value(PLACE_OF_CELL % (token, 0)))
        assert visible(HOSTILE[token]) in quiet.value("document.getElementById('tip').textContent")


def test_it_shows_without_scripts(quiet, files):
    quiet.script(False)
    try:
        quiet.open(files / "plain.html")
        assert len(colours(quiet.screenshot())) > 60
    finally:
        quiet.script(True)
