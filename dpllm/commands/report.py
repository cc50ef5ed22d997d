"""`dpllm report`."""

from __future__ import annotations

import os
import shlex
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dpllm import reference
from dpllm.base.errors import InputError
from dpllm.base.files import write_text
from dpllm.commands.common import Hardware, note, print_json, stage_bars
from dpllm.commands.demo import PROMPT
from dpllm.commands.evaluate import token_documents
from dpllm.commands.generate import read_prompt
from dpllm.context.saved import load_context
from dpllm.engine import Engine, GenerateOptions, load
from dpllm.planning.machine import machine_of
from dpllm.policies.make import POLICIES
from dpllm.report.data import Report
from dpllm.report.measure import ReportOptions, measure
from dpllm.report.page import render

OPENING = 24  # tokens of the text that are the prompt where none is given


@dataclass(frozen=True)
class ReportArguments:
    """The command's arguments but what is asked of the policy."""

    prompt: str | None
    out: str
    overlay: str | None
    profile: str | None
    text: str | None
    context: str | None
    hardware: Hardware
    json: bool


def policies_of(names: str | None) -> tuple[str, ...] | None:
    """'static,dp-llm' -> names, all known."""
    if names is None:
        return None
    found = tuple(n.strip() for n in names.split(","))
    for name in found:
        if name not in POLICIES:
            raise InputError(f"unknown policy '{name}'. Choose from: {', '.join(POLICIES)}.")
    return found


def check_out(out: str) -> Path:
    """Where the page goes, if it can: refused before minutes are spent on measuring."""
    path = Path(out).expanduser()
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {out} does not end in .html. A report is a web page; name it like one.")
    if path.is_dir():
        raise InputError(f"{path} is a directory. Give the name of a file.")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no directory. Make it first, or choose another place.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent} cannot be written to. Choose another place.")
    return path


def run(args: ReportArguments, options: ReportOptions, generate: GenerateOptions) -> None:
    """Measures, draws, writes the page; prints where it is, or JSON."""
    out, began = check_out(args.out), time.perf_counter()
    given = None if args.prompt is None else read_prompt(args.prompt)
    text = reference.heldout_text() if args.text is None else Path(args.text).expanduser()
    engine = load(args.overlay, profile=args.profile, options=args.hardware.load_options())
    if not engine.quantized:
        raise InputError(
            f"{args.overlay} is not quantised, so there is nothing to choose. Run dpllm quantize first."
        )
    if engine.profile is None:
        raise InputError(
            f"{engine.path} has no calibration profile to choose by. Run: dpllm calibrate {engine.path}"
        )
    context = (
        None
        if args.context is None
        else load_context(Path(args.context).expanduser(), decoder=engine.decoder, model=engine.path)
    )
    args.hardware.note_if_slow(engine.decoder.backend)
    documents = token_documents(engine, text, engine.decoder.config.max_positions)
    prompt = given if given is not None else default_prompt(engine, args, documents)
    with stage_bars() as progress:
        name = "the bundled held-out files" if args.text is None else text.name
        found = measure(engine, prompt, documents, name, options, generate, context, progress)
    report = Report(
        model="reference model" if args.overlay is None else engine.path.resolve().name,
        command=shlex.join(["dpllm", *sys.argv[1:]]),
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        seconds=round(time.perf_counter() - began, 1),
        machine=machine_of(engine.decoder),
        **found.__dict__,
    )
    write_text(out, render(report))
    for missing in report.frontier.notes:
        note(missing)
    if args.json:
        print_json(report.as_json() | {"path": str(out)})
        return
    g = report.generation
    note(
        f"{out}: {len(g.tokens) + 1} tokens at {g.effective_bits:.3f} bits, {g.tpot_ms.p50:.2f} ms/token; "
        f"{out.stat().st_size / 1e3:.0f} kB, in {report.seconds:.0f} s. Open it in a browser."
    )


def default_prompt(engine: Engine, args: ReportArguments, documents: list[list[int]]) -> str:
    """What is continued where nothing was given."""
    if args.context is not None:
        raise InputError(
            "--context needs a question about it. Write dpllm report 'your question' --context DIR."
        )
    if args.text is None:
        return PROMPT
    return str(engine.tokenizer.decode(documents[0][:OPENING], skip_special_tokens=True))
