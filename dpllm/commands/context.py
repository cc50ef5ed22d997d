"""`dpllm context`: reads a text once and keeps the part of its KV cache that matters."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dpllm.base.errors import InputError
from dpllm.base.locks import only_writer
from dpllm.base.places import check_readable
from dpllm.base.plain_text import without_byte_order_mark
from dpllm.base.shell import command_line
from dpllm.commands.app import (
    COMMON,
    EXPERT,
    TARGETS,
    Accuracy,
    Backend,
    Command,
    Device,
    FileCommand,
    Json,
    Overlay,
    Threads,
    contexts,
)
from dpllm.commands.common import (
    Hardware,
    note,
    note_doubled_start,
    print_json,
    stage_bars,
    stdout,
)
from dpllm.commands.streams import read_stdin

if TYPE_CHECKING:
    from dpllm.context.kv_context import KVContext
    from dpllm.engine import Engine
    from dpllm.kvzip_bridge.budget import Budget

# What `dpllm context policies` says of each name. Docstrings are not there under `python -OO`.
KV_POLICY_LINES = {
    "keep-all": "Keeps every pair and prunes nothing.",
    "random": "Keeps pairs drawn at random, as a baseline for the others.",
    "recent": "Keeps the first four tokens and the most recent ones (StreamingLLM, arXiv:2309.17453).",
    "knorm": "Keeps the pairs whose keys have the smallest L2 norm (arXiv:2406.11430).",
    "snapkv": "Keeps the pairs that the last tokens of the text attend to most (SnapKV, arXiv:2404.14469).",
    "pyramidkv": "Scores as snapkv does and gives lower layers more pairs (PyramidKV, arXiv:2406.02069).",
    "adakv": "Scores as snapkv does and lets the heads of a layer compete (AdaKV, arXiv:2407.11550).",
    "expected-attention": "Keeps the pairs that future queries, modelled as Gaussian, are expected to attend to "
    "(Expected Attention, arXiv:2510.00636).",
    "kvzip": "Keeps the pairs that the model attends to when it repeats the text (KVzip, arXiv:2505.23416).",
    "kvzip+": "Scores as kvzip does and weights attention by what it adds to the layer (KVzip+, arXiv:2601.07891).",
    "whole-heads": "Keeps or drops whole heads by a score calibrated once for the model (KVzip, arXiv:2505.23416). "
    "Needs dpllm calibrate --kv-heads.",
}
ALLOCATION_LINES = {
    "over-all": "Takes the best pairs of all layers and heads together.",
    "per-layer": "Gives every layer the same number of pairs; its heads compete for them.",
    "per-head": "Gives every head the same number of pairs.",
    "safeguard": "Gives every layer the same number and every head a fifth of an even share; the heads compete for "
    "the rest (AdaKV, arXiv:2407.11550).",
    "pyramid": "Gives lower layers more pairs than upper ones, and the heads of a layer the same number (PyramidKV, "
    "arXiv:2406.02069).",
}

TextFile = Annotated[str, typer.Argument(help="Text to read; '-' reads standard input.")]
Out = Annotated[
    str,
    typer.Option("--out", "-o", help="Make this directory. It must not exist.", rich_help_panel=COMMON),
]
OpensChat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Let the text open a chat; questions then follow in the model's chat template.",
        rich_help_panel=COMMON,
    ),
]
Keep = Annotated[
    float | None,
    typer.Option(
        "--keep",
        help="Keep this share of the cache, e.g. 0.3, which is the default.",
        rich_help_panel=TARGETS,
    ),
]
KeepTokens = Annotated[
    int | None,
    typer.Option(
        "--keep-tokens", help="Keep this number of tokens a head, on average.", rich_help_panel=TARGETS
    ),
]
KeepMemory = Annotated[
    str | None,
    typer.Option(
        "--keep-memory", help="Keep as much as fits into this size, e.g. 100MB.", rich_help_panel=TARGETS
    ),
]
KvPolicy = Annotated[
    str,
    typer.Option(
        "--kv-policy",
        help="Score the key-value pairs by this policy. 'dpllm context policies' lists all of them.",
        rich_help_panel=EXPERT,
    ),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        help="Spread the budget over layers and heads this way. 'dpllm context policies' lists all of them; the "
        "default is that of the policy's paper.",
        rich_help_panel=EXPERT,
    ),
]
Block = Annotated[
    int | None,
    typer.Option(
        "--block",
        help="Prune each time this number of tokens has been read, so that the whole cache never exists. The default "
        "is to prune once, at the end.",
        rich_help_panel=EXPERT,
    ),
]
Chunk = Annotated[
    int | None,
    typer.Option(
        "--chunk",
        help="Let KVzip repeat this number of tokens at a time. The default is 2048, or fewer where the model has no "
        "positions for them.",
        rich_help_panel=EXPERT,
    ),
]


@contexts.command("build", cls=FileCommand)
def build(
    *,
    text_file: TextFile,
    out: Out,
    overlay: Overlay = None,
    chat: OpensChat = False,
    json: Json = False,
    keep: Keep = None,
    keep_tokens: KeepTokens = None,
    keep_memory: KeepMemory = None,
    device: Device = "cpu",
    threads: Threads = None,
    backend: Backend = None,
    kv_policy: KvPolicy = "kvzip",
    allocation: Allocation = None,
    block: Block = None,
    chunk: Chunk = None,
    accuracy: Accuracy = "balanced",
) -> None:
    """Read a text once, keep the part of its KV cache that matters, and save it for any number of questions.

    Example: dpllm context build notes.txt --keep 0.3 -o notes; dpllm generate --context notes 'What about bees?'
    """
    from dpllm.context.options import ContextOptions
    from dpllm.context.saved import place_for
    from dpllm.opening import open_engine as load

    budget = budget_of(keep=keep, keep_tokens=keep_tokens, keep_memory=keep_memory)
    options = ContextOptions(
        budget=budget, policy=kv_policy, allocation=allocation, block=block, chunk=chunk, chat=chat
    )
    target = Path(out).expanduser()
    with only_writer(place_for(target)):
        text = read_text(text_file)
        hardware = Hardware(device=device, backend=backend, threads=threads, accuracy=accuracy)
        engine = load(overlay, options=hardware.load_options())
        hardware.note_about(engine.decoder)
        if not chat:
            note_doubled_start(engine, text)
        began = time.perf_counter()
        with stage_bars() as bars:
            context = engine.read(
                text, budget=options.budget, policy=options.policy, allocation=options.allocation,
                block=options.block, chunk=options.chunk, chat=options.chat, progress=bars,
            )  # fmt: skip
        seconds = time.perf_counter() - began
        context.save(target)
    summary = summarize(engine, context, target) | {"seconds": round(seconds, 2)}
    if json:
        print_json(summary)
        return
    note(
        f"{target}: {summary['tokens']} tokens, {summary['kept_ratio']:.1%} of their pairs kept by {kv_policy}: "
        f"{summary['nbytes'] / 1e6:.2f} MB of {summary['full_nbytes'] / 1e6:.2f} MB, in {seconds:.1f} s"
    )
    model = [] if overlay is None else ["--overlay", overlay]
    ask = command_line("generate", *model, *hardware.words(), "--context", target, "your question")
    note(f"ask it: {ask}")


def budget_of(*, keep: float | None, keep_tokens: int | None, keep_memory: str | None) -> Budget:
    """The budget in one of its three forms. Raises InputError for more than one."""
    from dpllm.base.quantities import parse_size
    from dpllm.context.options import DEFAULT_KEEP
    from dpllm.kvzip_bridge.budget import Budget

    given = [v for v in (keep, keep_tokens, keep_memory) if v is not None]
    if len(given) > 1:
        raise InputError("--keep, --keep-tokens and --keep-memory exclude each other: give one of them.")
    if not given:
        return Budget(keep_ratio=DEFAULT_KEEP)
    size = None if keep_memory is None else parse_size(keep_memory)
    return Budget(keep_ratio=keep, tokens=keep_tokens, nbytes=size)


def read_text(name: str) -> str:
    """The text of a file, or standard input for '-'. Raises InputError where there is no text."""
    if name == "-":
        return read_stdin()
    path = Path(name).expanduser()
    if path.is_dir() or not path.exists():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}. Give a text file, or '-' to read standard input.")
    check_readable(path)
    try:
        return without_byte_order_mark(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text ({e}).") from None


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


@contexts.command("policies", cls=Command)
def policies(*, json: Json = False) -> None:
    """List the policies that score the pairs of a cache, and the ways to spread a budget."""
    if json:
        print_json({"policies": KV_POLICY_LINES, "allocations": ALLOCATION_LINES})
        return
    for option, title, lines in (
        ("--kv-policy", "what it keeps", KV_POLICY_LINES),
        ("--allocation", "how it spreads a budget", ALLOCATION_LINES),
    ):
        table = Table(option, title)
        for name, line in lines.items():
            table.add_row(name, line)
        stdout.print(table)
