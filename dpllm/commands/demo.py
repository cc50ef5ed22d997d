"""`dpllm demo`: one stored model at three targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dpllm.base.quantities import figure
from dpllm.base.shell import command_line
from dpllm.commands.app import COMMON, Command, Json, app
from dpllm.commands.common import Hardware, print_json, stage_bars, stdout, tell
from dpllm.commands.evaluate import token_documents
from dpllm.commands.generate import summarize

if TYPE_CHECKING:
    from dpllm.engine import Engine

TARGETS = (2.5, 3.25, 4.0)
PROMPT = 'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self):\n        self.items = []\n'
HELDOUT_TOKENS = 12_000

Tokens = Annotated[
    int,
    typer.Option("--tokens", help="Generate this number of tokens at each target.", rich_help_panel=COMMON),
]


@app.command(cls=Command)
def demo(*, tokens: Tokens = 40, json: Json = False) -> None:
    """Show the idea in half a minute: one stored model at 2.5, 3.25 and 4 bits."""
    from dpllm import reference
    from dpllm.opening import open_engine as load

    engine = load()
    Hardware().note_about(engine.decoder)
    documents = token_documents(engine, reference.heldout_text(), context=512, max_tokens=HELDOUT_TOKENS)
    rows = run_targets(engine, documents, tokens=tokens)
    if json:
        print_json({"results": rows})
        return
    for row in rows:
        made = Text(PROMPT + row["generated"]["text"])  # a plain str would lose its [brackets]
        stdout.print(Panel(made, title=f"target {row['target_bits']} bits", title_align="left"))
    stdout.print(_table(rows))
    tell(
        f"One stored model (7.3 M parameters, planes 2..6, {engine.decoder.backend.name} backend). It is small enough "
        "for the processor's cache, so its time hardly follows the bits; dpllm bench measures models that are not.\n"
        f"Perplexity: {sum(len(d) - 1 for d in documents):,} tokens of files it was never trained on.\n"
        "The two commands that made the overlay and its profile:\n"
        f"  {command_line('quantize', reference.model_path(), 'my-overlay')}\n"
        f"  {command_line('calibrate', 'my-overlay')}"
    )


def run_targets(engine: Engine, documents: list[list[int]], *, tokens: int) -> list[dict[str, Any]]:
    """Generates the same prompt at each target and scores the documents at it: one object per target."""
    from dpllm.evaluation.evaluate import evaluate

    total = sum(len(d) - 1 for d in documents)
    rows: list[dict[str, Any]] = []
    with stage_bars() as progress:
        for target in TARGETS:
            engine.set_policy("rate-distortion", target)
            made = summarize(engine, engine.generate(PROMPT, max_new_tokens=tokens))
            done = 0

            def tick(n: int, label: str = f"{target} bits") -> None:
                nonlocal done
                done += n
                progress(label, done, total)

            assert engine.policy is not None
            scored = evaluate(engine.decoder, engine.policy, target, documents, tick)
            rows.append({"target_bits": target, "generated": made, "heldout": scored.as_json()})
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "target bits", "bits while generating", "ms / token", "held-out bits", "held-out perplexity",
        "MB of weights / token",
    )  # fmt: skip
    for row in rows:
        g, h = row["generated"], row["heldout"]
        table.add_row(
            f"{row['target_bits']:g}", f"{g['effective_bits']:.3f}", f"{g['tpot_ms']['p50']:.2f}",
            f"{h['effective_bits']:.3f}", figure(h["perplexity"]), f"{h['weight_bytes_per_token'] / 1e6:.2f}",
        )  # fmt: skip
    return table
