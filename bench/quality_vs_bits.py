"""Does dynamic beat static at equal bits? Perplexity against effective bits for every policy and control.

Limit measured: perplexity of the bundled reference model (trained by us; not a real-world model) on windows of
1024 tokens of held-out standard-library files as found in the running interpreter, every scored token decoded
at its own widths. Policies that learn from finished steps are decoded step by step. Differences come with
paired bootstrap intervals over files, moved to equal bits along the static curve's slope where two policies
read unlike amounts. Bytes count planes, tables, scales, the selector's tables and the head.

    python bench/quality_vs_bits.py [--work DIR] [--tokens 100000] [--plot docs/quality_vs_bits.png]

Calibrates what it needs into the work directory, measures cell by cell, and continues where it was stopped.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from quality_cells import Bench, Cell, heldout_windows, means, paired_interval
from quality_plot import plot_curves, plot_widths
from report import report

from dpllm import reference
from dpllm.calib.calibrate import CalibrateOptions, Calibrator
from dpllm.calib.controls import WeightGradients, weight_gradients
from dpllm.calib.dense import dense
from dpllm.calib.dp_llm import DPLLMOptions, calibrate_dp_llm
from dpllm.loading import LoadOptions, load_decoder
from dpllm.quant.overlay import Overlay
from dpllm.quant.text import load_tokenizer, read_documents, sample_sequences

TARGETS = (2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 4.75)
MAIN = ("static", "dp-llm", "rate-distortion")
CONTROLS = ("random", "hawq-v2-like", "llm-mq-like", "equal loss (BAQ)", "oracle-dp-llm")
MANY_TOKENS = (2.5, 3.0, 3.5)  # targets at which the main curves are measured on every window
FEW = (2.5, 3.0, 3.5)
DP_TARGETS = (2.5, 3.0, 3.5, 4.0)  # each costs minutes of fine-tuning
ABLATION = (2.5, 3.0)
BUDGETED = (2.5, 3.0, 4.0)
OURS, THEIRS = "fused-sync", "linear-async"
# variant: (granularity, calibration options, sequences)
VARIANTS: dict[str, tuple[str, dict, int]] = {
    "fused-sync": ("fused", {}, 32),
    "linear-sync": ("linear", {}, 16),
    "fused-async": ("fused", {"asynchronous": True}, 16),
    "linear-async": ("linear", {"asynchronous": True}, 16),
    "no-token-sensitivity": ("fused", {"token_sensitivity": False}, 16),
    "no-saliency": ("fused", {"weighted": False}, 16),
}
ABLATIONS = {
    "rate-distortion": [("rate-distortion", OURS)],
    "without the correction": [("rate-distortion, uncorrected", OURS)],
    "without the previous step": [("rate-distortion, no context", OURS)],
    "without token sensitivity": [("rate-distortion", "no-token-sensitivity")],
    "without saliency in the signal": [("rate-distortion", "no-saliency")],
    "two widths per group": [("rate-distortion, two widths", OURS)],
    "one decision per matrix": [("rate-distortion", "linear-sync")],
    "stale inputs": [("rate-distortion", "fused-async")],
    "stale inputs, one decision per matrix": [("rate-distortion", "linear-async")],
}


def calibrate(work: Path, name: str) -> None:
    """A variant, if it is not there yet."""
    out, path = work / f"{name}.safetensors", reference.overlay_path()
    if out.exists():
        return
    granularity, options, samples = VARIANTS[name]
    documents = read_documents(reference.calibration_text())
    sequences = sample_sequences(documents, load_tokenizer(path), samples, 512, 0)
    decoder = load_decoder(path, LoadOptions(granularity=granularity))
    calibrator = Calibrator(decoder, sequences, CalibrateOptions(**options), work / f"{name}.partial")
    profile = calibrator.run(Overlay.open(path).hash, granularity, {"variant": name}, _quiet)
    if name == THEIRS:
        caps = {"6": profile.planes(None), "5": profile.budget(5)}
        targets = {"6": list(DP_TARGETS), "5": list(BUDGETED)}
        longer = sample_sequences(documents, load_tokenizer(path), 64, 512, 0)
        found = calibrate_dp_llm(decoder, longer, caps, targets, DPLLMOptions(), _quiet)
        profile = replace(profile, extra=dict(profile.extra) | found)
    profile.save(out)
    print(f"{out}: {profile.origin['seconds']} s", flush=True)


def _quiet(stage: str, done: int, total: int) -> None:
    if done == total:
        print(f"  {stage}", flush=True)


def slopes(bench: Bench, few: int) -> dict[float, float]:
    """Nats per bit of the static allocation around each target."""
    at = [means(bench.measure(Cell("static", OURS, t, 6, few))) for t in TARGETS]
    bits, nll = np.asarray(at).T
    return dict(zip(TARGETS, np.gradient(nll, bits), strict=True))


class Table:
    """Collects lines. available: leave out what has not been measured yet instead of measuring it."""

    def __init__(self, bench: Bench, available: bool):
        self.bench, self.available = bench, available
        self.rows: list[dict] = []

    def add(self, cell: Cell, against: Cell | None, slope: float, label: str | None = None) -> None:
        """A line of the result: the cell, and its paired difference to another."""
        if self.available and any(c is not None and c.key not in self.bench.cells for c in (cell, against)):
            return
        found = self.bench.measure(cell)
        bits, nll = means(found)
        line = {
            "policy": label or cell.policy, "granularity": self.bench.profile(cell.variant).granularity,
            "target_bits": cell.target, "memory_bits": cell.budget, "effective_bits": round(bits, 4),
            "perplexity": round(math.exp(nll), 4), "nll_mean": round(nll, 5), "tokens": sum(found["tokens"]),
            "weight_bytes_per_token": found["bytes"], "against": "", "nats": 0.0, "low": 0.0, "high": 0.0,
        }  # fmt: skip
        if against is not None:
            other, windows = self.bench.measure(against), min(cell.windows, against.windows)
            mean, low, high = paired_interval(found, other, self.bench.windows.files, windows, slope)
            line |= {
                "against": against.policy,
                "nats": round(mean, 5),
                "low": round(low, 5),
                "high": round(high, 5),
            }
        self.rows.append(line)


def all_rows(bench: Bench, windows: int, few: int, available: bool) -> list[dict]:
    """Main curves first, then controls, budgets, ablations and oracles."""
    steep, table = slopes(bench, few), Table(bench, available)
    variant = {"dp-llm": THEIRS, "oracle-dp-llm": THEIRS}
    for t in (*MANY_TOKENS, *(t for t in TARGETS if t not in MANY_TOKENS)):
        size = windows if t in MANY_TOKENS else few
        static, paper = Cell("static", OURS, t, 6, size), Cell("dp-llm", THEIRS, t, 6, size)
        names = [n for n in MAIN if n != "dp-llm" or t in DP_TARGETS]
        for name in names:
            cell = Cell(name, variant.get(name, OURS), t, 6, size)
            table.add(cell, None if name == "static" else static, steep[t])
        if t in DP_TARGETS:
            table.add(Cell("rate-distortion", OURS, t, 6, size), paper, steep[t])
    for t in FEW:
        for name in CONTROLS:
            cell = Cell(name, variant.get(name, OURS), t, 6, few)
            if name.endswith("like") and cell.key not in bench.cells and not available:
                bench.gradients.setdefault("fused", _gradients())
            table.add(cell, Cell("static", OURS, t, 6, few if t not in MANY_TOKENS else windows), steep[t])
    for b in (2.0, 3.0, 4.0, 5.0, 6.0):
        table.add(Cell("uniform", OURS, b, 6, few), None, 0.0)
    for t in ABLATION:
        whole = Cell("rate-distortion", OURS, t, 6, windows)
        table.add(Cell("oracle-rate-distortion", OURS, t, 6, few), whole, steep[t])
        for label, ((policy, v),) in list(ABLATIONS.items())[1:]:
            table.add(Cell(policy, v, t, 6, few), whole, steep[t], f"ablation: {label}")
    for t in BUDGETED:
        for name in MAIN:
            cell = Cell(name, variant.get(name, OURS), t, 5, few)
            table.add(cell, None if name == "static" else Cell("static", OURS, t, 5, few), steep[t])
    return table.rows


def _gradients() -> WeightGradients:
    decoder = load_decoder(reference.overlay_path(), LoadOptions(granularity="fused"))
    documents = read_documents(reference.calibration_text())
    sequences = sample_sequences(documents, load_tokenizer(reference.overlay_path()), 12, 512, 0)
    with dense(decoder):
        return weight_gradients(decoder, sequences, 0, _quiet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/quality_vs_bits"))
    parser.add_argument("--tokens", type=int, default=102_000, help="scored tokens of the main curves")
    parser.add_argument("--few", type=int, default=24_000, help="scored tokens of controls and ablations")
    parser.add_argument(
        "--plot", type=Path, help="also draw the curves, and the widths beside as *_widths.png"
    )
    parser.add_argument("--available", action="store_true", help="report what is measured, measure no more")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    windows = heldout_windows(args.tokens)
    bench = Bench(args.work, windows, lambda name: calibrate(args.work, name))
    counts = np.cumsum([len(w) - 1 for w in windows.ids])
    few = min(int(np.searchsorted(counts, args.few)) + 1, len(windows.ids))
    rows = all_rows(bench, len(windows.ids), few, args.available)
    full = bench.full_precision()
    plain, plain_few = (sum(full["nll"][:n]) / sum(full["tokens"][:n]) for n in (len(windows.ids), few))
    if args.plot:
        plot_curves(rows, plain, args.plot)
        plot_widths(bench, args.plot.with_name(args.plot.stem + "_widths.png"))
    report(
        "quality_vs_bits", rows, measured_on="reference model", full_precision_perplexity=round(math.exp(plain), 4),
        full_precision_perplexity_few=round(math.exp(plain_few), 4),
        windows=len(windows.ids), files=len(set(windows.files)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
