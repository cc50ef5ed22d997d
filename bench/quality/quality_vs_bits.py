"""Does dynamic beat static at equal bits? Perplexity against effective bits for every policy and control.

Limit measured: perplexity of the bundled reference model (trained by us; not a real-world model) on windows of
1024 tokens of held-out standard-library files as found in the running interpreter, every scored token decoded
at its own widths with the native kernels. Policies that learn from finished steps are decoded step by step.
Differences come with paired bootstrap intervals over files, moved to equal bits along the static curve's slope
where two policies read unlike amounts. Bytes count planes, tables, scales, the selector's tables and the head.

    python -m bench.quality.quality_vs_bits [--work DIR] [--jobs N] [--plot docs/quality_vs_bits.png]

Calibrates what it needs into the work directory, measures cell by cell, and continues where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np

from bench.common.report import arguments, begin
from bench.quality.cells import Bench, Cell, means, paired_interval
from bench.quality.jobs import Jobs
from bench.quality.matrix import BUDGETS, Line, Sizes, main_cell, plain_cells, plan
from bench.quality.plot import plot_curves, plot_widths
from bench.quality.texts import windows_of
from bench.quality.variants import CHAINS, SMOKE, TARGETS, Effort, calibrator_for


def slopes(bench: Bench, sizes: Sizes) -> dict[tuple[float, float], float]:
    """Nats per bit of the static allocation around each (budget, target), of what is measured."""
    found: dict[tuple[float, float], float] = {}
    for budget in BUDGETS:
        cells = {t: main_cell("static", t, sizes, budget) for t in TARGETS}
        points = {t: means(bench.measure(c)) for t, c in cells.items() if bench.known(c)}
        if len(points) > 1:
            bits, nll = np.asarray(list(points.values())).T
            found |= dict(zip(((budget, t) for t in points), np.gradient(nll, bits).tolist(), strict=True))
    return found


def row_of(bench: Bench, line: Line, steep: float) -> dict:
    """A line of the result."""
    cell = line.cell
    found = bench.measure(cell)
    bits, nll = means(found)
    scored = cell.text != "generated"
    row = {
        "section": line.section, "policy": cell.policy, "label": line.label, "calibration": cell.variant,
        "target_bits": cell.target, "memory_bits": cell.budget, "text": cell.text,
        "effective_bits": round(bits, 4), "perplexity": round(math.exp(nll), 4) if scored else None,
        "nll_mean": round(nll, 5) if scored else None, "tokens": sum(found["tokens"]),
        "weight_bytes_per_token": found["bytes"], "against": "", "nats": None, "low": None, "high": None,
        "paired_tokens": 0,
    }  # fmt: skip
    if line.against is not None:
        other, windows = bench.measure(line.against), min(cell.windows, line.against.windows)
        files = windows_of(cell.text).files
        mean, low, high = paired_interval(found, other, files, windows, steep)
        row |= {
            "against": line.against.policy, "nats": round(mean, 5), "low": round(low, 5), "high": round(high, 5),
            "paired_tokens": sum(found["tokens"][:windows]),
        }  # fmt: skip
    return row


def rows_of(bench: Bench, lines: list[Line], sizes: Sizes) -> list[dict]:
    """All lines whose cells are measured."""
    steep, rows = slopes(bench, sizes), []
    for line in lines:
        if all(c is None or bench.known(c) for c in (line.cell, line.against)):
            rows.append(row_of(bench, line, steep.get((line.cell.budget, line.cell.target), 0.0)))
    return rows


def sizes_of(args: argparse.Namespace) -> Sizes:
    """Numbers of windows from numbers of tokens."""
    stdlib = windows_of("stdlib")
    main, budget, few = (stdlib.count(n) for n in (args.tokens, args.budget_tokens, args.few))
    return Sizes(main, budget, few, windows_of("prose").count(args.few), args.prompts)


def measure(pool: Jobs, bench: Bench, lines: list[Line], sizes: Sizes) -> None:
    """Calibrations, then every cell that is not there yet."""
    with pool:
        pool.calibrate(CHAINS)
        wanted = [
            *plain_cells(sizes),
            *(c for line in lines for c in (line.cell, line.against) if c is not None),
        ]
        missing: list[Cell] = [c for c in dict.fromkeys(wanted) if not bench.known(c)]
        pool.measure(missing)


def draw(bench: Bench, rows: list[dict], sizes: Sizes, path: Path) -> None:
    """The curves, and next to them the widths as *_widths.png."""
    unquantised = bench.measure(plain_cells(sizes)[0])
    nats = {float(b): means(unquantised, n)[1] for b, n in ((6, sizes.main), (5, sizes.budget))}
    plot_curves(rows, nats, path)
    plot_widths(bench, path.with_name(path.stem + "_widths.png"))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/quality_vs_bits"))
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with a share of the cores")
    parser.add_argument("--tokens", type=int, default=102_000, help="scored tokens at 6 resident bits")
    parser.add_argument("--budget-tokens", type=int, default=102_000, help="scored tokens at 5 resident bits")
    parser.add_argument("--few", type=int, default=40_000, help="of controls, oracles, ablations, prose")
    parser.add_argument("--prompts", type=int, default=24, help="texts that the model continues freely")
    parser.add_argument(
        "--plot", type=Path, help="also draw the curves, and the widths beside as *_widths.png"
    )
    parser.add_argument("--available", action="store_true", help="report what is measured, measure no more")
    parser.add_argument(
        "--smoke", action="store_true", help="hardly any calibration: to see that all of it runs"
    )
    args = parser.parse_args()
    run = begin(args, writes=not args.smoke)
    args.work.mkdir(parents=True, exist_ok=True)
    began, sizes = time.perf_counter(), sizes_of(args)
    effort = SMOKE if args.smoke else Effort()
    lines, bench = plan(sizes), Bench(args.work, calibrator_for(args.work, 1, effort))
    if not args.available:
        measure(Jobs(args.work, args.jobs, effort), bench, lines, sizes)
    rows = rows_of(bench, lines, sizes)
    plain = {c.text: means(bench.measure(c))[1] for c in plain_cells(sizes)}
    if args.smoke:
        print(f"smoke run: {len(rows)} lines, of which no figure means anything")
    else:
        few = plain_cells(sizes)[0]
        run.report(
            "quality_vs_bits", rows, measured_on="reference model", seconds=round(time.perf_counter() - began),
            full_precision_perplexity={t: round(math.exp(n), 4) for t, n in plain.items()},
            full_precision_perplexity_few=round(math.exp(means(bench.measure(few), sizes.few)[1]), 4),
            windows=sizes.main, files=len(set(windows_of("stdlib").files[: sizes.main])),
        )  # fmt: skip
    if args.plot:  # after the result, which is not written from an edited work tree
        draw(bench, rows, sizes, args.plot)


if __name__ == "__main__":
    main()
