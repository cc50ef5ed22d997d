"""`dpllm report`: one HTML page of what a generation read, when, and what it cost."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpllm.base.errors import InputError
from dpllm.base.places import file_to_write
from dpllm.base.shell import command_line
from dpllm.commands.app import (
    COMMON,
    EXPERT,
    TARGETS,
    Accuracy,
    Backend,
    Chat,
    Context,
    Device,
    FileCommand,
    Json,
    MaxNewTokens,
    Overlay,
    Seed,
    TargetBits,
    Temperature,
    Threads,
    app,
)
from dpllm.commands.common import (
    Hardware,
    note,
    parse_numbers,
    parse_policies,
    print_json,
    stage_bars,
)
from dpllm.commands.demo import PROMPT
from dpllm.commands.evaluate import token_documents
from dpllm.commands.generate import read_prompt

if TYPE_CHECKING:
    from dpllm.engine import Engine
    from dpllm.report.data import Report

OPENING = 24  # tokens of the text that are the prompt where none is given

Prompt = Annotated[
    str | None,
    typer.Argument(
        help="Text to continue; '-' reads standard input. The default is a few lines of Python.",
    ),
]
Out = Annotated[
    str,
    typer.Option(
        "--out", "-o", help="Write the page to this .html file, which may exist.", rich_help_panel=COMMON
    ),
]
ScoredText = Annotated[
    str | None,
    typer.Option(
        "--text",
        help="Score this text and take queries from it. The default is the bundled held-out files.",
        rich_help_panel=COMMON,
    ),
]
TpotMs = Annotated[
    float | None,
    typer.Option(
        "--tpot-ms",
        help="Read the most bits whose measured steps stay within this time in milliseconds, instead of --target-bits.",
        rich_help_panel=TARGETS,
    ),
]
CurveTargets = Annotated[
    str | None,
    typer.Option(
        "--targets",
        help="Draw the curves through these targets. The default is five above the lowest width.",
        rich_help_panel=TARGETS,
    ),
]
Policies = Annotated[
    str | None,
    typer.Option(
        "--policies",
        help="Draw the curves of these policies next to ours. The default is static, and dp-llm where it was "
        "calibrated.",
        rich_help_panel=EXPERT,
    ),
]
ScoreTokens = Annotated[
    int,
    typer.Option(
        "--score-tokens", min=2, help="Score this number of tokens for each point.", rich_help_panel=EXPERT
    ),
]
Queries = Annotated[
    int,
    typer.Option(
        "--queries",
        min=2,
        help="Measure the service levels of this number of queries.",
        rich_help_panel=EXPERT,
    ),
]
Profile = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="Choose bits by this calibration profile. The default is the overlay's own.",
        rich_help_panel=EXPERT,
    ),
]


@app.command(cls=FileCommand)
def report(
    *,
    prompt: Prompt = None,
    overlay: Overlay = None,
    out: Out = "report.html",
    text: ScoredText = None,
    context: Context = None,
    max_new_tokens: MaxNewTokens = 128,
    chat: Chat = False,
    json: Json = False,
    target_bits: TargetBits = None,
    tpot_ms: TpotMs = None,
    targets: CurveTargets = None,
    device: Device = "cpu",
    threads: Threads = None,
    backend: Backend = None,
    policies: Policies = None,
    score_tokens: ScoreTokens = 2000,
    queries: Queries = 32,
    profile: Profile = None,
    temperature: Temperature = 0.8,
    seed: Seed = 0,
    accuracy: Accuracy = "balanced",
) -> None:
    """Write one HTML page of what a generation read, when, and what it cost, all measured now on this machine.

    It shows the planes that every group read for every token, bits and time over the tokens, perplexity against time
    and bytes (ours, static, DP-LLM), the pairs that a pruned context keeps, bytes by kind, and how bits and latency
    spread over queries. The file needs no network; open it in any browser.

    Example: dpllm report 'def fibonacci(n):' --target-bits 3.25 -o report.html

    DP-LLM's curve needs its own calibration: dpllm calibrate OVERLAY --dp-llm --targets 2.5,3,3.5,4
    """
    from dpllm import reference
    from dpllm.context.kv_context import KVContext
    from dpllm.decode.options import GenerateOptions
    from dpllm.report.measure import ReportInputs, ReportOptions, measure_report

    options = ReportOptions(
        target_bits=target_bits, tpot_ms=tpot_ms,
        policies=None if policies is None else tuple(parse_policies(policies)),
        targets=None if targets is None else tuple(parse_numbers(targets, "--targets")),
        scored_tokens=score_tokens, queries=queries,
    )  # fmt: skip
    sampling = GenerateOptions(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, chat=chat)
    target, began = check_out(out), time.perf_counter()
    given = None if prompt is None else read_prompt(prompt)
    hardware = Hardware(device=device, backend=backend, threads=threads, accuracy=accuracy)
    engine = open_engine(overlay, hardware, profile=profile)
    about = None if context is None else KVContext.load(context, engine)
    hardware.note_about(engine.decoder)
    scored = reference.heldout_text() if text is None else Path(text).expanduser()
    documents = token_documents(engine, scored, engine.decoder.config.max_positions)
    if given is None:
        given = default_prompt(engine, documents, own_text=text is not None, context=context)
    with stage_bars() as progress:
        name = "the bundled held-out files" if text is None else scored.name
        inputs = ReportInputs(
            prompt=given, documents=documents, text=name, generate=sampling, context=about,
            model="reference model" if overlay is None else engine.path.resolve().name,
            command=command_line(*sys.argv[1:]), began=began,
        )  # fmt: skip
        page = measure_report(engine, inputs, options, progress)
    write(page, target, json=json)


def check_out(out: str) -> Path:
    """The page's file. Raises InputError where it cannot be written, before minutes are spent on measuring."""
    path = Path(out).expanduser()
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {out} does not end in .html. A report is a web page; name it like one.")
    file_to_write(path)
    return path


