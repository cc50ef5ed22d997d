"""Reports for tests: one really measured on a tiny model, and what a hostile model and user would put in it."""

from __future__ import annotations

import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from dpllm.decode.options import GenerateOptions
from dpllm.opening import open_engine
from dpllm.report.data import Report
from dpllm.report.measure import ReportInputs, ReportOptions, measure_report

HOSTILE = (
    "</script><script>document.title='taken'</script>", "\"'><img src=x onerror=\"document.title='taken'\">",
    "<!--", "]]>", "&lt;b&gt;", "</pre></body></html>", "\u2028\x00\x1b[31m\ufffe",
    "\\u003c/script>", "--><svg onload=alert(1)>",
)  # fmt: skip
VOID = {"meta", "link", "br", "img", "input", "hr"}


def tiny_report(overlay: Path, documents: list[list[int]], **options) -> Report:
    """Measured on the tiny overlay, in about a second."""
    engine = open_engine(overlay)
    given = {"target_bits": 3.25, "targets": (2.75, 4.0), "scored_tokens": 128, "queries": 3} | options
    generate = GenerateOptions(max_new_tokens=14, temperature=1.0, seed=1)
    inputs = ReportInputs(
        "import os\n", documents, "some text", generate, None, "tiny", "dpllm report", time.perf_counter()
    )
    return measure_report(engine, inputs, ReportOptions(**given), lambda *stage: None)


def hostile(report: Report) -> Report:
    """The same report where every string that a model or a user has a hand in wants to be markup."""
    g, whole = report.generation, "".join(HOSTILE)
    tokens = tuple(
        replace(t, label=HOSTILE[i % len(HOSTILE)], text=HOSTILE[i % len(HOSTILE)])
        for i, t in enumerate(g.tokens)
    )
    groups = tuple(replace(x, name=f"{x.name}{HOSTILE[0]}") for x in g.groups)
    return replace(
        report, model=whole, command=whole, date=whole,
        generation=replace(g, prompt=whole, first=whole, tokens=tokens, groups=groups),
        frontier=replace(report.frontier, text=whole, notes=(whole,)),
        operating=replace(report.operating, why=whole),
        machine=replace(report.machine, processor=whole, versions={whole: whole}),
    )  # fmt: skip


def long_report(report: Report, tokens: int, layers: int) -> Report:
    """The same report with as much in its timeline, and no two neighbouring cells likely to be equal."""
    g = report.generation
    rng, kinds = np.random.default_rng(0), ("qkv", "o", "gate_up", "down")
    groups = tuple(replace(g.groups[0], layer=i, name=k) for i in range(layers) for k in kinds)
    bits = rng.integers(g.seed_bits, g.resident_bits + 1, (tokens, len(groups))).tolist()
    many = tuple(replace(g.tokens[i % len(g.tokens)], bits=tuple(row)) for i, row in enumerate(bits))
    return replace(report, generation=replace(g, groups=groups, tokens=many))


class Document(HTMLParser):
    """A parsed page: `elements` (tag, attributes) in order, `open` tags left at the end, `crossed` ones that were
    closed out of order, `texts` by tag."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.crossed: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.crossed.append(tag)

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]
