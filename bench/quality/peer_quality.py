"""The same model quantised by others, on the same held-out text: equal bits is not equal quality.

Limit measured: perplexity of the reference model with each system's weights (what it stores, dequantised; fp32
arithmetic; embedding and head untouched) on the first windows of quality_vs_bits.py. Bits per weight count
all bytes of the matrices: codes, scales, zero points. Our curve's beside them are counted the same way: planes,
tables, scales and selector. Importance (imatrix): mean squared inputs on our calibration text, as llama.cpp's tool
collects them; our store knows the same text through its gradients. hqq and torchao see no data.

    pip install --no-deps hqq termcolor
    python -m bench.quality.peer_quality [--peers PYTHON]     # an interpreter with llama-cpp-python, gguf, torchao
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.common.report import arguments, begin, result_path
from bench.peers.shapes import Shape
from bench.peers.worker import Peer, PeerError
from bench.quality.texts import heldout_windows
from bench.quality.variants import calibration_sequences
from dpllm import reference
from dpllm.model.decoder import Decoder, Group
from dpllm.model.loading import LoadOptions, load_decoder

GGUF = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
LLAMA_CPP = (
    ("Q2_K", False), ("Q2_K", True), ("Q3_K", False), ("Q3_K", True), ("Q3_K_M", True), ("Q4_K", False), ("Q4_K", True),
    ("Q4_K_M", True), ("Q5_K", True), ("Q6_K", False), ("IQ2_XS", True), ("IQ2_S", True), ("IQ3_XXS", True),
    ("IQ3_S", True), ("IQ4_XS", True),
)  # fmt: skip
IMPORTANCE = 32  # sequences of 512 tokens
HQQ = ((2, 32), (2, 64), (3, 64), (3, 128), (4, 64), (4, 128))
TORCHAO = ((2, 32), (3, 64), (3, 128), (4, 64), (4, 128))


@dataclass(frozen=True)
class FolderOptions:
    """The worker's options."""

    folder: str


def gguf_name(group: str) -> str:
    """'model.layers.0.mlp.up_proj' -> 'blk.0.ffn_up.weight'."""
    _, _, layer, name = group.split(".", 3)
    return f"blk.{layer}.{GGUF[name]}.weight"


def hqq_weight(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, int]:
    """(dequantised matrix, bytes) of HQQ's own quantiser: fp16 scale and zero per group."""
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(
        weight.float(), nbits=bits, group_size=group, axis=1, optimize=True, device="cpu", compute_dtype=torch.float32
    )  # fmt: skip
    dense = Quantizer.dequantize(packed, meta).reshape(weight.shape).float()
    return dense, weight.numel() * bits // 8 + 2 * 2 * (weight.numel() // group)


def importance(decoder: Decoder) -> dict[str, np.ndarray]:
    """Mean squared input of every column, float32 [K], by GGUF name."""
    total: dict[str, torch.Tensor] = {}

    def observe(group: Group, x: torch.Tensor, y: torch.Tensor) -> None:
        name = gguf_name(group.name)
        total[name] = total.get(name, torch.zeros(x.shape[1])) + x.float().square().mean(0)

    with torch.no_grad():
        for ids in calibration_sequences(IMPORTANCE):
            decoder.forward(ids, observe=observe)
    return {name: (t / IMPORTANCE).numpy() for name, t in total.items()}


@torch.no_grad()
def nats(decoder: Decoder, windows: list[list[int]]) -> float:
    """Per token."""
    total, count = 0.0, 0
    for window in windows:
        ids = torch.tensor(window)
        total += torch.nn.functional.cross_entropy(decoder.forward(ids[:-1]), ids[1:], reduction="sum").item()
        count += len(ids) - 1
    return total / count


