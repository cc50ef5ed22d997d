"""`dpllm report`: what is measured, what the page holds, and what is refused."""

from __future__ import annotations

import json
import re
import resource
from dataclasses import asdict, replace

import numpy as np
import pytest
from report_cases import HOSTILE, Document, hostile, long_report
from scipy import stats

from dpllm.base.errors import InputError
from dpllm.base.files import write_text
from dpllm.evaluation.evaluate import DocumentScore, evaluate
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.opening import open_engine
from dpllm.policies.make import make_policy
from dpllm.report import frontier as frontiers
from dpllm.report import query_spread
from dpllm.report.accounting import held_bytes, read_bytes
from dpllm.report.data import KeptPairs, Spread
from dpllm.report.formatting import visible
from dpllm.report.measure import windows
from dpllm.report.page import as_script_data, render

QUICK = ("--score-tokens", 64, "--queries", 2, "--max-new-tokens", 8, "--targets", "2.5,4")


@pytest.fixture(scope="module")
def page(report) -> str:
    return render(report)


# -- what is measured -------------------------------------------------------------------------------------


def test_the_generation_is_the_engines(report, tiny_overlay):
    g = report.generation
    assert len(g.tokens) == 13, "one of the 14 came from reading the prompt"
    weights = np.asarray([x.weights for x in g.groups])
    for t in g.tokens:
        assert t.effective_bits == pytest.approx(np.asarray(t.bits) @ weights / weights.sum(), abs=1e-3)
        assert t.tpot_ms > 0
    assert [x.name for x in g.groups[:4]] == ["qkv", "o", "gate_up", "down"]
    assert [x.layer for x in g.groups] == sorted(x.layer for x in g.groups)
    static = make_policy("static", 3.25, open_engine(tiny_overlay).decoder, open_engine(tiny_overlay).profile)
    assert [x.static_bits for x in g.groups] == static.fixed_bits


def test_bytes_by_kind_add_up_to_what_the_steps_counted(report):
    read = {k.kind: k.read for k in report.nbytes}
    counted = sum(read[k] for k in ("planes", "tables", "scales", "head", "selector"))
    assert counted == pytest.approx(report.generation.weight_bytes, rel=1e-4)
    assert all(k.held >= 0 and k.read >= 0 for k in report.nbytes)
    assert read["KV cache"] <= report.generation.tokens[-1].kv_bytes


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_weights_bytes(quantized, backend):
    decoder = load_decoder(quantized, LoadOptions(backend=backend))
    for group in decoder.groups:
        for bits in range(2, 7):
            planes, tables, scales = read_bytes(group, bits)
            assert planes + tables + scales == group.bytes_at[bits - 2]
            assert planes == bits * held_bytes(group.weight)[0] // 6
            assert tables > 0 and scales >= 0
        assert min(held_bytes(group.weight)[:2]) > 0


def test_quality_is_the_evaluators(report, tiny_overlay, report_documents):
    engine, pieces = open_engine(tiny_overlay), windows(report_documents, 32, 128, 2)
    for name, target in (("static", 4.0), ("rate-distortion", 2.75), ("dp-llm", 2.75)):
        point = next(p for p in report.frontier.of(name) if p.target_bits == target)
        fresh = make_policy(name, target, engine.decoder, engine.profile)
        scored = evaluate(engine.decoder, fresh, target, pieces)
        assert (point.perplexity, point.effective_bits, point.weight_bytes) == (
            scored.perplexity, scored.effective_bits, scored.weight_bytes_per_token,
        )  # fmt: skip
        assert 0 < point.tpot_ms.p25 <= point.tpot_ms.p50 <= point.tpot_ms.p95
    assert report.frontier.widest.effective_bits == 6
    assert report.frontier.scored == sum(len(p) - 1 for p in pieces)


def test_curves_hold_every_policy_and_the_chosen_point(report):
    assert {p.policy for p in report.frontier.points} == {"static", "dp-llm", "rate-distortion"}
    assert [p.target_bits for p in report.frontier.of("rate-distortion")] == [2.75, 3.25, 4.0]
    assert report.operating.target_bits == 3.25
    assert all(p.less_static is None for p in (*report.frontier.of("static"), report.frontier.widest))


def test_differences_are_at_equal_bits(report, tiny_overlay, report_documents):
    engine, pieces = open_engine(tiny_overlay), windows(report_documents, 32, 128, 2)
    for name in ("rate-distortion", "dp-llm"):
        point = report.frontier.of(name)[0]
        same = make_policy("static", point.effective_bits, engine.decoder, engine.profile)
        fixed = evaluate(engine.decoder, same, point.effective_bits, pieces)
        assert fixed.effective_bits == pytest.approx(point.effective_bits, abs=0.05)
        nats = np.log(point.perplexity / fixed.perplexity)
        assert point.less_static.mean == pytest.approx(nats, abs=1e-4)
        assert point.less_static.low < point.less_static.mean < point.less_static.high


