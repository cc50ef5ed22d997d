"""Is the target met, and what does it cost? Every policy at every target on held-out text.

Limit measured: perplexity of the bundled reference model (trained by us; not a real-world model) on
heldout.jsonl, files it never saw, each token at its own widths. Effective bits beside the target say whether
calibration hits it; the difference to `static` at the same target comes with a paired bootstrap interval
over documents. Bytes count planes, tables, scales, the selector's own tables and the head.

    python bench/quality_vs_target.py [--plot docs/quality_vs_bits.png]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from report import report

from dpllm import reference
from dpllm.commands.evaluate import token_documents
from dpllm.engine import load
from dpllm.evaluate import DocumentScore, score, summarize
from dpllm.policy import make_policy

TARGETS = (2.5, 3.0, 3.25, 3.5, 4.0, 4.5)
POLICIES = ("uniform", "random", "static", "rate-distortion")


def paired_interval(
    a: list[DocumentScore], b: list[DocumentScore], rounds: int = 2000
) -> tuple[float, float]:
    """95% bootstrap interval, over documents, of the mean loss of a minus that of b (nats per token)."""
    difference = np.asarray([x.nll - y.nll for x, y in zip(a, b, strict=True)])
    tokens = np.asarray([x.tokens for x in a])
    draws = np.random.default_rng(0).integers(0, len(a), (rounds, len(a)))
    means = difference[draws].sum(1) / tokens[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@torch.no_grad()
def full_precision(documents: list[list[int]]) -> float:
    """Perplexity of the unquantised checkpoint on the same tokens."""
    plain = load(reference.model_path())
    total, count = 0.0, 0
    for document in documents:
        ids = torch.tensor(document)
        logits = plain.decoder.forward(ids[:-1])
        total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        count += len(ids) - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--max-tokens", type=int, default=0, help="0: every held-out document")
    args = parser.parse_args()
    engine = load()
    documents = token_documents(engine, reference.heldout_text(), context=1024, max_tokens=args.max_tokens)
    rows = []
    for target in (2.0, *TARGETS, 6.0):
        scores: dict[str, list[DocumentScore]] = {}
        for name in POLICIES:
            if (name == "uniform" and target != int(target)) or (name != "uniform" and target not in TARGETS):
                continue
            scores[name] = score(
                engine.decoder, make_policy(name, target, engine.decoder, engine.profile), documents
            )
            r = summarize(name, target, scores[name], engine.decoder.head_bytes())
            low, high = paired_interval(scores[name], scores["static"]) if "static" in scores else (0.0, 0.0)
            rows.append(
                {
                    "policy": name, "target_bits": target, "effective_bits": r.effective_bits,
                    "miss": round(r.effective_bits - target, 4), "perplexity": r.perplexity,
                    "nats_vs_static_low": round(low, 5), "nats_vs_static_high": round(high, 5),
                    "weight_bytes_per_token": r.weight_bytes_per_token, "tokens": r.tokens,
                }
            )  # fmt: skip
    plain = full_precision(documents)
    if args.plot:
        plot(rows, plain, args.plot)
    report(
        "quality_vs_target", rows, measured_on="reference model", full_precision_perplexity=round(plain, 4)
    )


def plot(rows: list[dict], plain: float, path: Path) -> None:
    """Perplexity against effective bits, one line per policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), dpi=130)
    styles = {
        "uniform": ("o", "none"),
        "random": ("s", ":"),
        "static": ("^", "--"),
        "rate-distortion": ("D", "-"),
    }
    for name, (marker, line) in styles.items():
        points = sorted((r["effective_bits"], r["perplexity"]) for r in rows if r["policy"] == name)
        axes.plot(*zip(*points, strict=True), marker=marker, linestyle=line, label=name, markersize=5)
    axes.axhline(plain, color="grey", linewidth=1)
    axes.annotate("unquantised", (5.35, plain), textcoords="offset points", xytext=(0, -12), color="grey")
    axes.set_xlabel("effective bits per weight, measured on held-out text")
    axes.set_ylabel("held-out perplexity")
    axes.set_title("One stored model, every precision (reference model)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