class Peers:
    """Puts each system's weights into the plain decoder and scores them."""

    def __init__(self, windows: list[list[int]]):
        self.decoder = load_decoder(reference.model_path(), LoadOptions(granularity="linear"))
        self.matrices = {g.name: g.weight.float() for g in self.decoder.groups}
        self.weights = sum(m.numel() for m in self.matrices.values())
        self.windows, self.tokens = windows, sum(len(w) - 1 for w in windows)

    def row(self, method: str, setting: str, found: dict[str, torch.Tensor], nbytes: int) -> dict:
        """A line of the result."""
        for g in self.decoder.groups:
            g.weight = found[g.name]
        return {
            "method": method, "setting": setting, "bits_per_weight": round(nbytes * 8 / self.weights, 3),
            "perplexity": round(math.exp(nats(self.decoder, self.windows)), 4), "tokens": self.tokens,
        }  # fmt: skip

    def hqq(self) -> Iterator[dict]:
        """In this process."""
        for bits, group in HQQ:
            made = {n: hqq_weight(m, bits, group) for n, m in self.matrices.items()}
            found = {n: dense for n, (dense, _) in made.items()}
            yield self.row(
                "hqq", f"{bits} bits, group {group}", found, sum(size for _, size in made.values())
            )

    def others(self, python: str) -> Iterator[dict]:
        """In a worker of the interpreter that has them."""
        c = self.decoder.config
        shape = Shape(
            c.hidden_size,
            c.num_layers,
            c.intermediate_size,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            c.vocab_size,
        )
        with tempfile.TemporaryDirectory() as folder:
            named = {gguf_name(n): m.numpy() for n, m in self.matrices.items()}
            np.savez(Path(folder) / "matrices.npz", **named)
            for g in self.decoder.groups:
                g.weight = self.matrices[g.name]
            np.savez(Path(folder) / "importance.npz", **importance(self.decoder))  # type: ignore[arg-type]
            with Peer("quantisers", FolderOptions(folder), python) as worker:

                def made(method: str, setting: str, call: Callable[[], dict]) -> dict:
                    size = call()["bytes"]
                    read = np.load(Path(folder) / "quantised.npz")
                    found = {n: torch.from_numpy(read[gguf_name(n)]) for n in self.matrices}
                    return self.row(method, setting, found, size)

                for kind, important in LLAMA_CPP:
                    setting, call = (
                        kind + (", imatrix" if important else ""),
                        (kind, important, asdict(shape)),
                    )
                    yield made("llama.cpp", setting, partial(worker.call, "llama_cpp", *call))
                for bits, group in TORCHAO:
                    setting = f"int{bits}, group {group}"
                    yield made("torchao", setting, partial(worker.call, "torchao", bits, group))


def ours(tokens: int) -> list[dict]:
    """Our points on the same tokens, from the result of quality_vs_bits.py."""
    found = json.loads(result_path("quality_vs_bits").read_text())
    decoder = load_decoder(reference.overlay_path())
    weights, head = sum(g.weights for g in decoder.groups), decoder.head_bytes()
    wanted = {
        (r["policy"], r["target_bits"]): r
        for r in found["rows"]
        if r["policy"] in ("rate-distortion", "static", "uniform") and r["memory_bits"] == 6
        and r.get("calibration") == "fused-sync" and r["text"] == "stdlib" and r["tokens"] == tokens
    }  # fmt: skip
    return [
        {
            "method": r["policy"], "setting": f"target {r['target_bits']:g}",
            "bits_per_weight": round((r["weight_bytes_per_token"] - head) * 8 / weights, 3),
            "perplexity": r["perplexity"], "tokens": r["tokens"],
        }
        for r in wanted.values()
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=102_000, help="as quality_vs_bits.py --tokens")
    parser.add_argument(
        "--peers", default=sys.executable, help="interpreter with llama-cpp-python, gguf, torchao"
    )
    args = parser.parse_args()
    run = begin(args)
    peers = Peers(heldout_windows(args.tokens).ids)
    rows = [peers.row("unquantised", "bfloat16", peers.matrices, peers.weights * 2)]
    for source in (peers.hqq(), peers.others(args.peers)):
        try:
            for row in source:
                rows.append(row)
                print(
                    f"{row['method']} {row['setting']}: {row['bits_per_weight']} bits, {row['perplexity']}",
                    flush=True,
                )
        except (ImportError, PeerError) as error:
            print(f"left out: {error}", file=sys.stderr)
    run.report("peer_quality", rows + ours(peers.tokens), measured_on="reference model")


if __name__ == "__main__":
    main()
