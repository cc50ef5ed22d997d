"""Commands that read and write text."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from dpllm.cli.app import (
    MAX_SEED,
    Accuracy,
    Backend,
    Device,
    Json,
    MaxQualityLoss,
    Overlay,
    Threads,
    TpotMs,
    app,
    contexts,
)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; '-' reads standard input.")] = None,
    overlay: Overlay = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Mean bits per weight to read, e.g. 3.25.")
    ] = None,
    tpot_ms: TpotMs = None,
    max_quality_loss: MaxQualityLoss = None,
    guarantee: Annotated[
        bool,
        typer.Option("--guarantee", help="No text reads more than --target-bits: a bound, not an average."),
    ] = False,
    bits: Annotated[Optional[int], typer.Option(help="Read exactly this width everywhere.")] = None,  # noqa: UP045
    policy: Annotated[Optional[str], typer.Option(help="uniform, static, random or rate-distortion.")] = None,  # noqa: UP045
    resident_bits: Annotated[Optional[int], typer.Option(help="Planes to read from disk and hold.")] = None,  # noqa: UP045
    max_memory: Annotated[Optional[str], typer.Option(help="Hold as many planes as fit, e.g. 4GB.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens of this total probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="Makes sampling repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends generation; may be repeated.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")
    ] = False,
    context: Annotated[
        str | None, typer.Option("--context", help="What the prompt is about: made by dpllm context build.")
    ] = None,
    speculate: Annotated[
        str,
        typer.Option(
            help="Draft tokens and check several a pass: 'self' drafts with the overlay at --draft-bits, 'lookup' from "
            "the text so far, 'auto' does both from 6 bits on where it is faster, 'off' neither."
        ),
    ] = "auto",
    draft_bits: Annotated[Optional[int], typer.Option(help="Width of drafts; default: 3.")] = None,  # noqa: UP045
    device: Device = "cpu",
    threads: Threads = None,
    backend: Backend = None,
    accuracy: Accuracy = "balanced",
    json: Json = False,
) -> None:
    """Continue a text at a chosen precision, streaming.

    Example: dpllm generate 'def fibonacci(n):' --target-bits 3.25, or --tpot-ms 25: as many bits as the time allows.
    """
    from dpllm.commands.common import Hardware
    from dpllm.commands.generate import GenerateArguments, run
    from dpllm.engine import GenerateOptions

    options = GenerateOptions(
        max_new_tokens, temperature, top_p, seed, tuple(stop or ()), chat, speculate, draft_bits
    )
    run(
        GenerateArguments(
            prompt, overlay, target_bits, bits, policy, resident_bits, max_memory,
            Hardware(device, backend, threads, accuracy), json, context, tpot_ms, max_quality_loss, guarantee,
        ),
        options,
    )  # fmt: skip


@app.command("eval")
def evaluate(
    text_file: Annotated[
        str | None, typer.Argument(help="Text to score; default: the bundled held-out files.")
    ] = None,
    overlay: Overlay = None,
    policy: Annotated[str, typer.Option(help="Policies, separated by commas.")] = "rate-distortion",
    target_bits: Annotated[str, typer.Option(help="Targets, separated by commas.")] = "2.5,3.25,4",
    context: Annotated[int, typer.Option(help="Tokens of each document to score, from its start.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=0, help="Stop after about this many tokens; 0 = all.")] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    backend: Backend = None,
    accuracy: Accuracy = "balanced",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the 'random' policy.")] = 0,
    json: Json = False,
) -> None:
    """Perplexity and effective bits of policies at targets, through the decode path."""
    from dpllm.commands.common import Hardware
    from dpllm.commands.evaluate import run

    hardware = Hardware(device, backend, threads, accuracy)
    run(text_file, overlay, policy, target_bits, context, max_tokens, hardware, seed, json)


@contexts.command("build")
def build_context(
    text_file: Annotated[str, typer.Argument(help="Text to read; '-' reads standard input.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Directory to make; must not exist.")],
    keep: Annotated[Optional[float], typer.Option(help="Share of the cache to keep, e.g. 0.3.")] = None,  # noqa: UP045
    keep_tokens: Annotated[int | None, typer.Option(help="Keep so many tokens a head, on average.")] = None,
    keep_memory: Annotated[Optional[str], typer.Option(help="Keep as much as fits, e.g. 100MB.")] = None,  # noqa: UP045
    policy: Annotated[
        str, typer.Option("--kv-policy", help="What scores the pairs; see 'dpllm context policies'.")
    ] = "kvzip",
    allocation: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="How the budget is spread over layers and heads; default: as the policy's paper does."
        ),
    ] = None,
    block: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Prune after every so many tokens: the whole cache never exists. Default: once, at the end."
        ),
    ] = None,
    chunk: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Tokens KVzip has repeated at a time; default: 2048, or what the model's positions leave."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The text opens a chat; questions follow in the model's template.")
    ] = False,
    overlay: Overlay = None,
    device: Device = "cpu",
    threads: Threads = None,
    backend: Backend = None,
    accuracy: Accuracy = "balanced",
    json: Json = False,
) -> None:
    """Read a text once, keep the part of its KV cache that matters, and save it for any number of questions.

    Example: dpllm context build notes.txt --keep 0.3 -o notes; dpllm generate --context notes 'What about bees?'
    """
    from dpllm.commands.common import Hardware
    from dpllm.commands.context import BuildArguments, run

    run(
        BuildArguments(
            text_file, out, keep, keep_tokens, keep_memory, policy, allocation, block, chunk, chat, overlay,
            Hardware(device, backend, threads, accuracy), json,
        )
    )  # fmt: skip


@contexts.command("policies")
def kv_policies(json: Json = False) -> None:
    """What can score the pairs of a cache, and how a budget can be spread."""
    from dpllm.commands.context import show_policies

    show_policies(json)


@app.command()
def report(
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text to continue; '-' reads standard input. Default: a few lines of Python."),
    ] = None,
    out: Annotated[
        str, typer.Option("--out", "-o", help="Page to write, .html; replaced if there.")
    ] = "report.html",
    overlay: Overlay = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Mean bits per weight to read, e.g. 3.25.")
    ] = None,
    tpot_ms: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Or milliseconds a token: the most bits whose measured steps stay within."),
    ] = None,
    text: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Text to score and to take queries from; default: the bundled held-out files."),
    ] = None,
    context: Annotated[
        str | None, typer.Option("--context", help="What the prompt is about: made by dpllm context build.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    policies: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Curves beside ours, e.g. static,dp-llm (the default, where calibrated)."),
    ] = None,
    targets: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Targets of the curves; default: five above the lowest width."),
    ] = None,
    score_tokens: Annotated[int, typer.Option(min=2, help="Tokens of text to score for each point.")] = 2000,
    queries: Annotated[int, typer.Option(min=2, help="Queries whose service levels are measured.")] = 32,
    profile: Annotated[
        str | None,
        typer.Option("--profile", help="Calibration profile; default: the one beside the overlay."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the sampling.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")
    ] = False,
    device: Device = "cpu",
    threads: Threads = None,
    backend: Backend = None,
    accuracy: Accuracy = "balanced",
    json: Json = False,
) -> None:
    """One HTML page of what a generation read, when, and what it cost, all measured now on this machine.

    It shows the planes that every group read for every token, bits and time over the tokens, perplexity against time
    and bytes (ours, static, DP-LLM), the pairs that a pruned context keeps, bytes by kind, and how bits and latency
    spread over queries. The file needs no network; open it in any browser, send it, print it.

    Example: dpllm report 'def fibonacci(n):' --target-bits 3.25 -o report.html

    DP-LLM's curve needs its own calibration: dpllm calibrate OVERLAY --dp-llm --targets 2.5,3,3.5,4
    """
    from dpllm.commands.common import Hardware, parse_targets
    from dpllm.commands.report import ReportArguments, policies_of, run
    from dpllm.engine import GenerateOptions
    from dpllm.report.measure import ReportOptions

    run(
        ReportArguments(
            prompt, out, overlay, profile, text, context, Hardware(device, backend, threads, accuracy), json
        ),
        ReportOptions(
            target_bits, tpot_ms, policies_of(policies),
            None if targets is None else tuple(parse_targets(targets)), score_tokens, queries,
        ),
        GenerateOptions(max_new_tokens, temperature, seed=seed, chat=chat),
    )  # fmt: skip


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(help="Tokens to generate at each target.")] = 40,
    json: Json = False,
) -> None:
    """The idea in half a minute: one stored model at 2.5, 3.25 and 4 bits."""
    from dpllm.commands.demo import run

    run(tokens, json)