def test_the_interval_is_students():
    rng = np.random.default_rng(0)
    gaps = rng.normal(0.3, 1.0, 8)
    one, other = ([DocumentScore(g, 10, 0, 0) for g in values] for values in (gaps, gaps * 0))
    found = frontiers.difference(one, other)
    low, high = stats.t.interval(0.95, 7, gaps.mean() / 10, stats.sem(gaps) / 10)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-5)


def test_service_levels(report):
    held, fixed = report.service.levels
    assert (held.mode, fixed.mode) == ("held on target", "lambda fixed")
    for level in report.service.levels:
        assert len(level.effective_bits) == len(level.tpot_ms) == 3
        assert all(2 <= b <= 6 for b in level.effective_bits) and min(level.tpot_ms) > 0
    assert held.effective_bits != fixed.effective_bits
    miss = [np.abs(np.asarray(s.effective_bits) - 3.25).mean() for s in report.service.levels]
    assert miss[0] < miss[1], "the correction brings queries nearer to the target"


def test_everything_is_json(report):
    said = json.loads(json.dumps(report.as_json()))
    assert said["summary"]["effective_bits"] == round(report.generation.effective_bits, 4)
    assert said["generation"]["groups"] == [asdict(g) for g in report.generation.groups]
    assert set(said) >= {"operating", "frontier", "nbytes", "service", "kept", "machine"}


def test_policies_that_were_not_calibrated(tiny_overlay):
    engine = open_engine(tiny_overlay)
    engine.profile = replace(engine.profile, extra={})
    cells, notes = frontiers.cells_of(engine, ("static", "dp-llm"), [3.0], explicit=False)
    assert {name for name, _ in cells} == {"static", "rate-distortion"}
    assert len(notes) == 1 and "dpllm calibrate OVERLAY --dp-llm --targets 3" in notes[0]
    with pytest.raises(InputError, match="holds nothing for policy 'dp-llm'"):
        frontiers.cells_of(engine, ("dp-llm",), [3.0], explicit=True)
    with pytest.raises(InputError, match="whole bits"):
        frontiers.cells_of(engine, ("uniform",), [3.5], explicit=True)


def test_windows_are_spread_and_within_bounds():
    text = [list(range(100)), list(range(7)), list(range(40))]
    found = windows(text, 20, 60, 5)
    assert [len(w) for w in found] == [20, 20, 20] and found[0][0] == 0 and found[-1] == text[2][20:]
    assert [len(w) for w in windows(text, 20, 10**6, 5)] == [20] * 5 + [7] + [20] * 2
    assert windows([[1]], 20, 60, 2) == []


# -- the page ---------------------------------------------------------------------------------------------


def test_the_page_is_whole(page, report):
    found = Document(page)
    assert found.open == [] and found.crossed == []
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids)), "ids are unique"
    names = {a["aria-labelledby"] for a in found.all("svg")}
    assert len(names) == len(found.all("svg")) == 7
    assert set(" ".join(names).split()) <= set(ids)
    assert len(found.all("desc")) == 7 and all(len(d) > 20 for d in found.texts["desc"])
    assert found.all("html") == [{"lang": "en"}] and found.texts["h1"][0].startswith("tiny: 14 tokens")
    assert "prefers-color-scheme: dark" in found.texts["style"][0]


