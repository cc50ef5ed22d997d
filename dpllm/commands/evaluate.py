"""`dpllm eval`: perplexity and effective bits of policies at targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dpllm.base.errors import InputError
from dpllm.base.quantities import figure
from dpllm.base.shell import command_line
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
            f"{engine.path} is not quantised, so there are no targets to compare. "
            f"Run: {command_line('quantize', engine.path, 'OUT')}"
        )
    text = scored_text(engine, path, context, max_tokens)
    results = score(engine, cells_of(names, targets), text.documents, seed=seed)
    if (line := text.left_out(max_tokens)) is not None:
        note(line)
    if json:
        print_json({"text": text.as_json(), "results": [r.as_json() for r in results]})
    else:
        stdout.print(_table(results))


@dataclass(frozen=True)
class ScoredText:
    """The tokens that are scored, and the text that they are a part of.

    documents: token ids, from two on each. tokens_given: tokens of the documents that were begun, whole.
    documents_given: all documents of the text. limit: the most tokens of a document. limit_is: the name of that limit.
    """

    documents: list[list[int]]
    tokens_given: int
    documents_given: int
    limit: int
    limit_is: str

    @property
    def tokens(self) -> int:
        """Tokens that the model reads; the first one of each document is not predicted."""
        return sum(map(len, self.documents))

    def as_json(self) -> dict[str, int]:
        """The object `text` of `dpllm eval --json`."""
        return {
            "tokens": self.tokens, "tokens_given": self.tokens_given, "documents": len(self.documents),
            "documents_given": self.documents_given,
        }  # fmt: skip

    def left_out(self, max_tokens: int) -> str | None:
        """A line about how much of the text is scored and about the limits at work; None where all of it is."""
        parts = []
        if self.tokens < self.tokens_given:
            parts.append(
                f"{self.tokens:,} of {self.tokens_given:,} tokens, because {self.limit_is} is {self.limit} a document"
            )
        if missing := self.documents_given - len(self.documents):
            why = (
                f"--max-tokens {max_tokens}"
                if max_tokens
                else "documents of one token, which predict nothing"
            )
            parts.append(
                f"{len(self.documents):,} of {self.documents_given:,} documents ({missing:,} left out: {why})"
            )
        return f"only a part of the text is scored: {'; '.join(parts)}." if parts else None


def token_documents(engine: Engine, path: Path, context: int, max_tokens: int = 0) -> list[list[int]]:
    """The documents of `scored_text`."""
    return scored_text(engine, path, context, max_tokens).documents


def scored_text(engine: Engine, path: Path, context: int, max_tokens: int = 0) -> ScoredText:
    """The first `context` tokens of each document, about `max_tokens` in all (0: everything).

    Raises InputError for a text without two tokens, or with tokens that the model does not know.
    """
    from dpllm.base.text import check_tokens, encode, read_documents

    if context < 2:
        raise InputError(f"--context {context} is too short; at least 2 tokens are needed to score one.")
    positions = engine.decoder.config.max_positions
    limit, limit_is = min((context, "--context"), (positions, "the number of the model's positions"))
    texts, documents, given, total = read_documents(path), [], 0, 0
    for text in texts:
        ids = encode(engine.tokenizer, text)
        if len(ids) > 1:
            check_tokens(ids[:limit], engine.decoder.config.vocab_size, engine.path)
            documents.append(ids[:limit])
            given += len(ids)
            total += len(documents[-1])
        if max_tokens and total >= max_tokens:
            break
    if not documents:
        raise InputError(f"{path} is too short: no document has two tokens. Give a longer text.")
    return ScoredText(documents, given, len(texts), limit, limit_is)


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
