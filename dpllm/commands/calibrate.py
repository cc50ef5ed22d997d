"""`dpllm calibrate`: measures what each group's next bit is worth."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dpllm.base.shell import command_line
from dpllm.commands.app import (
    COMMON,
    EXPERT,
    TARGETS,
    Data,
    Device,
    FileCommand,
    Json,
    Restart,
    Seed,
    Threads,
    app,
)
from dpllm.commands.common import note, parse_numbers, print_json, stage_bars

if TYPE_CHECKING:
    from dpllm.prepare.calibrate import CalibrationReport

Made = Annotated[str, typer.Argument(help="Overlay to calibrate, made by 'dpllm quantize'.")]
Targets = Annotated[
    str | None,
    typer.Option(
        "--targets",
        help="Check these mean bits per weight by decoding at the end, e.g. 3.25,3.5.",
        rich_help_panel=TARGETS,
    ),
]
MemoryBits = Annotated[
    str | None,
    typer.Option(
        "--memory-bits",
        help="Also divide the planes among the groups for these mean resident bits, e.g. 5 or 4.5,5.",
        rich_help_panel=TARGETS,
    ),
]
Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        help="Write the profile to this file. The default is OVERLAY/profile.safetensors.",
        rich_help_panel=COMMON,
    ),
]
KvHeads = Annotated[
    bool,
    typer.Option(
        "--kv-heads",
        help="Also score the KV heads, for 'dpllm context build --kv-policy whole-heads'.",
        rich_help_panel=COMMON,
    ),
]
Granularity = Annotated[
    str,
    typer.Option(
        "--granularity",
        help="Decide once for q/k/v and once for gate/up ('fused'), or once per matrix ('linear').",
        rich_help_panel=EXPERT,
    ),
]
Samples = Annotated[
    int, typer.Option("--samples", help="Calibrate on this number of sequences.", rich_help_panel=EXPERT)
]
SequenceLength = Annotated[
    int,
    typer.Option(
        "--sequence-length", help="Take this number of tokens per sequence.", rich_help_panel=EXPERT
    ),
]
Asynchronous = Annotated[
    bool,
    typer.Option(
        "--asynchronous",
        help="Estimate q/k/v and gate/up from inputs that are one sub-block old.",
        rich_help_panel=EXPERT,
    ),
]
DpLlm = Annotated[
    bool,
    typer.Option(
        "--dp-llm",
        help="Also calibrate DP-LLM's own policy for each of --targets, to compare with.",
        rich_help_panel=EXPERT,
    ),
]


@app.command(cls=FileCommand)
def calibrate(
    *,
    overlay: Made,
    data: Data = None,
    out: Out = None,
    kv_heads: KvHeads = False,
    json: Json = False,
    restart: Restart = False,
    targets: Targets = None,
    memory_bits: MemoryBits = None,
    device: Device = "cpu",
    threads: Threads = None,
    granularity: Granularity = "fused",
    samples: Samples = 32,
    sequence_length: SequenceLength = 512,
    asynchronous: Asynchronous = False,
    dp_llm: DpLlm = False,
    seed: Seed = 0,
) -> None:
    """Measure what each group's next bit is worth, so that every target can be met.

    One run serves every target, with any number of resident planes. A run that is stopped at any moment continues
    where it was when the same command is given again; with other options, the command refuses until --restart says that
    the unfinished work may go. A run with other budgets or policies adds them to a finished profile.
    """
    from dpllm.prepare.calibrate import calibrate as calibrate_overlay

    wanted = None if targets is None else parse_numbers(targets, "--targets")
    budgets = None if memory_bits is None else parse_numbers(memory_bits, "--memory-bits")
    with stage_bars() as progress:
        report = calibrate_overlay(
            overlay, targets=wanted, memory_bits=budgets, data=data, granularity=granularity, samples=samples,
            sequence_length=sequence_length, asynchronous=asynchronous, dp_llm=dp_llm, kv_heads=kv_heads, out=out,
            device=device, threads=threads, seed=seed, restart=restart, progress=progress,
        )  # fmt: skip
    _show(report)
    if json:
        print_json(as_json(report))


def _show(report: CalibrationReport) -> None:
    """Says what was measured and what to do next, on stderr."""
    profile, (low, high) = report.profile, report.target_range
    share = profile.estimator_bytes() / (profile.weights.sum() * 3.5 / 8)
    note(
        f"{report.path}: {len(profile.group_names)} groups, targets {low:.2f} to {high:.2f} bits, "
        f"{report.seconds:.1f} s; the selector reads {profile.estimator_bytes() / 1e3:.1f} kB a token "
        f"({share:.2%} of a 3.5-bit step)"
    )
    memory = (
        "" if report.process_peak_bytes is None else f"peak memory {report.process_peak_bytes / 1e9:.2f} GB; "
    )
    note(
        f"  {memory}at this pace a Llama of 8B weights would take {report.hours_for_8b:.1f} hours for as many tokens"
    )
    note(
        f"  token-sensitivity probe: R^2 = {profile.origin['probe_explains']:.2f} on held-out tokens "
        "(0 or less: all tokens count the same)"
    )
    for row in report.targets:
        note(
            f"  target {row.target_bits:g} within {row.memory_bits:g} resident: "
            f"{row.effective_bits:.3f} bits on the calibration text"
        )
    target = f"{min(max(3.25, low), high):.4g}"
    ask = command_line("generate", "--overlay", report.overlay, "--target-bits", target, "your prompt")
    note(f"next: {ask}")


def as_json(report: CalibrationReport) -> dict[str, object]:
    """The object of `dpllm calibrate --json`."""
    profile = report.profile
    loss = profile.mean_loss.sum(axis=0)
    return {
        "profile": str(report.path), "overlay_hash": profile.overlay_hash, "groups": len(profile.group_names),
        "granularity": profile.granularity, "target_range": list(report.target_range),
        "seconds": round(report.seconds, 2), "peak_bytes": report.process_peak_bytes,
        "estimator_bytes": profile.estimator_bytes(), "probe_explains": profile.origin["probe_explains"],
        "targets": [asdict(t) for t in report.targets], "mean_loss": loss.round(6).tolist(),
    }  # fmt: skip
