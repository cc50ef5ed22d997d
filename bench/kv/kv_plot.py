"""The picture of kv_quality.py: what is still known against the share of pairs kept."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = {
    "kvzip": ("D", "-", "tab:blue"), "kvzip+": ("D", ":", "tab:cyan"), "kvzip, blocks of 512": ("s", "--", "tab:blue"),
    "heads": ("^", "-", "tab:olive"), "expected-attention": ("o", "-", "tab:green"), "snapkv": ("v", "-", "tab:orange"),
    "pyramidkv": ("v", ":", "tab:orange"), "adakv": ("v", "--", "tab:red"), "knorm": ("P", "-", "tab:purple"),
    "recent": ("X", "-", "tab:brown"), "random": ("s", "-", "tab:gray"),
}  # fmt: skip


def plot(rows: list[dict], path: Path) -> None:
    """A panel for each task, a line for each policy, 95% intervals of the difference to the whole cache as bars."""
    rows = [r for r in rows if r["weights"] == "maximum"]
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(3.8 * len(tasks) + 1.8, 4.4), dpi=120, layout="constrained"
    )
    for ax, task in zip(axes, tasks, strict=True):
        own = [r for r in rows if r["task"] == task]
        whole = next(r["value"] for r in own if r["policy"] == "keep-all")
        ax.axhline(whole, color="black", linewidth=0.8, linestyle=":")
        for name, (marker, line, colour) in STYLES.items():
            points = sorted((r for r in own if r["policy"] == name), key=lambda r: r["kept"])
            if not points:
                continue
            y = [r["value"] for r in points]
            errors = [[v - whole - r["less_whole_low"] for v, r in zip(y, points, strict=True)],
                      [r["less_whole_high"] - v + whole for v, r in zip(y, points, strict=True)]]  # fmt: skip
            ax.errorbar(
                [r["kept"] for r in points], y, [[max(0, e) for e in side] for side in errors], marker=marker,
                linestyle=line, color=colour, markersize=4, linewidth=1.3, capsize=1.5, elinewidth=0.7, label=name,
            )  # fmt: skip
        ax.set_title(
            f"{task}\n({own[0]['count']} {'tokens' if 'nats' in own[0]['measure'] else 'questions'})",
            fontsize=10,
        )
        ax.set_xlabel("share of KV pairs kept")
        ax.set_ylabel(own[0]["measure"])
        ax.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(
        "What a pruned KV cache still knows: the reference model, questions unseen at pruning", fontsize=11
    )
    figure.savefig(path)
    plt.close(figure)
