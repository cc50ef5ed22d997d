"""Pictures of quality_vs_bits.py: perplexity against bits, and who gets the bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from bench.quality.cells import Bench
from bench.quality.texts import windows_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dpllm.evaluation.side_by_side import steps
from dpllm.policies.rate_distortion import RateDistortionPolicy

STYLES = {
    "static": ("^", "--", "tab:orange"),
    "dp-llm": ("o", "-.", "tab:green"),
    "rate-distortion": ("D", "-", "tab:blue"),
}
ORACLES = {
    "oracle-dp-llm": ("o", "tab:green", "DP-LLM, exact errors"),
    "oracle-rate-distortion": ("D", "tab:blue", "rate-distortion, exact errors"),
    "random": ("s", "tab:gray", "coin flip between two widths"),
}


def plot_curves(rows: list[dict], plain: dict[float, float], path: Path) -> None:
    """Perplexity against measured bits, and below it nats per token against the static allocation at equal bits,
    a column for each number of resident bits. plain: nats per token unquantised, on the text of
    each column."""
    budgets = [b for b in (6, 5) if any(r["section"] == "main" and r["memory_bits"] == b for r in rows)]
    figure, grid = plt.subplots(
        2, len(budgets), figsize=(5.9 * len(budgets), 7.6), dpi=130, sharex=True, sharey="row", squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": [1.15, 1]},
    )  # fmt: skip
    for (upper, lower), budget in zip(grid.T, budgets, strict=True):
        main = [r for r in rows if r["section"] == "main" and r["memory_bits"] == budget]
        _perplexities(upper, main, plain[budget])
        _differences(lower, main, rows if budget == 6 else [])
        tokens = max(r["tokens"] for r in main)
        upper.set_title(f"{budget} bits resident, {tokens / 1e3:.0f} k held-out tokens", fontsize=10)
    grid[0, 0].set_ylabel("perplexity")
    grid[1, 0].set_ylabel("nats per token less static's, equal bits")
    figure.suptitle(
        "One stored model, every precision: the reference model (bars: 95% over held-out files)", fontsize=11
    )
    figure.savefig(path)
    plt.close(figure)


def _perplexities(axes: Any, rows: list[dict], plain: float) -> None:
    for name, (marker, line, colour) in STYLES.items():
        xy = sorted({(r["effective_bits"], r["perplexity"]) for r in rows if r["policy"] == name})
        if xy:
            axes.plot(
                *zip(*xy, strict=True), marker=marker, ls=line, color=colour, label=name, ms=4.5, lw=1.4
            )
    axes.axhline(math.exp(plain), color="black", lw=0.8)
    axes.annotate(
        "unquantised", (0.02, math.exp(plain)), xycoords=axes.get_yaxis_transform(), xytext=(0, -3),
        textcoords="offset points", fontsize=8, va="top",
    )  # fmt: skip
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)


def _differences(axes: Any, main: list[dict], others: list[dict]) -> None:
    axes.axhline(0, color=STYLES["static"][2], ls="--", lw=1.2)
    for offset, name in ((-0.012, "dp-llm"), (0.012, "rate-distortion")):
        marker, line, colour = STYLES[name]
        found = sorted(
            (r["effective_bits"], r["nats"], r["low"], r["high"])
            for r in main
            if r["policy"] == name and r["against"] == "static"
        )
        if found:
            x, y, low, high = (np.asarray(v) for v in zip(*found, strict=True))
            axes.errorbar(
                x + offset, y, yerr=[y - low, high - y], marker=marker, ls=line, color=colour, label=name, capsize=2.5,
                ms=4.5, lw=1.2, elinewidth=1,
            )  # fmt: skip
    for name, (marker, colour, label) in ORACLES.items():
        points = [
            (r["effective_bits"], r["nats"])
            for r in others
            if r["policy"] == name and r["section"] in ("oracle", "control") and r["against"] == "static"
        ]
        shown = [p for p in points if p[1] < 0.03]  # a coin flip can be far above everything else
        if shown:
            axes.scatter(*zip(*shown, strict=True), marker=marker, s=46, facecolors="none", edgecolors=colour, label=label)  # fmt: skip  # noqa: E501
    axes.set_xlabel("effective bits per weight, measured")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)


@torch.no_grad()
def plot_widths(bench: Bench, path: Path, target: float = 3.0, windows: int = 24) -> None:
    """Left: mean width of each group, and beside it how much it varies from token to token. Right: mean width
    against the entropy of the token's own prediction (known only afterwards) and against its multiplier."""
    decoder = bench.decoder("fused-sync", 6)
    policy = RateDistortionPolicy(bench.profile("fused-sync"), decoder, target)
    entropy, factor, widths, per_group = [], [], [], []
    for _, logits, _, recorder in steps(
        decoder, policy, [torch.tensor(w) for w in windows_of("stdlib").ids[:windows]]
    ):
        log_p = logits.log_softmax(-1)
        entropy.append(-(log_p.exp() * log_p).sum(-1))
        factor.append(recorder.policy.multiplier)
        widths.append(recorder.effective_bits())
        per_group.append(recorder.bits().double())
    h, m, w = (torch.cat(t).numpy() for t in (entropy, factor, widths))
    chosen = torch.cat(per_group)
    figure, axes = plt.subplots(
        1, 3, figsize=(14.5, 4.2), dpi=130, gridspec_kw={"width_ratios": [1, 1, 1.25]}
    )
    _groups(axes[0], chosen.mean(0).numpy(), f"mean width at target {target:g}", "viridis_r")
    _groups(axes[1], chosen.std(0).numpy(), "its spread over tokens (standard deviation)", "magma_r")
    _tokens(
        axes[2], w, {"entropy of its own prediction (known afterwards)": h, "multiplier (known before)": m}
    )
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _groups(axes: Any, values: np.ndarray, title: str, colours: str) -> None:
    """values: [layers * 4], in the order of the groups."""
    table = values.reshape(-1, 4)
    image = axes.imshow(table, aspect="auto", cmap=colours)
    axes.set_xticks(range(4), ["q/k/v", "o", "gate/up", "down"])
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=10)
    middle = (table.min() + table.max()) / 2
    for (i, j), value in np.ndenumerate(table):
        axes.text(
            j,
            i,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if value > middle else "black",
        )
    axes.figure.colorbar(image, ax=axes)


def _tokens(axes: Any, widths: np.ndarray, by: dict[str, np.ndarray]) -> None:
    for (label, values), marker in zip(by.items(), ("o", "D"), strict=True):
        parts = np.array_split(np.argsort(values), 20)
        axes.plot(
            np.arange(20) * 5 + 2.5, [widths[p].mean() for p in parts], marker=marker, ms=4, label=label
        )
    low, high = np.percentile(widths, [5, 95])
    axes.axhspan(low, high, color="grey", alpha=0.12, label="90% of tokens")
    axes.set(xlabel="tokens by rank, percent", ylabel="effective bits")
    axes.set_title("which tokens get the bits", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
