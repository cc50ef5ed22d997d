"""`dpllm quantize`: stores a model once as nested bitplanes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from dpllm.base.quantities import figure, rise
from dpllm.base.shell import command_line
from dpllm.commands.app import (
    EXPERT,
    MACHINE,
    TARGETS,
    Data,
    Device,
    FileCommand,
    Json,
    Restart,
    Seed,
    app,
)
from dpllm.commands.common import note, parse_bits, print_json, stage_bars

if TYPE_CHECKING:
    from dpllm.quant.overlay import Overlay
    from dpllm.quant.quantize import Quantizer

Model = Annotated[
    str,
    typer.Argument(
        help="Model to store: a Hugging Face directory with safetensors, a GGUF file, or a hub id."
    ),
]
Out = Annotated[str, typer.Argument(help="Directory to make. It must not exist.")]
Bits = Annotated[
    str,
    typer.Option(
        "--bits", help="Store every width of this range, which lies within 2-8.", rich_help_panel=TARGETS
    ),
]
HeadBits = Annotated[
    int,
    typer.Option(
        "--head-bits",
        help="Store lm_head at this width: 8 is int8, 2 to 7 are planes, 16 leaves it alone.",
        rich_help_panel=TARGETS,
    ),
]
Fisher = Annotated[
    str,
    typer.Option(
        "--fisher",
        help="Weight the errors of k-means by the gradient of the loss ('text'), or not at all ('none').",
        rich_help_panel=EXPERT,
    ),
]
Imatrix = Annotated[
    str | None,
    typer.Option(
        "--imatrix",
        help="Weight the errors of k-means by an importance matrix of llama.cpp. It needs --fisher none.",
        rich_help_panel=EXPERT,
    ),
]
Refine = Annotated[
    str,
    typer.Option(
        "--refine",
        help="Lower the error of each layer's output after k-means: 'full' moves codes and tables, 'tables' moves only "
        "tables, 'none' moves neither. It needs --fisher text.",
        rich_help_panel=EXPERT,
    ),
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples",
        help="Take this number of calibration sequences for the gradients.",
        rich_help_panel=EXPERT,
    ),
]
SequenceLength = Annotated[
    int,
    typer.Option(
        "--sequence-length", help="Take this number of tokens per sequence.", rich_help_panel=EXPERT
    ),
]
RowsPerTable = Annotated[
    int,
    typer.Option(
        "--rows-per-table",
        min=0,
        help="Let this number of rows share a table. 0 is one row, or more where rows are short.",
        rich_help_panel=EXPERT,
    ),
]
Jobs = Annotated[
    int,
    typer.Option(
        "--jobs",
        min=0,
        help="Use this number of CPU threads. 0 is one per core. The result does not depend on it.",
        rich_help_panel=MACHINE,
    ),
]


@app.command(cls=FileCommand)
def quantize(
    *,
    model: Model,
    out: Out,
    data: Data = None,
    json: Json = False,
    restart: Restart = False,
    bits: Bits = "2-6",
    head_bits: HeadBits = 8,
    device: Device = "cpu",
    jobs: Jobs = 0,
    fisher: Fisher = "text",
    imatrix: Imatrix = None,
    refine: Refine = "full",
    samples: Samples = 64,
    sequence_length: SequenceLength = 512,
    rows_per_table: RowsPerTable = 0,
    seed: Seed = 0,
) -> None:
    """Store a model once as nested bitplanes that can be read at every width of a range.

    A run that is stopped at any moment continues where it was when the same command is given again. With other options,
    the command refuses until --restart says that the unfinished work may go. It works layer by layer: memory stays at
    about two decoder layers above the embedding.
    """
    from dpllm.prepare.quantize import make_quantizer
    from dpllm.quant.quantize_plan import QuantizeOptions

    options = QuantizeOptions(
        bits=parse_bits(bits), head_bits=head_bits, rows_per_table=rows_per_table, samples=samples,
        sequence_length=sequence_length, seed=seed, refine=refine,
    )  # fmt: skip
    job = make_quantizer(
        model,
        out,
        options=options,
        fisher=fisher,
        imatrix=imatrix,
        data=data,
        device=device,
        jobs=jobs,
        restart=restart,
        tell=note,
    )
    _announce(job)
    began = time.perf_counter()
    with stage_bars() as progress:
        job.run(progress)
    _report(job, seconds=time.perf_counter() - began, json=json)


def _announce(job: Quantizer) -> None:
    """Says what the job will take, before it begins."""
    from dpllm.quant.quantize_plan import multiply_adds_per_second

    if job.source.note:
        note(job.source.note)
    note(
        f"{_weights(job) / 1e6:.1f} M weights in {len(job.plan.linears)} matrices -> "
        f"{job.plan.output_bytes / 1e6:.1f} MB; peak memory about {job.plan.peak_bytes / 1e6:.0f} MB above the "
        f"runtime, scratch {job.plan.work_bytes / 1e6:.0f} MB"
    )
    if job.plan.refine_products and job.model.device == "cpu":
        hours = job.plan.refine_products / multiply_adds_per_second() / 3600
        if hours > 0.1:
            note(
                f"refinement will take about {hours:.1f} h on this CPU (--refine tables: a quarter; none: none)"
            )


def _report(job: Quantizer, *, seconds: float, json: bool) -> None:
    """Says what was stored, how long it took, and what to do next."""
    from dpllm.quant.overlay import Overlay
    from dpllm.quant.quantize_plan import llama_3_8b

    overlay = Overlay.open(job.out)
    stored = overlay.stored_bytes()
    speed = job.weights_done / job.seconds["k-means"] / job.jobs if job.weights_done else 0.0
    note(
        f"{job.out}: {sum(stored.values()) / 1e6:.1f} MB in {seconds:.1f} s "
        f"(k-means {speed / 1e6:.2f} M weights/s per thread, gradients {job.seconds['fisher']:.1f} s, "
        f"refinement {job.seconds['refine']:.1f} s)"
    )
    if job.weights_done:
        note(llama_3_8b(job.options, job.seconds, job.weights_done, job.documents is not None))
    note(_about_int8(overlay))
    note(f"next: {command_line('calibrate', job.out)}")
    if json:
        print_json(
            {
                "overlay": str(job.out), "hash": overlay.hash, "bits": list(overlay.bits), "weights": _weights(job),
                "stored_bytes": stored, "seconds": round(seconds, 2), "weights_per_s_per_thread": round(speed),
            }
        )  # fmt: skip


def _about_int8(overlay: Overlay) -> str:
    """Says what int8 activations cost, and where 16-bit activations take their place."""
    from dpllm.quant.int8_cost import wide_matrices

    nats = overlay.int8_nats
    if not nats:
        return "int8 activations were not checked without a text: compare dpllm eval with --accuracy exact"
    wide = wide_matrices(nats)
    left = sum(cost for name, cost in nats.items() if name not in wide)
    return (
        f"int8 activations would cost {figure(rise(sum(nats.values())), '.2%')} of perplexity; with 16-bit ones at "
        f"{len(wide)} of {len(nats)} matrices {left:.2%}"
    )


def _weights(job: Quantizer) -> int:
    """Weights of the decoder matrices."""
    return sum(n * k for n, k in job.plan.linears.values())
