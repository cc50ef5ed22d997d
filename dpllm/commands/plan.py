"""`dpllm plan`: from targets to planes held, bits read and the share of the cache kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dpllm.base.quantities import figure
from dpllm.base.shell import command_line
from dpllm.commands.app import (
    EXPERT,
    TARGETS,
    Accuracy,
    Backend,
    Command,
    Device,
    Json,
    MaxQualityLoss,
    Overlay,
    Threads,
    TpotMs,
    app,
)
from dpllm.commands.common import Hardware, note, print_json, stage_bars, stdout, tell

if TYPE_CHECKING:
    from dpllm.planning.planner import Plan, Planned, Targets

MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        help="Keep weights and cache together within this size, e.g. 4GB.",
        rich_help_panel=TARGETS,
    ),
]
CacheTokens = Annotated[
    str,
    typer.Option(
        "--context",
        help="Plan for this number of tokens in the cache, e.g. 4096 or 16k.",
        rich_help_panel=TARGETS,
    ),
]
Cost = Annotated[
    str | None,
    typer.Option(
        "--cost",
        help="Plan with this stored result of 'dpllm profile' for the same device. The default is this machine's own.",
        rich_help_panel=EXPERT,
    ),
]


@app.command(cls=Command)
def plan(
    *,
    overlay: Overlay = None,
    json: Json = False,
    tpot_ms: TpotMs = None,
    max_memory: MaxMemory = None,
    max_quality_loss: MaxQualityLoss = None,
    context: CacheTokens = "1024",
    device: Device = "cpu",
    threads: Threads = None,
    backend: Backend = None,
    cost: Cost = None,
    accuracy: Accuracy = "balanced",
) -> None:
    """Find the planes to hold, the bits to read and the share of the cache to keep that meet your targets.

    It also says which target keeps the plan from being better, or which one would have to give.

    Example: dpllm plan --tpot-ms 25 --max-memory 4GB --context 16k
    """
    from dpllm.opening import open_engine as load
    from dpllm.planning.plan import plan as make_plan
    from dpllm.planning.plan import targets_of

    targets = targets_of(  # refused before the model is loaded
        tpot_ms=tpot_ms, max_memory=max_memory, max_quality_loss=max_quality_loss, context=context
    )
    hardware = Hardware(device=device, backend=backend, threads=threads, accuracy=accuracy)
    engine = load(overlay, options=hardware.load_options())
    hardware.note_about(engine.decoder)
    with stage_bars() as progress:
        planned = make_plan(
            engine, tpot_ms=targets.tpot_ms, max_memory=targets.max_memory,
            max_quality_loss=targets.max_quality_loss, context=targets.context, cost=cost, progress=progress,
        )  # fmt: skip
    chosen, measured, quality = planned.plan, planned.cost, planned.quality
    if json:
        profile = engine.calibration()
        low, high = profile.target_range(chosen.resident_bits)
        lam = profile.lambda_for(min(max(chosen.target_bits, low), high), chosen.resident_bits)
        print_json(
            {
                "plan": chosen.as_json(lam), "binding": list(planned.binding),
                "alternatives": [p.as_json() for p in planned.alternatives], "device": measured.device,
                "quality_measured_on": quality.text, "context": targets.context,
            }
        )  # fmt: skip
        return
    stdout.print(_table(planned))
    tell(_explanation(planned))
    note(f"times measured on {measured.device}; quality on {quality.text} ({quality.tokens:,} tokens)")
    model = [] if overlay is None else ["--overlay", overlay]
    for line in commands_for(chosen, targets, [*model, *hardware.words()]):
        tell(line)


def _table(planned: Planned) -> Table:
    table = Table(
        "", "bits read", "planes held", "cache kept", "ms/token", "perplexity", "memory", "read a token",
        title="plans on the frontier",
    )  # fmt: skip
    for p in planned.alternatives:
        loss = f"+{figure(p.quality_loss, '.2%')}"
        table.add_row(
            "→" if p == planned.plan else "", f"{p.target_bits:.2f}", str(p.resident_bits), f"{p.keep_ratio:.0%}",
            f"{p.tpot_ms:.3g}", loss, f"{p.memory / 1e6:.1f} MB", f"{p.read_bytes / 1e6:.2f} MB",
        )  # fmt: skip
    return table


def _explanation(planned: Planned) -> str:
    """Which targets keep the plan from being better."""
    targets = planned.targets
    if not planned.binding:
        if targets.max_quality_loss is not None and targets.tpot_ms is None:
            return "No target binds: this is the fastest plan."
        return "No target binds: this is the best quality that is stored."
    names = {
        "tpot_ms": f"the time of {targets.tpot_ms or 0:g} ms per token",
        "max_memory": f"the memory of {(targets.max_memory or 0) / 1e6:.1f} MB",
        "max_quality_loss": f"the quality loss of {targets.max_quality_loss or 0:.2%}",
    }
    return f"Bound by {' and '.join(names[n] for n in planned.binding)}: relax it for a better plan."


def commands_for(plan: Plan, targets: Targets, options: list[str]) -> list[str]:
    """The commands that follow the plan, one a line. options: words that name the model and the machine."""
    target = (
        ["--tpot-ms", f"{targets.tpot_ms:g}"]
        if targets.tpot_ms
        else ["--target-bits", f"{plan.target_bits:.2f}"]
    )
    ask = ["generate", *options, "--resident-bits", plan.resident_bits, *target]
    if plan.keep_ratio >= 1:
        return [command_line(*ask, "PROMPT")]
    keep = ["--keep", f"{plan.keep_ratio:.2f}"]
    return [
        command_line("context", "build", *options, "FILE", *keep, "-o", "DIR"),
        command_line(*ask, "--context", "DIR", "QUESTION"),
    ]
