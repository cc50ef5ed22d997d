"""`dpllm profile`: times decode steps on this machine, and measures quality if asked to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dpllm.base.places import file_to_write
from dpllm.base.quantities import figure, rise
from dpllm.commands.app import (
    COMMON,
    Accuracy,
    Backend,
    Command,
    Device,
    Json,
    Overlay,
    Threads,
    app,
)
from dpllm.commands.common import Hardware, note, print_json, stage_bars, stdout, tell

if TYPE_CHECKING:
    from dpllm.control.cost_model import CostModel
    from dpllm.planning.quality_model import QualityModel

Quality = Annotated[
    bool,
    typer.Option(
        "--quality",
        help="Also measure what bits and pruning cost in quality, for 'dpllm plan'.",
        rich_help_panel=COMMON,
    ),
]
QualityData = Annotated[
    str | None,
    typer.Option(
        "--data", help="Measure quality on this text of your own; implies --quality.", rich_help_panel=COMMON
    ),
]


@app.command(cls=Command)
def profile(
    *,
    overlay: Overlay = None,
    quality: Quality = False,
    data: QualityData = None,
    json: Json = False,
    device: Device = "cpu",
    threads: Threads = None,
    backend: Backend = None,
    accuracy: Accuracy = "balanced",
) -> None:
    """Time decode steps on this machine, for 'dpllm plan' and 'dpllm generate --tpot-ms'.

    It takes seconds. Those commands measure by themselves where nothing is stored. Run it again when the machine is
    quiet, or has changed.
    """
    from dpllm import reference
    from dpllm.opening import open_engine as load
    from dpllm.planning.cost_measurement import cost_path, measure_cost
    from dpllm.planning.quality_measurement import measure_quality
    from dpllm.planning.quality_model import NAME

    hardware = Hardware(device=device, backend=backend, threads=threads, accuracy=accuracy)
    engine = load(overlay, options=hardware.load_options())
    hardware.note_about(engine.decoder)
    wants_quality, where = quality or data is not None, cost_path(engine)
    where.parent.mkdir(parents=True, exist_ok=True)
    file_to_write(where)
    if wants_quality:
        file_to_write(engine.path / NAME)
    with stage_bars() as progress:
        cost = measure_cost(engine, progress)
        cost.save(where)
        found = None
        if wants_quality:
            text = reference.heldout_text() if data is None else Path(data).expanduser()
            found = measure_quality(engine, text, progress=progress)
            found.save(engine.path / NAME)
    if json:
        stored = None if found is None else asdict(found)
        print_json({"cost": asdict(cost), "quality": stored, "path": str(where)})
        return
    stdout.print(_cost_table(cost))
    _show_additions(cost, first_plane=engine.decoder.groups[0].seed_bits + 1)
    if found is not None:
        stdout.print(_quality_table(found))
    note(f"measured on {cost.device}; kept in {where}" + (f" and {engine.path / NAME}" if found else ""))


def _cost_table(cost: CostModel) -> Table:
    table = Table("effective bits", "ms/token")
    for bits, ms in zip(cost.bits, cost.weights_ms, strict=True):
        table.add_row(f"{bits:.2f}", f"{ms + cost.other_ms:.3g}")
    return table


def _show_additions(cost: CostModel, *, first_plane: int) -> None:
    """Prints what pairs in the cache and single planes add to the time of a token."""
    pairs = zip(cost.pairs[1:], cost.attention_ms[1:], strict=True)
    tell(
        "attention adds, by pairs in the cache: " + ", ".join(f"{ms:.3g} ms for {p:,.0f}" for p, ms in pairs)
    )
    planes = enumerate(cost.plane_ms, first_plane)
    tell("planes add, read by every matrix: " + ", ".join(f"{ms:.3g} ms for bit {b}" for b, ms in planes))


def _quality_table(q: QualityModel) -> Table:
    columns = [f"{k:.0%} of the cache" for k in q.keep]
    table = Table("bits", *columns, title=f"rise of perplexity, {q.tokens:,} tokens")
    for bits, row in zip(q.bits, q.nats, strict=True):
        table.add_row(f"{bits:.2f}", *(figure(rise(x), ".2%") for x in row))
    return table