def test_the_page_asks_nothing_of_a_network(page):
    found = Document(page)
    for tag, attributes in found.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert attributes.get(name, "data:,").startswith(("data:", "#")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert "url(" not in (attributes.get("style") or "")
    code = "".join(found.texts["style"] + found.texts["script"])
    assert not re.search(r"@import|url\(|https?:|fetch\(|XMLHttpRequest|WebSocket|import\(", code)


def test_the_cursor_knows_every_cell(page, report):
    data = json.loads(Document(page).texts["script"][0])
    assert [t["text"] for t in data["tokens"]] == [visible(t.label) for t in report.generation.tokens]
    assert [t["bits"] for t in data["tokens"]] == [
        "".join(map(str, t.bits)) for t in report.generation.tokens
    ]
    assert len(data["groups"]) == len(data["rows"]) == len(report.generation.groups)


def test_every_cell_is_drawn_once(page, report):
    """The rectangles of each width's path cover as many cells as there are choices of it."""
    g, data = report.generation, json.loads(Document(page).texts["script"][0])
    column = (data["right"] - data["left"]) / len(g.tokens)
    bits = np.asarray([t.bits for t in g.tokens])
    drawn = {}
    for a in Document(page).all("path"):
        if re.fullmatch(r"w\d", a.get("class") or ""):
            drawn[int(a["class"][1])] = sum(float(w) for w in re.findall(r"h(\d[\d.]*)v", a["d"])) / column
    assert drawn == {w: pytest.approx((bits == w).sum(), abs=0.1) for w in np.unique(bits)}


def test_what_model_and_user_say_stays_text(report):
    found = Document(render(hostile(report)))
    assert found.open == [] and found.crossed == []
    assert found.all("img") == [] and len(found.all("script")) == 2 and len(found.all("body")) == 1
    assert found.all("b") == []
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    data = json.loads(found.texts["script"][0])
    assert [t["text"] for t in data["tokens"]][:3] == [visible(h) for h in HOSTILE[:3]]
    text = found.texts["pre"][0]
    assert HOSTILE[0] in text and HOSTILE[1] in text and "&lt;b&gt;" in text
    assert "\x00" not in text and "\x1b" not in text


def test_script_data_cannot_end_its_element():
    written = as_script_data({"a": "</script><!--&\u2028"})
    assert not re.search(r"[<>&\u2028]", written)
    assert json.loads(written) == {"a": "</script><!--&\u2028"}


def test_a_long_generation_stays_small(report):
    page = render(long_report(report, tokens=256, layers=7))
    assert len(page.encode()) < 1_000_000
    assert Document(page).crossed == []


def test_layers_without_room_for_names(report):
    """An 80-layer model: rows of a few pixels still draw."""
    found = Document(render(long_report(report, tokens=40, layers=80)))
    assert found.crossed == [] and len(found.all("svg")) == 7


def test_kept_pairs_are_drawn(report):
    kept = KeptPairs("kvzip", 200, ((200, 20), (0, 100), (77, 33)))
    assert kept.ratio == pytest.approx(430 / 1200)
    page = render(replace(report, kept=kept))
    assert "35.8% of the pairs of 200 tokens are kept, chosen by kvzip" in page
    assert "layer 2, KV head 0: 77 of 200 pairs kept" in page
    assert "The cache is whole" not in page


def test_a_target_in_ms_is_drawn(report):
    page = render(replace(report, operating=replace(report.operating, target_tpot_ms=1.5)))
    assert "target 1.5 ms" in page and "at most 1.5 ms a token" in page


def test_one_token_and_equal_values(report):
    """Scales do not divide by zero where nothing differs."""
    g = report.generation
    one = replace(g, tokens=(replace(g.tokens[0], bits=(3,) * len(g.groups), effective_bits=3.25),))
    same = tuple(
        replace(p, perplexity=5.0, tpot_ms=Spread.of([1.0]), weight_bytes=10) for p in report.frontier.points
    )
    flat = replace(report.frontier, points=same, widest=same[0])
    levels = tuple(replace(s, effective_bits=(3.0,) * 3, tpot_ms=(1.0,) * 3) for s in report.service.levels)
    page = render(
        replace(report, generation=one, frontier=flat, service=replace(report.service, levels=levels))
    )
    assert "nan" not in page and Document(page).crossed == []


# -- the command ------------------------------------------------------------------------------------------


def test_the_reference_model(ok, tmp_path):
    out = tmp_path / "r.html"
    said = ok("report", "-o", out, *QUICK, "--json").json
    assert said["path"] == str(out) and said["kept"] is None
    assert said["operating"]["target_bits"] == 3.5
    ours = [p for p in said["frontier"]["points"] if p["policy"] == "rate-distortion"]
    assert [p["target_bits"] for p in ours] == [2.5, 3.5, 4.0]
    assert ours[0]["perplexity"] > said["frontier"]["widest"]["perplexity"] > 1
    assert Document(out.read_text("utf-8")).crossed == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html"]


def test_a_pruned_context(ok, tiny_overlay, calibration_documents, tmp_path):
    text = tmp_path / "notes.py"
    text.write_text(calibration_documents[1][:400])
    ctx, out = tmp_path / "ctx", tmp_path / "r.html"
    built = ok(
        "context", "build", text, "--overlay", tiny_overlay, "--chunk", 64, "--keep", 0.4, "-o", ctx, "--json"
    ).json
    out.write_text("an older report")
    arguments = ("report", "\n    return", "--overlay", tiny_overlay, "--context", ctx, "-o", out, *QUICK)
    result = ok(*arguments, "--tpot-ms", 10000, "--json")
    kept = result.json["kept"]
    assert kept["tokens"] == built["tokens"] and sum(map(sum, kept["pairs"])) == built["pairs"]
    assert result.json["generation"]["context_tokens"] == built["tokens"]
    assert result.json["operating"]["target_bits"] == pytest.approx(6, abs=0.05), (
        "time enough for every plane"
    )
    assert "KV head" in out.read_text("utf-8")


def test_a_decision_per_matrix_and_no_native_step(ok, quantized, profiles, tmp_path, monkeypatch):
    monkeypatch.setattr(frontiers, "ROUNDS", 1)  # torch takes its time
    monkeypatch.setattr(query_spread, "NEW", 10)
    profiles["linear"].save(tmp_path / "linear.safetensors")
    arguments = (
        "--profile",
        tmp_path / "linear.safetensors",
        "--backend",
        "reference",
        "--policies",
        "random",
    )
    quick = ("--targets", "3.5", *QUICK[:-2])
    said = ok("report", "--overlay", quantized, *arguments, "-o", tmp_path / "r.html", *quick, "--json").json
    names = [g["name"] for g in said["generation"]["groups"]]
    assert names[:7] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert {p["policy"] for p in said["frontier"]["points"]} == {"random", "rate-distortion"}
    assert said["machine"]["backend"] == "reference"


def test_the_users_own_text(ok, tiny_overlay, calibration_documents, tmp_path):
    text, out = tmp_path / "mine & others.txt", tmp_path / "r.html"
    text.write_text(calibration_documents[0][:2000])
    said = ok("report", "--overlay", tiny_overlay, "--text", text, "-o", out, *QUICK, "--json").json
    assert said["frontier"]["text"] == "mine & others.txt" and "mine &amp; others.txt" in out.read_text(
        "utf-8"
    )
    assert calibration_documents[0].startswith(said["generation"]["prompt"]), "the opening is the prompt"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--target-bits", 9), "target 9 bits is impossible"),
        (("--target-bits", 3, "--tpot-ms", 5), "exclude each other"),
        (("--tpot-ms", 0), "is not a time"),
        (("--tpot-ms", "nan"), "is not a time"),
        (("--tpot-ms", 1e-6), "cannot be kept"),
        (("--policies", "static,nonsense"), "unknown policy 'nonsense'"),
        (("--policies", "uniform", "--targets", "2.5"), "whole bits"),
        (("--targets", "2.5,x"), "--targets .* is not a list of numbers"),
        (("--targets", "1.5"), "target 1.5 bits is impossible"),
        (("--max-new-tokens", 1), "decodes nothing"),
        (("--text", "nowhere.txt"), "does not exist"),
        (("--profile", "nowhere.safetensors"), "does not exist"),
        (("--context", "nowhere"), "nowhere"),
        (("--overlay", "nowhere"), "is not a directory"),
        (("--temperature", -1), "temperature"),
        (("-o", "page.txt"), "does not end in .html"),
        (("-o", "no/where.html"), "no is not a directory"),
        (("",), "prompt is empty"),
        (("# " * 600,), "Shorten it"),
    ],
)
def test_refused(refused, tiny_overlay, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    base = () if "--overlay" in arguments else ("--overlay", tiny_overlay)
    quick = () if "--targets" in arguments or "--max-new-tokens" in arguments else QUICK
    refused("report", *base, *quick, *arguments, says=says, alone=False)
    assert list(tmp_path.iterdir()) == []


def test_refused_models_texts_and_places(
    refused, quantized, tiny_checkpoint, tiny_overlay, profiles, tmp_path
):
    out = ("-o", tmp_path / "r.html")
    refused("report", "--overlay", tiny_checkpoint, *out, says="is not quantised")
    short = tmp_path / "short.txt"
    short.write_text("import os\n")
    refused("report", "--overlay", tiny_overlay, "--text", short, *out, says="too short", alone=False)
    folder = tmp_path / "folder.html"
    folder.mkdir()
    refused("report", "--overlay", tiny_overlay, "-o", folder, says="is a directory")
    assert not (tmp_path / "r.html").exists()


def test_a_context_needs_a_question(refused, ok, tiny_overlay, calibration_documents, tmp_path):
    text = tmp_path / "notes.py"
    text.write_text(calibration_documents[1][:300])
    ok("context", "build", text, "--overlay", tiny_overlay, "--chunk", 64, "-o", tmp_path / "ctx")
    refused("report", "--overlay", tiny_overlay, "--context", tmp_path / "ctx", "-o", tmp_path / "r.html",
            says="needs a question")  # fmt: skip


def test_a_disk_that_fills_up(tmp_path):
    """The old page stays, and no other file is left."""
    target = tmp_path / "r.html"
    write_text(target, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot be written.*Free space"):
            write_text(target, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["r.html"]
    write_text(target, "neu ä\n")
    assert target.read_bytes() == "neu ä\n".encode()
