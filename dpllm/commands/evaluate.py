"""`dpllm eval`: perplexity and effective bits of policies at targets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dpllm.base.errors import InputError
from dpllm.base.quantities import figure
from dpllm.commands.app import (
    COMMON,
    EXPERT,
    TARGETS,
    Accuracy,
    Backend,
    Command,
    Device,
    Json,
    Overlay,
    Seed,
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
    stdout,
)

if TYPE_CHECKING:
    from dpllm.engine import Engine
    from dpllm.evaluation.evaluate import EvalResult

TextFile = Annotated[
    str | None, typer.Argument(help="Text to score. The default is the bundled held-out files.")
]
EachContext = Annotated[
    int,
    typer.Option("--context", help="Score this number of tokens of each document.", rich_help_panel=COMMON),
]
MaxTokens = Annotated[
    int,
    typer.Option(
        "--max-tokens",
        min=0,
        help="Stop after about this number of tokens. 0 scores all.",
        rich_help_panel=COMMON,
    ),
]
Targets = Annotated[
    str,
    typer.Option(
        "--target-bits",
        help="Score at these mean bits per weight, separated by commas.",
        rich_help_panel=TARGETS,
    ),
]
Policies = Annotated[
    str,
    typer.Option(
        "--policy",
        help="Score these policies, separated by commas: rate-distortion, dp-llm, static, uniform, random, "
        "oracle-rate-distortion, oracle-dp-llm.",
        rich_help_panel=EXPERT,
    ),
]


@app.command("eval", cls=Command)
def evaluate(
    *,
    text_file: TextFile = None,
    overlay: Overlay = None,
    context: EachContext = 1024,
    max_tokens: MaxTokens = 0,
    json: Json = False,
    target_bits: Targets = "2.5,3.25,4",
    device: Device = "cpu",
    threads: Threads = None,
    backend: Backend = None,
    policy: Policies = "rate-distortion",
    seed: Seed = 0,
    accuracy: Accuracy = "balanced",
) -> None:
    """Measure perplexity and effective bits of policies at targets, by decoding a text.

    The seed is that of policy 'random'.
    """
    from dpllm import reference
    from dpllm.opening import open_engine as load

    targets, names = parse_numbers(target_bits, "--target-bits"), parse_policies(policy)
    path = reference.heldout_text() if text_file is None else Path(text_file).expanduser()
    hardware = Hardware(device=device, backend=backend, threads=threads, accuracy=accuracy)
    engine = load(overlay, options=hardware.load_options())
    hardware.note_about(engine.decoder)
    if not engine.quantized:
        raise InputError(
            f"{overlay} is not quantised, so there are no targets to compare. Run dpllm quantize first."
        )
    documents = token_documents(engine, path, context, max_tokens)
    results = score(engine, cells_of(names, targets), documents, seed=seed)
    if json:
        print_json({"results": [r.as_json() for r in results]})
    else:
        stdout.print(_table(results))


def token_documents(engine: Engine, path: Path, context: int, max_tokens: int = 0) -> list[list[int]]:
    """The first `context` tokens of each document, about `max_tokens` in all (0: everything).

    Raises InputError for a text without two tokens, or with tokens that the model does not know.
    """
    from dpllm.base.text import check_tokens, encode, read_documents

    if context < 2:
        raise InputError(f"--context {context} is too short; at least 2 tokens are needed to score one.")
    limit = min(context, engine.decoder.config.max_positions)
    documents, total = [], 0
    for text in read_documents(path):
        ids = encode(engine.tokenizer, text)[:limit]
        check_tokens(ids, engine.decoder.config.vocab_size, engine.path)
        if len(ids) > 1:
            documents.append(ids)
            total += len(ids)
        if max_tokens and total >= max_tokens:
            break
    if not documents:
        raise InputError(f"{path} is too short: no document has two tokens. Give a longer text.")
    return documents


def cells_of(names: list[str], targets: list[float]) -> list[tuple[str, float]]:
    """Every policy at every target that it can meet. Raises InputError where that leaves nothing."""
    cells = [(n, t) for t in targets for n in names if n != "uniform" or t == int(t)]
    if skipped := len(targets) * len(names) - len(cells):
        note(f"policy uniform reads whole bits only: fractional targets left out for it: {skipped}")
    if not cells:
        raise InputError(
            "policy 'uniform' reads whole bits only. Give a whole --target-bits, such as 3 or 4."
        )
    return cells


def score(
    engine: Engine, cells: list[tuple[str, float]], documents: list[list[int]], *, seed: int
) -> list[EvalResult]:
    """Scores the documents with each policy at its target."""
    from dpllm.evaluation.evaluate import evaluate as score_policy
    from dpllm.policies.make import make_policy

    total = sum(len(d) - 1 for d in documents)
    # All before the first is scored: an impossible target should not cost the minutes of the others.
    policies = [make_policy(name, target, engine.decoder, engine.profile, seed) for name, target in cells]
    results = []
    with stage_bars() as progress:
        for chosen, (name, target) in zip(policies, cells, strict=True):
            done = 0

            def tick(tokens: int, label: str = f"{name} {target:g}") -> None:
                nonlocal done
                done += tokens
                progress(label, done, total)

            results.append(score_policy(engine.decoder, chosen, target, documents, tick))
    return results


def _table(results: list[EvalResult]) -> Table:
    table = Table("policy", "target bits", "effective bits", "perplexity", "MB of weights / token", "tokens")
    for r in results:
        table.add_row(
            r.policy, f"{r.target_bits:g}", f"{r.effective_bits:.3f}", figure(r.perplexity),
            f"{r.weight_bytes_per_token / 1e6:.2f}", f"{r.tokens:,}",
        )  # fmt: skip
    return table
