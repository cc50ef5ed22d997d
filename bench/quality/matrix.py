"""What quality_vs_bits.py measures: the lines of its result, each a cell and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.quality.cells import PLAIN, Cell
from bench.quality.variants import SOME, TARGETS

OURS, THEIRS = "fused-sync", "linear-async"  # the main curves' calibrations
HOME = {"dp-llm": THEIRS, "oracle-dp-llm": THEIRS}
CONTROLS = ("random", "hawq-v2-like", "llm-mq-like", "equal loss (BAQ)")
BUDGETS = (6.0, 5.0)
# label: (policy, calibration)
ABLATIONS = {
    "without the correction": ("rate-distortion, uncorrected", OURS),
    "without the previous step": ("rate-distortion, no context", OURS),
    "without token sensitivity": ("rate-distortion", "no-token-sensitivity"),
    "without saliency in the signal": ("rate-distortion", "no-saliency"),
    "two widths per group": ("rate-distortion, two widths", OURS),
}


@dataclass(frozen=True)
class Sizes:
    """Windows of the main curves at 6 and at 5 resident bits, of everything else, of prose, prompts continued."""

    main: int
    budget: int
    few: int
    prose: int
    prompts: int


@dataclass(frozen=True)
class Line:
    """A line of the result. against: the cell it is compared with, on the windows both have."""

    section: str
    cell: Cell
    against: Cell | None = None
    label: str = ""


def plan(sizes: Sizes) -> list[Line]:
    """Every line, the most important first."""
    lines = [*_main(sizes), *_granularity(sizes), *_oracles(sizes), *_ablations(sizes), *_controls(sizes)]
    return [*lines, *_elsewhere(sizes)]


def plain_cells(sizes: Sizes) -> list[Cell]:
    """The unquantised checkpoint on all that is scored."""
    return [
        Cell(PLAIN, "", 16.0, 16.0, n, text) for n, text in ((sizes.main, "stdlib"), (sizes.prose, "prose"))
    ]


def main_cell(policy: str, target: float, sizes: Sizes, budget: float = 6.0) -> Cell:
    """A cell of the main curves."""
    windows = sizes.main if budget == 6 else sizes.budget
    return Cell(policy, HOME.get(policy, OURS), target, budget, windows)


def _main(sizes: Sizes) -> Iterator[Line]:
    for budget in BUDGETS:
        for t in sorted(TARGETS, key=lambda t: t not in SOME):
            static, paper, ours = (
                main_cell(p, t, sizes, budget) for p in ("static", "dp-llm", "rate-distortion")
            )
            yield Line("main", static)
            yield Line("main", paper, static)
            yield Line("main", ours, static)
            yield Line("main", ours, paper)


def _granularity(sizes: Sizes) -> Iterator[Line]:
    """The two policies where both decide equally often from equally old inputs."""
    for t in SOME:
        for variant in ("linear-async", "linear-sync", "fused-async", "fused-sync"):
            paper = Cell("dp-llm", variant, t, 6, sizes.main)
            yield Line("equal terms", Cell("rate-distortion", variant, t, 6, sizes.main), paper, variant)
            if variant != THEIRS:
                yield Line("equal terms", paper, main_cell("dp-llm", t, sizes), variant)
            if variant != OURS:
                ours = main_cell("rate-distortion", t, sizes)
                yield Line("equal terms", Cell("rate-distortion", variant, t, 6, sizes.main), ours, variant)
        static = Cell("static", "linear-sync", t, 6, sizes.main)
        yield Line("equal terms", static, main_cell("static", t, sizes), "linear-sync")


def _oracles(sizes: Sizes) -> Iterator[Line]:
    for t in SOME:
        static = main_cell("static", t, sizes)
        for name, policy in (("oracle-dp-llm", "dp-llm"), ("oracle-rate-distortion", "rate-distortion")):
            oracle = Cell(name, HOME.get(name, OURS), t, 6, sizes.few)
            yield Line("oracle", oracle, static)
            yield Line("oracle", oracle, main_cell(policy, t, sizes))


def _ablations(sizes: Sizes) -> Iterator[Line]:
    for t in SOME[:3]:
        for label, (policy, variant) in ABLATIONS.items():
            cell = Cell(policy, variant, t, 6, sizes.few)
            yield Line("ablation", cell, main_cell("rate-distortion", t, sizes), label)


def _controls(sizes: Sizes) -> Iterator[Line]:
    for t in SOME:
        for name in CONTROLS:
            yield Line("control", Cell(name, OURS, t, 6, sizes.few), main_cell("static", t, sizes))
    for bits in (2.0, 3.0, 4.0, 5.0, 6.0):
        yield Line("control", Cell("uniform", OURS, bits, 6, sizes.main))


def _elsewhere(sizes: Sizes) -> Iterator[Line]:
    """Another domain than the calibrated one, and text that the model writes itself."""
    for t in SOME:
        static = Cell("static", OURS, t, 6, sizes.prose, "prose")
        yield Line("prose", static)
        for name in ("dp-llm", "rate-distortion", "rate-distortion, uncorrected"):
            yield Line("prose", Cell(name, HOME.get(name, OURS), t, 6, sizes.prose, "prose"), static)
        for name in ("dp-llm", "rate-distortion", "rate-distortion, uncorrected"):
            yield Line("generated", Cell(name, HOME.get(name, OURS), t, 6, sizes.prompts, "generated"))
