"""Plans for an engine: how many planes to hold, how many bits to read, how much of the cache to keep.

planned = plan(engine, tpot_ms=25, max_memory="4GB", context="16k")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dpllm.base.progress import Progress, no_progress
from dpllm.base.quantities import parse_count, parse_share, parse_size
from dpllm.control.cost_model import CostModel
from dpllm.planning.cost_measurement import cost_of
from dpllm.planning.planner import Planned, Planner, Targets, plan_inputs
from dpllm.planning.quality_model import quality_of

if TYPE_CHECKING:
    from dpllm.engine import Engine


def plan(
    engine: Engine,
    *,
    tpot_ms: float | None = None,
    max_memory: str | float | None = None,
    max_quality_loss: str | float | None = None,
    context: str | int = 1024,
    cost: CostModel | str | Path | None = None,
    progress: Progress | None = None,
) -> Planned:
    """The best plan that meets every target, what keeps it from being better, and the frontier around it.

    tpot_ms: milliseconds per token. max_memory: bytes of weights and cache together, '4GB' or a number.
    max_quality_loss: rise of perplexity over the widest weights, '2%' or 0.02. context: tokens in the cache, '16k' or
    4096. cost: the step times to plan with, or the file of a stored `dpllm profile`; None is what this machine stored,
    measured now where there is none. progress: called with (stage, done, total) while steps are timed.

    Raises InputError for a model without a calibration profile, and where no plan meets the targets.
    """
    targets = targets_of(
        tpot_ms=tpot_ms, max_memory=max_memory, max_quality_loss=max_quality_loss, context=context
    )
    if not isinstance(cost, CostModel):
        cost = cost_of(engine, None if cost is None else Path(cost).expanduser(), progress or no_progress)
    return Planner(plan_inputs(engine), cost, quality_of(engine)).plan(targets)


def targets_of(
    *,
    tpot_ms: float | None = None,
    max_memory: str | float | None = None,
    max_quality_loss: str | float | None = None,
    context: str | int = 1024,
) -> Targets:
    """The targets as numbers, from what people write. Raises InputError for those that make no sense."""
    return Targets(
        tpot_ms=tpot_ms,
        max_memory=None if max_memory is None else parse_size(max_memory),
        max_quality_loss=None if max_quality_loss is None else parse_share(max_quality_loss),
        context=parse_count(context),
    )
