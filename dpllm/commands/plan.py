"""`dpllm profile` and `dpllm plan`."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from dpllm import reference
from dpllm.base.errors import InputError
from dpllm.commands.common import (
    Hardware,
    note,
    parse_share,
    parse_size,
    print_json,
    stage_bars,
    stdout,
)
from dpllm.control.cost_model import CostModel
from dpllm.engine import Engine, load
from dpllm.planning.cost_measurement import cost_of, cost_path, measure_cost
from dpllm.planning.planner import Plan, Planned, Planner, Targets, plan_inputs
from dpllm.planning.quality_measurement import measure_quality
from dpllm.planning.quality_model import NAME, QualityModel, quality_of


@dataclass(frozen=True)
class MachineArguments:
    """Which model, and what it runs on."""

    overlay: str | None
    hardware: Hardware
    json: bool

    def open(self) -> Engine:
        """The engine, every plane resident."""
        engine = load(self.overlay, options=self.hardware.load_options())
        self.hardware.note_if_slow(engine.decoder.backend)
        return engine


def profile(args: MachineArguments, quality: bool, data: str | None) -> None:
    """Times steps, and measures quality if asked to; keeps both."""
    engine = args.open()
    with stage_bars() as progress:
        cost = measure_cost(engine, progress)
        where = cost_path(engine)
        cost.save(where)
        found = None
        if quality or data is not None:
            text = reference.heldout_text() if data is None else Path(data).expanduser()
            found = measure_quality(engine, text, progress=progress)
            found.save(engine.path / NAME)
    if args.json:
        print_json(
            {"cost": asdict(cost), "quality": None if found is None else asdict(found), "path": str(where)}
        )
        return
    stdout.print(_cost_table(cost))
    added = ", ".join(
        f"{ms:.3g} ms for {p:,.0f}" for p, ms in zip(cost.pairs[1:], cost.attention_ms[1:], strict=True)
    )
    stdout.print(f"attention adds, by pairs in the cache: {added}")
    first = engine.decoder.groups[0].seed_bits + 1
    planes = ", ".join(f"{ms:.3g} ms for bit {b}" for b, ms in enumerate(cost.plane_ms, first))
    stdout.print(f"planes add, read by every matrix: {planes}")
    if found is not None:
        stdout.print(_quality_table(found))
    note(f"measured on {cost.device}; kept in {where}" + (f" and {engine.path / NAME}" if found else ""))


def _cost_table(cost: CostModel) -> Table:
    table = Table("effective bits", "ms/token")
    for bits, ms in zip(cost.bits, cost.weights_ms, strict=True):
        table.add_row(f"{bits:.2f}", f"{ms:.3g}")
    return table


def _quality_table(q: QualityModel) -> Table:
    table = Table(
        "bits", *(f"{k:.0%} of the cache" for k in q.keep), title=f"rise of perplexity, {q.tokens:,} tokens"
    )
    for bits, row in zip(q.bits, q.nats, strict=True):
        table.add_row(f"{bits:.2f}", *(f"{math.expm1(x):.2%}" for x in row))
    return table


# -- plan --------------------------------------------------------------------------------------------------------


def parse_count(text: str) -> int:
    """'16k' -> 16384, '4096' -> 4096."""
    found = re.fullmatch(r"\s*(\d+)\s*(k?)\s*", text.lower())
    if not found:
        raise InputError(f"--context '{text}' is no number of tokens. Write, for example, 4096 or 16k.")
    return int(found[1]) * (1024 if found[2] else 1)


def targets_of(
    tpot_ms: float | None, max_memory: str | None, max_quality_loss: str | None, context: str
) -> Targets:
    """From the options of the command."""
    return Targets(
        tpot_ms, None if max_memory is None else parse_size(max_memory),
        None if max_quality_loss is None else parse_share(max_quality_loss), parse_count(context),
    )  # fmt: skip


def plan(args: MachineArguments, targets: Targets, cost_file: str | None) -> None:
    """Prints the best plan, what binds it, and the frontier beside it."""
    engine = args.open()
    with stage_bars() as progress:
        cost = cost_of(engine, None if cost_file is None else Path(cost_file).expanduser(), progress)
    quality = quality_of(engine)
    planned = Planner(plan_inputs(engine), cost, quality).plan(targets)
    assert engine.profile is not None
    chosen = planned.plan
    low, high = engine.profile.target_range(chosen.resident_bits)
    lam = engine.profile.lambda_for(min(max(chosen.target_bits, low), high), chosen.resident_bits)
    if args.json:
        print_json(
            {
                "plan": chosen.as_json(lam), "binding": list(planned.binding),
                "alternatives": [p.as_json() for p in planned.alternatives], "device": cost.device,
                "quality_measured_on": quality.text, "context": targets.context,
            }
        )  # fmt: skip
        return
    stdout.print(_plan_table(planned))
    stdout.print(_explanation(planned, targets))
    note(f"times measured on {cost.device}; quality on {quality.text} ({quality.tokens:,} tokens)")
    stdout.print(_command(args, chosen, targets))


def _plan_table(planned: Planned) -> Table:
    table = Table(
        "", "bits read", "planes held", "cache kept", "ms/token", "perplexity", "memory", "read a token",
        title="plans on the frontier",
    )  # fmt: skip
    for p in planned.alternatives:
        table.add_row(
            "→" if p == planned.plan else "", f"{p.target_bits:.2f}", str(p.resident_bits), f"{p.keep_ratio:.0%}",
            f"{p.tpot_ms:.3g}", f"+{p.quality_loss:.2%}", f"{p.memory / 1e6:.1f} MB", f"{p.read_bytes / 1e6:.2f} MB",
        )  # fmt: skip
    return table


def _explanation(planned: Planned, targets: Targets) -> str:
    if not planned.binding:
        if targets.max_quality_loss is not None and targets.tpot_ms is None:
            return "No target binds: this is as fast as it goes."
        return "No target binds: nothing better is stored."
    names = {
        "tpot_ms": f"the time of {targets.tpot_ms:g} ms per token" if targets.tpot_ms else "",
        "max_memory": f"the memory of {(targets.max_memory or 0) / 1e6:.1f} MB",
        "max_quality_loss": f"the quality loss of {targets.max_quality_loss or 0:.2%}",
    }
    return f"Bound by {' and '.join(names[n] for n in planned.binding)}: relax it for a better plan."


def _command(args: MachineArguments, p: Plan, targets: Targets) -> str:
    """How to use the plan."""
    overlay = "" if args.overlay is None else f" --overlay {args.overlay}"
    target = f"--tpot-ms {targets.tpot_ms:g}" if targets.tpot_ms else f"--target-bits {p.target_bits:.2f}"
    ask = f"dpllm generate{overlay} --resident-bits {p.resident_bits} {target}"
    if p.keep_ratio >= 1:
        return f"{ask} 'PROMPT'"
    return (
        f"dpllm context build{overlay} FILE --keep {p.keep_ratio:.2f} -o DIR; {ask} --context DIR 'QUESTION'"
    )
