"""The application, the panels of its help, and the options that several commands share.

A command is one file of this folder: its options, and the function that does the work. Nothing here or at the top of
those files imports torch, so that `dpllm --help` answers at once.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dpllm.commands.streams import check_stdout
from dpllm.version import __version__

COMMON, TARGETS, MACHINE, EXPERT = "Common", "Targets", "Machine", "Expert"
MAX_SEED = 2**63 - 1


class Command(TyperCommand):
    """A command whose --help stands among its common options, and whose paragraphs are filled.

    answers: the result goes to standard output, even without --json.
    """

    answers = True

    def __init__(self, *args: Any, help: str | None = None, **options: Any):
        text = None if help is None else re.sub(r"(?<!\n)\n(?!\n)", " ", help)
        super().__init__(*args, help=text, **options)

    def get_help_option(self, ctx: Any) -> Any:
        """The option --help, in the panel of common options."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = COMMON
        return option

    def invoke(self, ctx: Any) -> Any:
        """Runs the command. Raises InputError where its answer could not be printed."""
        if self.answers or ctx.params.get("json"):
            check_stdout()
        return super().invoke(ctx)


class FileCommand(Command):
    """A command whose result is a file or a directory. It prints an answer only with --json."""

    answers = False


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Run one stored language model at many precisions. Bits are chosen per layer and token to meet a target.\n\n"
    "Start with [bold]dpllm generate 'import os'[/bold], which runs the bundled reference model. "
    "For a model of your own, run [bold]quantize[/bold], [bold]calibrate[/bold] and [bold]generate[/bold].",
)

contexts = typer.Typer(
    no_args_is_help=True, help="Read a text once, prune its KV cache, and ask about it many times."
)
app.add_typer(contexts, name="context")


def check_seed(seed: int | None) -> int | None:
    """A seed that torch accepts. Raises typer.BadParameter for any other."""
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise typer.BadParameter(f"{seed} is not in the range 0 to {MAX_SEED}.")
    return seed


# -- common ------------------------------------------------------------------------------------------------------

Overlay = Annotated[
    str | None,
    typer.Option(
        "--overlay",
        help="Overlay, checkpoint directory or GGUF file to run. The default is the bundled reference model.",
        rich_help_panel=COMMON,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on the last line of stdout.", rich_help_panel=COMMON),
]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart",
        help="Delete the unfinished work of a run with other options at the same place, and begin again.",
        rich_help_panel=COMMON,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Text to calibrate on: a .txt file, a .jsonl file with the key 'text', or a directory of both. "
        "The default is bundled Python code.",
        rich_help_panel=COMMON,
    ),
]
Context = Annotated[
    str | None,
    typer.Option(
        "--context",
        help="Directory of a saved context that the prompt asks about. Make one with 'dpllm context build'.",
        rich_help_panel=COMMON,
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option("--max-new-tokens", help="Generate at most this number of tokens.", rich_help_panel=COMMON),
]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="Wrap the prompt in the model's chat template.", rich_help_panel=COMMON),
]

# -- targets -----------------------------------------------------------------------------------------------------

TargetBits = Annotated[
    float | None,
    typer.Option(
        "--target-bits",
        help="Read this number of bits per weight on average, e.g. 3.25.",
        rich_help_panel=TARGETS,
    ),
]
TpotMs = Annotated[
    float | None,
    typer.Option(
        "--tpot-ms", help="Hold this time per token in milliseconds, e.g. 25.", rich_help_panel=TARGETS
    ),
]
MaxQualityLoss = Annotated[
    str | None,
    typer.Option(
        "--max-quality-loss",
        help="Let perplexity rise by at most this share over the widest weights, e.g. 2%.",
        rich_help_panel=TARGETS,
    ),
]

# -- machine -----------------------------------------------------------------------------------------------------

Device = Annotated[
    str,
    typer.Option("--device", help="Run the heavy work on this device: cpu or cuda.", rich_help_panel=MACHINE),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", help="Use this number of CPU threads. The default is one per core.",
                 rich_help_panel=MACHINE),
]  # fmt: skip
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help="Compute with these kernels: cpu, cpu:INSTRUCTION_SET, triton or reference. The default is the fastest "
        "that runs here.",
        rich_help_panel=MACHINE,
    ),
]
Accuracy = Annotated[
    str,
    typer.Option(
        "--accuracy",
        help="Let the CPU kernels use 16-bit activations (exact), int8 throughout (fast), or a mixture (balanced).",
        rich_help_panel=EXPERT,
    ),
]

# -- expert ------------------------------------------------------------------------------------------------------

Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        help="Sample at this temperature; 0 takes the likeliest token.",
        rich_help_panel=EXPERT,
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", callback=check_seed, help="Seed of the random choices.", rich_help_panel=EXPERT),
]


@app.callback(invoke_without_command=True)
def _main(
    *, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False
) -> None:
    if version:
        print(f"dpllm {__version__}")
        raise typer.Exit
