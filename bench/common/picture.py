"""Draws docs/idea.png: the stored planes on the left, and on the right the bits that each group of the
reference model really read for each token of a real generation at a target.

    python -m bench.common.picture --target-bits 3.25
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np

from dpllm.commands.demo import PROMPT
from dpllm.decode.options import GenerateOptions
from dpllm.opening import open_engine

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

KINDS = ("qkv", "o", "gate_up", "down")


def planes_panel(axes) -> None:
    """Nested planes: reading the first b of six gives the b-bit weight."""
    colours = plt.get_cmap("viridis")(np.linspace(0.15, 0.9, 6))
    for p in range(6):
        axes.add_patch(Rectangle((0.5, 5 - p), 5, 0.82, color=colours[p], ec="white"))
        axes.text(0.35, 5.4 - p, f"plane {p}", ha="right", va="center", fontsize=8)
    for bits, x in ((2, 5.9), (3, 6.7), (4, 7.5), (6, 8.3)):
        axes.annotate("", (x, 6 - bits), (x, 5.85), arrowprops={"arrowstyle": "->", "lw": 1.4})
        axes.text(x, 5.95, str(bits), ha="center", va="bottom", fontsize=9)
    axes.text(7.1, 6.3, "bits", ha="center", va="bottom", fontsize=9)
    axes.set_xlim(-1.9, 8.9)
    axes.set_ylim(-0.2, 6.9)
    axes.set_title("stored once: reading the first b planes\ngives the b-bit weight", fontsize=9)
    axes.axis("off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target-bits", type=float, default=3.25)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "docs/idea.png")
    args = parser.parse_args()
    engine = open_engine(target_bits=args.target_bits)
    steps = list(engine.generate_with(PROMPT, GenerateOptions(max_new_tokens=44)))[1:]
    bits = np.asarray([s.bits for s in steps]).T  # [groups, tokens]
    labels = [repr(engine.tokenizer.decode([s.token]))[1:-1] for s in steps]

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, 5.2), dpi=120, gridspec_kw={"width_ratios": [1, 3.2]}
    )
    planes_panel(left)
    order = [4 * layer + k for k in range(4) for layer in range(len(bits) // 4)]
    image = right.imshow(
        bits[order], aspect="auto", cmap="viridis_r", vmin=2, vmax=6, interpolation="nearest"
    )
    right.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, family="monospace")
    layers = len(bits) // 4
    right.set_yticks([k * layers + (layers - 1) / 2 for k in range(4)], KINDS, fontsize=9)
    for k in range(1, 4):
        right.axhline(k * layers - 0.5, color="white", linewidth=2)
    mean = np.mean([s.effective_bits for s in steps])
    right.set_title(
        f"read per token: width of every group (rows: layers 0..{layers - 1} of each kind) while generating, "
        f"target {args.target_bits:g}, read {mean:.2f}",
        fontsize=9,
    )
    bar = figure.colorbar(image, ax=right, pad=0.01, ticks=range(2, 7))
    bar.set_label("planes read", fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
