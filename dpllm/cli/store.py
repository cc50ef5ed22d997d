"""Commands that make and look at what is stored."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from dpllm.cli.app import (
    MAX_SEED,
    Data,
    Device,
    Json,
    Threads,
    app,
)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Hugging Face model directory or hub id (safetensors).")],
    out: Annotated[str, typer.Argument(help="Directory to make; must not exist.")],
    bits: Annotated[str, typer.Option(help="Stored range, seed-parent, within 2..8.")] = "2-6",
    head_bits: Annotated[
        int, typer.Option(help="Width of lm_head: 8 = int8, 2..7 = planes, 16 = as it is.")
    ] = 8,
    fisher: Annotated[
        str, typer.Option(help="'text': weight errors by the loss gradient; 'none': plain k-means.")
    ] = "text",
    refine: Annotated[
        str,
        typer.Option(
            help="After k-means, lower the error of each layer's output: 'full' moves codes and tables, 'tables' "
            "only tables, 'none' neither. Needs --fisher text."
        ),
    ] = "full",
    data: Data = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences for the Fisher pass.")] = 64,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    rows_per_table: Annotated[
        int, typer.Option(min=0, help="Rows sharing one table; 0 = 1 unless rows are short.")
    ] = 0,
    device: Device = "cpu",
    jobs: Annotated[
        int, typer.Option(min=0, help="Threads; 0 = all cores. The result does not depend on it.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the calibration sample.")] = 0,
    json: Json = False,
) -> None:
    """Store a model once as nested bitplanes, readable at every width in the range.

    Killed at any moment, the same command continues where it stopped. Layer by layer: memory stays at about
    two decoder layers above the embedding.
    """
    from dpllm.commands.quantize import run

    run(
        model,
        out,
        bits,
        head_bits,
        fisher,
        refine,
        data,
        samples,
        sequence_length,
        rows_per_table,
        device,
        jobs,
        seed,
        json,
    )


@app.command()
def calibrate(
    overlay: Annotated[str, typer.Argument(help="Overlay made by dpllm quantize.")],
    targets: Annotated[
        Optional[str], typer.Option(help="Targets to check by decoding at the end, e.g. 3.25,3.5.")  # noqa: UP045
    ] = None,
    memory_bits: Annotated[
        str | None, typer.Option(help="Mean resident bits to allot planes for, e.g. 5 or 4.5,5.")
    ] = None,
    data: Data = None,
    granularity: Annotated[
        str, typer.Option(help="'fused': one decision for q/k/v, one for gate/up; 'linear': one a matrix.")
    ] = "fused",
    samples: Annotated[int, typer.Option(help="Sequences to calibrate on.")] = 32,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    asynchronous: Annotated[
        bool, typer.Option("--asynchronous", help="Estimate q/k/v and gate/up from inputs one sub-block old.")
    ] = False,
    dp_llm: Annotated[
        bool, typer.Option("--dp-llm", help="Also calibrate the paper's own policy for each of --targets.")
    ] = False,
    kv_heads: Annotated[
        bool,
        typer.Option("--kv-heads", help="Also score the KV heads, for 'context build --kv-policy heads'."),
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="Profile to write; default: OVERLAY/profile.safetensors.")
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the sample.")] = 0,
    json: Json = False,
) -> None:
    """Measure what each group's next bit is worth, so that every target can be met.

    One run serves every target, with any number of resident planes. Killed at any moment, the same command
    continues where it stopped; run again with other budgets or policies, it adds them to the profile.
    """
    from dpllm.commands.calibrate import CalibrateArguments, run

    run(
        CalibrateArguments(
            overlay, targets, memory_bits, data, granularity, samples, sequence_length, asynchronous, dp_llm, out,
            device, threads, seed, json, kv_heads,
        )
    )  # fmt: skip


@app.command()
def inspect(
    directory: Annotated[
        str, typer.Argument(help="Overlay, checkpoint, calibration profile or saved context.")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Also read every tensor and check its sha256.")
    ] = False,
    json: Json = False,
) -> None:
    """What a directory holds: shapes, widths, bytes by kind, provenance."""
    from dpllm.commands.inspect import run

    run(directory, verify, json)
