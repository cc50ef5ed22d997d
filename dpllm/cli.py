"""The `dpllm` command: arguments, one clear line for bad input, nothing else.

Each command's work is a function in dpllm/commands/. Exit codes: 0, 2 for bad input, 130 for Ctrl-C.
"""

from __future__ import annotations

import errno
import io
import sys
from typing import Annotated, Optional

import typer

from dpllm import __version__
from dpllm.kernels.errors import InputError

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


def main() -> None:
    """Entry point: runs the app, turns bad input into one line and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what this terminal cannot show
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except InputError as e:
        _fail(str(e))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        _fail(f"{e.strerror}: {e.filename or 'while writing'}. Free space or choose another place.")
    except typer.Abort:
        sys.exit(130)
    except Exception as e:
        if not _is_usage_error(e):
            raise
        if not (message := e.format_message()):  # type: ignore[attr-defined]
            sys.exit(2)  # no command: the help was shown
        _fail(message)


def _is_usage_error(e: Exception) -> bool:
    return any(t.__name__ == "ClickException" for t in type(e).__mro__)


def _fail(message: str) -> None:
    print(f"dpllm: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)
