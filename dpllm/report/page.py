"""Writes the page: one HTML file that opens from disk and needs no network."""

from __future__ import annotations

from importlib import resources
from typing import Any

import numpy as np

from dpllm.base.json_text import strict_json
from dpllm.report import bars, curves, timeline
from dpllm.report.colours import LEVELS, style
from dpllm.report.data import Generation, Report
from dpllm.report.formatting import POLICY_NAMES, digits, milliseconds, several, size, visible
from dpllm.report.svg import element, escape


def render(report: Report) -> str:
    """Returns the whole HTML document."""
    g = report.generation
    files = resources.files("dpllm.report")
    css = (files / "page.css").read_text("utf-8") + style(range(g.seed_bits, g.resident_bits + 1))
    body = "\n".join([
        _head(report), _tiles(report), _where_the_bits_went(report), _frontier(report), _memory(report),
        _service(report), _facts(report),
        '<div id="tip" role="tooltip" hidden></div><div id="live" class="off" aria-live="polite"></div>',
        f'<script type="application/json" id="cursor-data">{as_script_data(timeline.cursor_data(g))}</script>',
        f"<script>{(files / 'page.js').read_text('utf-8')}</script>",
    ])  # fmt: skip
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>dpllm report: {escape(report.model)}</title>\n<style>{css}</style>"
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def as_script_data(value: Any) -> str:
    """Returns JSON that cannot end a script element. A number that is not finite becomes null."""
    text = strict_json(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _section(title: str, *content: str) -> str:
    return element("section", element("h2", escape(title)), *content)


def _figure(drawing: str, caption: str = "", class_: str | None = None, title: str = "") -> str:
    head = element("h3", escape(title)) if title else ""
    below = element("figcaption", escape(caption)) if caption else ""
    return element("figure", head, element("div", drawing, class_=class_), below)


def _p(words: str, class_: str | None = None) -> str:
    return element("p", escape(words), class_=class_)


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = element("tr", *(element("th", escape(h), scope="col") for h in head))
    lines = (element("tr", *(element("td", escape(c)) for c in row)) for row in rows)
    return element("div", element("table", element("thead", top), element("tbody", *lines)), class_="scroll")


# -- from top to bottom -----------------------------------------------------------------------------------


def _head(report: Report) -> str:
    g, o = report.generation, report.operating
    asked = (
        f"at most {o.target_tpot_ms:g} ms a token"
        if o.target_tpot_ms is not None
        else f"{o.target_bits:g} bits per weight"
    )
    where = f"{report.machine.processor}, {several(report.machine.threads, 'thread')}, {report.machine.backend} backend"
    return element(
        "header",
        element("h1", escape(f"{report.model}: {len(g.tokens) + 1} tokens at a target of {asked}")),
        _p(f"A real generation and real measurements on {where}; {report.date}.", "soft"),
        _p(_summary(report), "lead"),
    )


def _summary(report: Report) -> str:
    """Describes the generation and its target, in three sentences."""
    g, o = report.generation, report.operating
    widths = np.asarray([t.bits for t in g.tokens])
    moved = float((widths != np.asarray([group.static_bits for group in g.groups])).mean())
    return (
        f"The model is stored once, as {g.resident_bits} nested bit planes of every matrix. At each token every group "
        f"of matrices read {widths.min()} to {widths.max()} of them, more where its input showed that another plane "
        f"saves more loss than its bytes cost; {moved:.0%} of these choices differ from the best static widths of "
        f"the same size. {o.why}"
    )


def _tiles(report: Report) -> str:
    g, f, o = report.generation, report.frontier, report.operating
    spread, held = g.tpot_ms, sum(k.held for k in report.nbytes)
    chosen = next(p for p in f.of(o.policy) if p.target_bits == o.target_bits)
    loss = chosen.perplexity / f.widest.perplexity - 1
    asked = f"p95 {milliseconds(spread.p95)}"
    if o.target_tpot_ms is not None:
        asked = f"target {o.target_tpot_ms:g}; {asked}"
    tiles = [
        ("effective bits", f"{g.effective_bits:.3f}", f"target {o.target_bits:g}"),
        ("time of a token, median", milliseconds(spread.p50), asked),
        ("weights read for a token", size(g.weight_bytes), f"every plane: {size(f.widest.weight_bytes)}"),
        ("memory held", size(held), f"{g.resident_bits} planes, tables, head, cache"),
        ("perplexity", f"{chosen.perplexity:.3f}", f"{loss:+.1%} against every plane ({f.widest.perplexity:.3f})"),
        ("KV cache", size(g.tokens[-1].kv_bytes),
         "whole" if report.kept is None else f"{report.kept.ratio:.0%} of the context kept"),
    ]  # fmt: skip
    cells = (
        element(
            "div", element("dt", escape(name)), element("dd", escape(value), element("small", escape(more)))
        )
        for name, value, more in tiles
    )
    return element("dl", *cells, class_="tiles")


def _where_the_bits_went(report: Report) -> str:
    g, o = report.generation, report.operating
    words = (
        "Each column is a token, each row a group of matrices that decide together. Point at a cell, or focus the "
        "figure and use the arrow keys."
    )
    caption = (
        "Widths are those of the step that produced the token; effective bits weigh them by matrix size."
    )
    if o.target_tpot_ms is not None:
        caption += " The target in bits was predicted from the target in ms, by the times measured before."
    return _section(
        "Where the bits went",
        _p(words),
        _figure(timeline.timeline(g, o), caption, "wide"),
        element("h3", "The text, coloured by each token's effective bits", style="margin-top:26px"),
        _text(g),
    )


def _text(g: Generation) -> str:
    values = [t.effective_bits for t in g.tokens]
    low, high = np.percentile(values, (2, 98))
    span = max(float(high - low), 1e-9)
    pieces = [
        element("span", escape(g.prompt), class_="prompt"),
        element("span", escape(g.first), title="from reading the prompt"),
    ]
    for i, t in enumerate(g.tokens):
        if t.text:
            level = min(LEVELS - 1, max(0, int((t.effective_bits - low) / span * LEVELS)))
            tip = f"{visible(t.label)}: {t.effective_bits:.2f} bits, {milliseconds(t.tpot_ms)}"
            pieces.append(element("span", escape(t.text), class_=f"e{level}", data_t=i, title=tip))
    swatches = element(
        "span", *(element("i", class_=f"e{i}") for i in range(LEVELS)), class_="scale", aria_hidden="true"
    )
    caption = (
        f"{low:.2f} {swatches} {high:.2f} effective bits. Grey: the prompt, read at {g.resident_bits} bits."
    )
    # White space in a pre is text, so no line breaks go between the pieces. HTML drops the first newline.
    return f"<pre>\n{''.join(pieces)}</pre>" + element("figcaption", caption)


def _frontier(report: Report) -> str:
    f, o = report.frontier, report.operating
    timed = f"Policies take turns; their steps are timed after a cache of {size(f.kv_bytes)}."
    drawings = [
        _figure(curves.quality_against_time(f, o), title="Quality against latency"),
        _figure(curves.quality_against_bytes(f, o), title="Quality against bytes read"),
    ]
    if apart := curves.difference_to_static(f):
        drawings.append(_figure(apart, title="Against static, at equal bits"))
    rows = [
        [POLICY_NAMES.get(p.policy, p.policy), f"{p.target_bits:g}", f"{p.effective_bits:.3f}", f"{p.perplexity:.3f}",
         digits(p.tpot_ms.p50), digits(p.tpot_ms.p95), size(p.weight_bytes),
         "" if (d := p.less_static) is None else f"{1e3 * d.mean:+.1f} [{1e3 * d.low:+.1f}, {1e3 * d.high:+.1f}]"]
        for p in (*f.points, f.widest)
    ]  # fmt: skip
    heads = [
        "policy",
        "target",
        "bits",
        "perplexity",
        "ms p50",
        "ms p95",
        "read",
        "0.001 nats minus static at equal bits, 95%",
    ]
    words = (
        f"Perplexity on {f.scored:,} tokens of {f.text} ({several(f.documents, 'piece')}), every token decoded at its "
        f"own widths, from an empty cache. {timed} Differences smaller than their bars are not significant."
    )
    return _section(
        "Quality, time and bytes",
        _p(words),
        element("div", *drawings, class_="grid"),
        *(_p(n, "soft") for n in f.notes),
        element("details", element("summary", "The same as a table"), _table(heads, rows)),
    )


def _memory(report: Report) -> str:
    kinds = [k for k in report.nbytes if k.read or k.held]
    kept = element(
        "p",
        "The cache is whole: every layer and head keeps every pair. With a pruned context (dpllm context build, then "
        "--context) this page shows the pairs that each head keeps.",
        class_="soft",
    )
    if (k := report.kept) is not None:
        caption = f"{k.ratio:.1%} of the pairs of {k.tokens:,} tokens are kept, chosen by {k.policy}."
        kept = _figure(bars.kept_chart(k), caption, title="Pairs kept by layer and KV head")
    counted = "Read: mean over the decoded tokens. Held: as the backend holds it, the cache at its fullest."
    chart = _figure(
        bars.bytes_chart(kinds), counted, title="Bytes by kind: read for a token (dark), held (light)"
    )
    return _section("Memory", element("div", chart, kept, class_="grid"))


def _service(report: Report) -> str:
    s, o = report.service, report.operating
    count = len(s.levels[0].tpot_ms)
    rows = []
    for level in s.levels:
        for what, values, write in (
            ("bits", level.effective_bits, lambda v: f"{v:.3f}"),
            ("ms", level.tpot_ms, digits),
        ):
            found = [write(float(v)) for v in np.percentile(values, (5, 50, 95))]
            rows.append([f"{level.mode}, {what}", *found, write(max(values))])
    words = (
        f"{count} queries from the text, {s.prompt_tokens} tokens read and up to {s.new_tokens} decoded each, at a "
        f"target of {o.target_bits:g} bits. With lambda fixed, the bits of a query follow its tokens. Held on target, "
        "a correction brings each query's mean to the target within some thirty tokens."
    )
    table = _table(["over queries", "p5", "p50", "p95", "most"], rows)
    return _section(
        "Service levels: one query after another",
        _p(words),
        element(
            "div",
            _figure(bars.service_chart(s, "bits", o), title="Effective bits"),
            _figure(bars.service_chart(s, "ms", o), title="Latency"),
            element("div", element("h3", "Percentiles"), table),
            class_="grid",
        ),
    )


def _facts(report: Report) -> str:
    m, g, o = report.machine, report.generation, report.operating
    context = f", after {g.context_tokens:,} tokens of context" if g.context_tokens else ""
    facts = {
        "command": report.command,
        "processor": f"{m.processor}, {several(m.cores, 'core')}",
        "backend": f"{m.backend}, {several(m.threads, 'thread')}",
        "versions": ", ".join(f"{k} {v}" for k, v in m.versions.items()),
        "prompt": f"{several(g.prompt_tokens, 'token')}{context}",
        "first token": f"after {milliseconds(g.ttft_ms)}, the time to read the prompt",
        "policy": f"{POLICY_NAMES[o.policy]}, log2 lambda {o.log2_lambda:g} before its correction",
        "took": f"{report.seconds:.0f} s",
    }
    items = (
        element("dt", escape(k)) + element("dd", element("code", escape(v)) if k == "command" else escape(v))
        for k, v in facts.items()
    )
    return _section("How it was measured", element("dl", *items, class_="facts"))
