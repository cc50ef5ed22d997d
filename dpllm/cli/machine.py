"""Commands about this machine: what a step costs, what may be asked of it, what works."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from dpllm.cli.app import (
    Accuracy,
    Backend,
    Device,
    Json,
    MaxQualityLoss,
    Overlay,
    Threads,
    TpotMs,
    app,
)


@app.command()
def profile(
    overlay: Overlay = None,
    quality: Annotated[
        bool,
        typer.Option(
            "--quality", help="Also measure what bits and pruning cost in quality, for 'dpllm plan'."
        ),
    ] = False,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--data", help="Your own text to measure quality on; implies --quality."),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    backend: Backend = None,
    accuracy: Accuracy = "balanced",
    json: Json = False,
) -> None:
    """Time decode steps on this machine, in seconds; 'plan' and 'generate --tpot-ms' lean on it.

    They measure by themselves where nothing is stored. Run it again when the machine is quiet, or has changed.
    """
    from dpllm.commands.common import Hardware
    from dpllm.commands.plan import MachineArguments
    from dpllm.commands.plan import profile as run

    run(MachineArguments(overlay, Hardware(device, backend, threads, accuracy), json), quality, data)


@app.command()
def plan(
    overlay: Overlay = None,
    tpot_ms: TpotMs = None,
    max_memory: Annotated[str | None, typer.Option(help="Of weights and cache together, e.g. 4GB.")] = None,
    max_quality_loss: MaxQualityLoss = None,
    context: Annotated[str, typer.Option(help="Tokens in the cache, e.g. 4096 or 16k.")] = "1024",
    cost: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--cost", help="A stored 'dpllm profile' of this device; default: this machine's own."),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    backend: Backend = None,
    accuracy: Accuracy = "balanced",
    json: Json = False,
) -> None:
    """From targets to a plan: planes to hold, bits to read, share of the cache to keep; and what would have to give.

    Example: dpllm plan --tpot-ms 25 --max-memory 4GB --context 16k
    """
    from dpllm.commands.common import Hardware
    from dpllm.commands.plan import MachineArguments, targets_of
    from dpllm.commands.plan import plan as run

    targets = targets_of(tpot_ms, max_memory, max_quality_loss, context)
    run(MachineArguments(overlay, Hardware(device, backend, threads, accuracy), json), targets, cost)


@app.command()
def doctor(json: Json = False) -> None:
    """What this machine has, which backend will be used, and whether it computes correctly."""
    from dpllm.commands.doctor import run

    run(json)


@app.command()
def bench(
    model: Annotated[
        str,
        typer.Option(
            "--model", help="Overlay directory, or a shape with random weights: tiny, 1.1B, 3B, 8B."
        ),
    ] = "1.1B",
    bits: Annotated[str, typer.Option(help="Widths to measure, separated by commas.")] = "3,4,6",
    prompt: Annotated[
        int, typer.Option(help="Tokens of the prompt whose reading is timed; 0 leaves it out.")
    ] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode at each width.")] = 32,
    context: Annotated[
        int, typer.Option(min=0, help="Tokens already in the cache when decoding begins.")
    ] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep each thread on its core.")] = False,
    backend: Backend = None,
    accuracy: Accuracy = "balanced",
    json: Json = False,
) -> None:
    """Tokens per second at each width, beside the memory bandwidth measured in the same run.

    A shape needs no download: its weights are random, which changes neither bytes nor time.
    """
    from dpllm.commands.bench import BenchArguments, run
    from dpllm.commands.common import Hardware

    hardware = Hardware(device, backend, threads, accuracy, pin)
    run(BenchArguments(model, bits, prompt, new_tokens, context, hardware, json))
