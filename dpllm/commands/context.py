"""`dpllm context`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dpllm.base.errors import InputError
from dpllm.commands.common import (
    Hardware,
    note,
    parse_size,
    print_json,
    stage_bars,
    stdout,
)
from dpllm.context.build import build_context
from dpllm.context.kv_context import KVContext
from dpllm.context.options import DEFAULT_KEEP, ContextOptions
from dpllm.context.saved import check_free, save_context
from dpllm.engine import Engine, load
from dpllm.kvzip_bridge.budget import ALLOCATIONS, Budget
from dpllm.kvzip_bridge.policies import KV_POLICIES


@dataclass(frozen=True)
class BuildArguments:
    """The arguments of `dpllm context build`."""

    text_file: str
    out: str
    keep: float | None
    keep_tokens: int | None
    keep_memory: str | None
    policy: str
    allocation: str | None
    block: int | None
    chunk: int | None
    chat: bool
    overlay: str | None
    hardware: Hardware
    json: bool


def run(args: BuildArguments) -> None:
    """Reads, prunes, saves; a summary for people or for machines."""
    options = ContextOptions(budget_of(args), args.policy, args.allocation, args.block, args.chunk, args.chat)
    out = Path(args.out).expanduser()
    check_free(out)
    text = read_text(args.text_file)
    engine = load(args.overlay, options=args.hardware.load_options())
    args.hardware.note_if_slow(engine.decoder.backend)
    began = time.perf_counter()
    with stage_bars() as bars:
        context = build_context(
            text, options, bars, decoder=engine.decoder, prompts=engine.prompts, profile=engine.profile
        )
    seconds = time.perf_counter() - began
    save_context(context, out, model=engine.path)
    summary = summarize(engine, context, out) | {"seconds": round(seconds, 2)}
    if args.json:
        print_json(summary)
        return
    note(
        f"{out}: {summary['tokens']} tokens, {summary['kept_ratio']:.1%} of their pairs kept by {args.policy}: "
        f"{summary['nbytes'] / 1e6:.2f} MB of {summary['full_nbytes'] / 1e6:.2f} MB, in {seconds:.1f} s"
    )
    note(f'ask it: dpllm generate --context {out} "your question"')


def budget_of(args: BuildArguments) -> Budget:
    """The budget in one of its three forms."""
    given = [v for v in (args.keep, args.keep_tokens, args.keep_memory) if v is not None]
    if len(given) > 1:
        raise InputError("--keep, --keep-tokens and --keep-memory exclude each other: give one of them.")
    if not given:
        return Budget(keep_ratio=DEFAULT_KEEP)
    size = None if args.keep_memory is None else parse_size(args.keep_memory)
    return Budget(keep_ratio=args.keep, tokens=args.keep_tokens, nbytes=size)


def read_text(name: str) -> str:
    """The text of a file, or standard input for '-'."""
    path = Path(name).expanduser()
    if name != "-" and not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}. Give a text file, or '-' to read standard input.")
    try:
        return sys.stdin.read() if name == "-" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{'standard input' if name == '-' else path} is not UTF-8 text ({e}).") from None


def summarize(engine: Engine, context: KVContext, out: Path) -> dict[str, Any]:
    """The object of `dpllm context build --json`."""
    lengths = context.cache.lengths
    pair = context.cache.nbytes // max(1, int(lengths.sum()))
    return {
        "path": str(out), "tokens": context.cache.length, "policy": context.facts["policy"],
        "kept_ratio": round(context.kept_ratio, 4), "pairs": int(lengths.sum()), "nbytes": context.cache.nbytes,
        "full_nbytes": pair * lengths.numel() * context.cache.length, "protected": context.protected,
        "fewest_pairs_of_a_head": int(lengths.min()), "most_pairs_of_a_head": int(lengths.max()),
        "backend": engine.decoder.backend.name,
    }  # fmt: skip


def show_policies(as_json: bool) -> None:
    """Names with the first line of what each is."""
    policies = {name: first_line(policy) for name, policy in KV_POLICIES.items()}
    allocations = {name: first_line(allocation) for name, allocation in ALLOCATIONS.items()}
    if as_json:
        print_json({"policies": policies, "allocations": allocations})
        return
    table = Table("--kv-policy", "what it keeps")
    for name, text in policies.items():
        table.add_row(name, text)
    stdout.print(table)
    table = Table("--allocation", "how it spreads a budget")
    for name, text in allocations.items():
        table.add_row(name, text)
    stdout.print(table)


def first_line(thing: Any) -> str:
    """The first line of a docstring."""
    return (thing.__doc__ or "").strip().splitlines()[0]
