"""`dpllm demo`: one stored model at three targets."""

from __future__ import annotations

from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dpllm import reference
from dpllm.commands.common import Hardware, print_json, stage_bars, stdout
from dpllm.commands.evaluate import token_documents
from dpllm.commands.generate import summarize
from dpllm.engine import GenerateOptions, load
from dpllm.evaluation.evaluate import evaluate

TARGETS = (2.5, 3.25, 4.0)
PROMPT = 'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self):\n        self.items = []\n'
HELDOUT_TOKENS = 12_000


def run(tokens: int, as_json: bool) -> None:
    """Generates the same prompt at each target and scores held-out text at it."""
    engine = load()
    Hardware().note_if_slow(engine.decoder.backend)
    documents = token_documents(engine, reference.heldout_text(), context=512, max_tokens=HELDOUT_TOKENS)
    total = sum(len(d) - 1 for d in documents)
    rows: list[dict[str, Any]] = []
    with stage_bars() as progress:
        for target in TARGETS:
            engine.set_policy("rate-distortion", target)
            made = summarize(engine, list(engine.generate(PROMPT, GenerateOptions(max_new_tokens=tokens))))
            done = 0

            def tick(n: int, label: str = f"{target} bits") -> None:
                nonlocal done
                done += n
                progress(label, done, total)

            assert engine.policy is not None
            scored = evaluate(engine.decoder, engine.policy, target, documents, tick)
            rows.append({"target_bits": target, "generated": made, "heldout": scored.as_json()})
    if as_json:
        print_json({"results": rows})
        return
    for row in rows:
        stdout.print(
            Panel(
                Text(PROMPT + row["generated"]["text"]),  # a plain str would lose its [brackets]
                title=f"target {row['target_bits']} bits",
                title_align="left",
            )
        )
    table = Table(
        "target bits",
        "bits while generating",
        "ms / token",
        "held-out bits",
        "held-out perplexity",
        "MB of weights / token",
    )
    for row in rows:
        g, h = row["generated"], row["heldout"]
        table.add_row(
            f"{row['target_bits']:g}", f"{g['effective_bits']:.3f}", f"{g['tpot_ms']['p50']:.2f}",
            f"{h['effective_bits']:.3f}", f"{h['perplexity']:.3f}", f"{h['weight_bytes_per_token'] / 1e6:.2f}",
        )  # fmt: skip
    stdout.print(table)
    stdout.print(
        f"One stored model (7.3 M parameters, planes 2..6, {engine.decoder.backend.name} backend; small enough for the "
        "processor's cache, so that its time hardly follows the bits: see dpllm bench for models that are not). "
        f"Perplexity: {total:,} tokens of files it was never trained on.\n"
        "The two commands that made the overlay and its profile:\n"
        f"  dpllm quantize {reference.model_path()} my-overlay\n  dpllm calibrate my-overlay"
    )