def open_engine(overlay: str | None, hardware: Hardware, *, profile: str | None) -> Engine:
    """The model with its calibration profile. Raises InputError for a model that has none."""
    from dpllm.opening import open_engine as load

    engine = load(overlay, profile=profile, options=hardware.load_options())
    if not engine.quantized:
        raise InputError(
            f"{engine.path} is not quantised, so there is nothing to choose. "
            f"Run: {command_line('quantize', engine.path, 'OUT')}"
        )
    if engine.profile is None:
        raise InputError(
            f"{engine.path} has no calibration profile to choose by. "
            f"Run: {command_line('calibrate', engine.path)}"
        )
    return engine


def default_prompt(engine: Engine, documents: list[list[int]], *, own_text: bool, context: str | None) -> str:
    """The text that is continued where no prompt was given. Raises InputError for a context without a question."""
    if context is not None:
        raise InputError(
            "--context needs a question about it. Write dpllm report 'your question' --context DIR."
        )
    if not own_text:
        return PROMPT
    return str(engine.tokenizer.decode(documents[0][:OPENING], skip_special_tokens=True))


def write(page: Report, target: Path, *, json: bool) -> None:
    """Writes the page and says where it is, or prints the report as JSON."""
    from dpllm.base.files import write_text
    from dpllm.report.page import render

    write_text(target, render(page))
    for missing in page.frontier.notes:
        note(missing)
    if json:
        print_json(page.as_json() | {"path": str(target)})
        return
    g = page.generation
    note(
        f"{target}: {len(g.tokens) + 1} tokens at {g.effective_bits:.3f} bits, {g.tpot_ms.p50:.2f} ms/token; "
        f"{target.stat().st_size / 1e3:.0f} kB, in {page.seconds:.0f} s. Open it in a browser."
    )
