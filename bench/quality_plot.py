"""Pictures of bench/quality_vs_bits.py: perplexity against bits, and who gets the bits."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from quality_cells import Bench

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dpllm.calib.dense import dense
from dpllm.lockstep import steps
from dpllm.policy import RateDistortionPolicy

STYLES = {
    "random": ("s", ":", "tab:gray"),
    "static": ("^", "--", "tab:orange"),
    "dp-llm": ("o", "-.", "tab:green"),
    "rate-distortion": ("D", "-", "tab:blue"),
}


def plot_curves(rows: list[dict], plain: float, path: Path) -> None:
    """Left: perplexity against measured bits. Right: nats per token against the static allocation at equal
    bits, with paired intervals. plain: nats per token unquantised."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.3), dpi=130)
    tokens = max(r["tokens"] for r in rows)
    for name, (marker, line, colour) in STYLES.items():
        points = {r["target_bits"]: r for r in rows if r["policy"] == name and r["memory_bits"] == 6}
        if name != "random":
            points = {t: r for t, r in points.items() if r["tokens"] == tokens}
            xy = sorted((r["effective_bits"], r["perplexity"]) for r in points.values())
            left.plot(
                *zip(*xy, strict=True), marker=marker, linestyle=line, color=colour, label=name, markersize=5
            )
        against = sorted(
            (r["effective_bits"], r["nats"], r["low"], r["high"])
            for r in rows
            if r["policy"] == name and r.get("against") == "static" and r["memory_bits"] == 6
        )
        if against and name != "random":
            x, y, low, high = map(np.asarray, zip(*against, strict=True))
            right.errorbar(
                x,
                y,
                yerr=[y - low, high - y],
                marker=marker,
                linestyle=line,
                color=colour,
                label=name,
                capsize=3,
            )
    left.axhline(math.exp(plain), color="grey", linewidth=1)
    left.annotate(
        "unquantised", (4.3, math.exp(plain)), textcoords="offset points", xytext=(0, -11), color="grey"
    )
    left.set(xlabel="effective bits per weight, measured", ylabel="held-out perplexity")
    right.axhline(0, color="tab:orange", linestyle="--", linewidth=1)
    right.set(
        xlabel="effective bits per weight, measured", ylabel="nats per token against static, equal bits"
    )
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
    figure.suptitle(
        "One stored model, every precision (reference model; bars: 95% over held-out files)", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path)


@torch.no_grad()
def plot_widths(bench: Bench, path: Path, target: float = 3.0, windows: int = 16) -> None:
    """Left: mean width of each group. Right: mean width against the entropy of the token's own prediction
    (known only afterwards) and against its multiplier (known before)."""
    decoder = bench.decoder("fused-sync", 6)
    policy = RateDistortionPolicy(bench.profile("fused-sync"), decoder, target)
    entropy, factor, widths, per_group = [], [], [], []
    ids = [torch.tensor(w) for w in bench.windows.ids[:windows]]
    with dense(decoder):
        for _, logits, _, recorder in steps(decoder, policy, ids):
            log_p = logits.log_softmax(-1)
            entropy.append(-(log_p.exp() * log_p).sum(-1))
            factor.append(policy.multiplier)
            widths.append(recorder.effective_bits())
            per_group.append(recorder.bits().double())
    h, m, w = (torch.cat(t).numpy() for t in (entropy, factor, widths))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4), dpi=130)
    mean = torch.cat(per_group).mean(0).numpy().reshape(-1, 4)
    image = left.imshow(mean, aspect="auto", cmap="viridis_r", vmin=2, vmax=5)
    left.set_xticks(range(4), ["q/k/v", "o", "gate/up", "down"])
    left.set(ylabel="layer", title=f"mean width of each group at target {target:g}")
    for (i, j), value in np.ndenumerate(mean):
        left.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7)
    figure.colorbar(image, ax=left)
    for values, label, marker in ((h, "entropy of its own prediction (known afterwards)", "o"),
                                  (m, "multiplier (known before)", "D")):  # fmt: skip
        order = np.array_split(np.argsort(values), 20)
        right.plot(np.arange(20) / 20 + 0.025, [w[o].mean() for o in order], marker=marker, label=label)
    right.set(xlabel="tokens by rank", ylabel="effective bits", title="which tokens get the bits")
    right.legend(frameon=False)
    right.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path)
