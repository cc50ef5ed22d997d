"""The application, and the options that several commands share."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from dpllm import __version__

MAX_SEED = 2**63 - 1

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="One stored language model, many precisions. Bits are chosen per layer and token to meet a target.\n\n"
    "Start with [bold]dpllm generate 'import os'[/bold]: it runs the bundled reference model. "
    "Your own model: [bold]quantize[/bold], [bold]calibrate[/bold], [bold]generate[/bold].",
)

contexts = typer.Typer(
    no_args_is_help=True, help="Texts read once, their KV caches pruned (KVzip), asked often."
)
app.add_typer(contexts, name="context")

Overlay = Annotated[
    str | None,
    typer.Option("--overlay", help="Overlay or checkpoint directory; default: the bundled reference model."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of stdout.")]
Threads = Annotated[Optional[int], typer.Option("--threads", help="CPU threads; default: one per core.")]  # noqa: UP045
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend", help="cpu, cpu:INSTRUCTION_SET, triton or reference; default: the best there is."
    ),
]
Accuracy = Annotated[
    str,
    typer.Option("--accuracy", help="CPU kernels: balanced, exact (16-bit activations) or fast (all int8)."),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", help="Text: .txt, .jsonl with 'text', or a directory; default: bundled Python code."
    ),
]
TpotMs = Annotated[Optional[float], typer.Option("--tpot-ms", help="Time per token to hold, e.g. 25.")]  # noqa: UP045
MaxQualityLoss = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--max-quality-loss", help="Rise of perplexity over the widest weights, e.g. 2%."),
]
Device = Annotated[str, typer.Option("--device", help="Where the heavy work runs: cpu or cuda.")]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"dpllm {__version__}")
        raise typer.Exit
