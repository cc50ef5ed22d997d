"""The same model quantised by HQQ, on the same held-out text: equal bits is not equal quality.

Limit measured: perplexity of the reference model with HQQ's weights (dequantised, fp32 arithmetic) on the first
windows of bench/quality_vs_bits.py. Bits per weight count codes, scales and zeros (fp16 each, per group); our
curve's bits beside it are recounted the same way: bytes of planes, tables, scales and selector over weights.

    pip install --no-deps hqq termcolor && python bench/peer_quality.py
"""

from __future__ import annotations

import argparse
import json
import math

import numpy as np
import torch
from quality_cells import heldout_windows
from report import RESULTS, report

from dpllm import reference
from dpllm.decoder import Decoder
from dpllm.loading import LoadOptions, load_decoder


def hqq_weight(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, int]:
    """(dequantised matrix, bytes) of HQQ's own quantiser."""
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(
        weight.float(),
        nbits=bits,
        group_size=group,
        axis=1,
        optimize=True,
        device="cpu",
        compute_dtype=torch.float32,
    )
    dense = Quantizer.dequantize(packed, meta).reshape(weight.shape).float()
    return dense, weight.numel() * bits // 8 + 2 * 2 * (weight.numel() // group)


@torch.no_grad()
def nats(decoder: Decoder, windows: list[list[int]]) -> float:
    """Per token."""
    total, count = 0.0, 0
    for window in windows:
        ids = torch.tensor(window)
        total += torch.nn.functional.cross_entropy(decoder.forward(ids[:-1]), ids[1:], reduction="sum").item()
        count += len(ids) - 1
    return total / count


def ours(tokens: int) -> list[dict]:
    """Our points on the same tokens, from the result of quality_vs_bits.py."""
    found = json.loads((RESULTS / "quality_vs_bits-cpu.json").read_text())
    decoder = load_decoder(reference.overlay_path())
    weights, head = sum(g.weights for g in decoder.groups), decoder.head_bytes()
    return [
        {
            "method": r["policy"], "setting": f"target {r['target_bits']:g}",
            "bits_per_weight": round((r["weight_bytes_per_token"] - head) * 8 / weights, 3),
            "perplexity": r["perplexity"], "tokens": r["tokens"],
        }
        for r in found["rows"]
        if r["policy"] in ("rate-distortion", "static", "uniform") and r["memory_bits"] == 6 and r["tokens"] == tokens
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=24_000)
    args = parser.parse_args()
    windows = heldout_windows(10**9)
    counts = np.cumsum([len(w) - 1 for w in windows.ids])
    few = windows.ids[: int(np.searchsorted(counts, args.tokens)) + 1]
    rows = []
    for bits, group in ((2, 32), (2, 64), (3, 64), (3, 128), (4, 64), (4, 128)):
        decoder = load_decoder(reference.model_path(), LoadOptions(granularity="linear"))
        nbytes = 0
        for g in decoder.groups:
            g.weight, read = hqq_weight(g.weight, bits, group)
            nbytes += read
        weights = sum(g.weight.numel() for g in decoder.groups)
        rows.append(
            {
                "method": "hqq", "setting": f"{bits} bits, group {group}",
                "bits_per_weight": round(nbytes * 8 / weights, 3),
                "perplexity": round(math.exp(nats(decoder, few)), 4), "tokens": sum(len(w) - 1 for w in few),
            }
        )  # fmt: skip
    report("peer_quality", rows + ours(rows[0]["tokens"]), measured_on="reference model")


if __name__ == "__main__":
    main()
