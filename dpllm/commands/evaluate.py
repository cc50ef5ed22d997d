"""`dpllm eval`."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from dpllm import reference
from dpllm.base.errors import InputError
from dpllm.base.text import encode, read_documents
from dpllm.commands.common import (
    Hardware,
    note,
    parse_targets,
    print_json,
    stage_bars,
    stdout,
)
from dpllm.engine import Engine, load
from dpllm.evaluation.evaluate import EvalResult, evaluate
from dpllm.policies.make import POLICIES, make_policy


def token_documents(engine: Engine, path: Path, context: int, max_tokens: int = 0) -> list[list[int]]:
    """The first `context` tokens of each document, about max_tokens in all (0: everything)."""
    if context < 2:
        raise InputError(f"--context {context} is too short; at least 2 tokens are needed to score one.")
    limit = min(context, engine.decoder.config.max_positions)
    documents, total = [], 0
    for text in read_documents(path):
        ids = encode(engine.tokenizer, text)[:limit]
        if len(ids) > 1:
            documents.append(ids)
            total += len(ids)
        if max_tokens and total >= max_tokens:
            break
    if not documents:
        raise InputError(f"{path} is too short: no document has two tokens. Give a longer text.")
    return documents


def run(
    text_file: str | None, overlay: str | None, policy: str, target_bits: str, context: int, max_tokens: int,
    hardware: Hardware, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Scores every policy at every target and prints a table or JSON."""
    targets, names = parse_targets(target_bits), [p.strip() for p in policy.split(",")]
    for name in names:
        if name not in POLICIES:
            raise InputError(f"unknown policy '{name}'. Choose from: {', '.join(POLICIES)}.")
    path = reference.heldout_text() if text_file is None else Path(text_file).expanduser()
    engine = load(overlay, options=hardware.load_options())
    hardware.note_if_slow(engine.decoder.backend)
    if not engine.quantized:
        raise InputError(
            f"{overlay} is not quantised, so there are no targets to compare. Run dpllm quantize first."
        )
    documents = token_documents(engine, path, context, max_tokens)
    cells = [(n, t) for t in targets for n in names if n != "uniform" or t == int(t)]
    if skipped := len(targets) * len(names) - len(cells):
        note(f"uniform reads whole bits only: {skipped} fractional target(s) left out for it")
    if not cells:
        raise InputError(
            "policy 'uniform' reads whole bits only. Give a whole --target-bits, such as 3 or 4."
        )
    results = _score(engine, cells, documents, seed)
    if as_json:
        print_json({"results": [r.as_json() for r in results]})
    else:
        stdout.print(_table(results))


def _score(
    engine: Engine, cells: list[tuple[str, float]], documents: list[list[int]], seed: int
) -> list[EvalResult]:
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

            results.append(evaluate(engine.decoder, chosen, target, documents, tick))
    return results


def _table(results: list[EvalResult]) -> Table:
    table = Table("policy", "target bits", "effective bits", "perplexity", "MB of weights / token", "tokens")
    for r in results:
        megabytes = f"{r.weight_bytes_per_token / 1e6:.2f}"
        table.add_row(
            r.policy,
            f"{r.target_bits:g}",
            f"{r.effective_bits:.3f}",
            f"{r.perplexity:.3f}",
            megabytes,
            f"{r.tokens:,}",
        )
    return table
