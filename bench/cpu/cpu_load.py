"""How long until a stored model can decode, and what it holds in memory.

Limits measured: (1) seconds of `load_decoder` from a warm page cache, every tensor's sha256 checked, against a plain
parallel read of the same bytes; (2) bytes held for matrices against planes + tables in use. Random weights at a named
shape, stored as a real overlay (planes 2..6) under .cache/; no figure of quality.

    python -m bench.cpu.cpu_load [--shape 1.1B] [--rounds 5]
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bench.common.report import arguments, begin
from dpllm.model.decoder import Decoder
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.model.random_models import shape
from dpllm.quant.quantize import Quantizer
from dpllm.quant.quantize_plan import QuantizeOptions
from dpllm.quant.source import ModelSource

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "overlays"


class RandomCodes(Quantizer):
    """Stores random codes and sorted normal tables: clustering would change no size and no time of loading."""

    def _nested(self, w: np.ndarray, f: np.ndarray, bits: tuple[int, int]):
        rng = np.random.default_rng(self.weights_done)
        codes = rng.integers(0, 1 << bits[1], w.shape, dtype=np.uint8)
        tables = {
            b: np.sort(rng.standard_normal((len(w), 1 << b)), axis=1).astype(np.float16)
            for b in range(bits[0], min(bits[1], 6) + 1)
        }
        return codes, tables


def stored_overlay(name: str) -> Path:
    """An overlay of this shape, made once."""
    out = CACHE / name
    if out.is_dir():
        return out
    from transformers import LlamaConfig, LlamaForCausalLM

    c = shape(name)
    print(f"making a random overlay of shape {name} in {out}", file=sys.stderr)
    checkpoint = CACHE / f"{name}-checkpoint"
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).to_empty(device="cpu").apply(
        lambda m: [p.data.fill_(0.01) for p in m.parameters(False)]
    )
    model.save_pretrained(checkpoint)
    del model
    RandomCodes(ModelSource.open(checkpoint), out, QuantizeOptions(), documents=None).run()
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
    return out


def read_seconds(path: Path) -> float:
    """A plain read of every shard, one after the other."""
    began = time.perf_counter()
    for shard in sorted(path.glob("*.safetensors")):
        with shard.open("rb", buffering=0) as file:
            room = bytearray(16 << 20)
            while file.readinto(room):
                pass
    return time.perf_counter() - began


def held(decoder: Decoder) -> tuple[int, int]:
    """(bytes held for matrices, bytes of planes and float16 tables they were stored as)."""
    weights = [g.weight for g in decoder.groups]
    stored = 0
    for w in weights:
        tables = sum(2 * t.numel() // 2 for t in w.tables.values())  # two digits an entry, two bytes stored
        stored += w.planes.numel() * 4 + tables
    return sum(w.held_bytes for w in weights), stored


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="1.1B")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    run = begin(args)
    path = stored_overlay(args.shape)
    rows = []
    for bits in (6, 4, 3):
        times, reads = [], []
        for _ in range(args.rounds + 1):  # the first warms the page cache
            reads.append(read_seconds(path))
            began = time.perf_counter()
            decoder = load_decoder(path, LoadOptions(resident_bits=bits))
            times.append(time.perf_counter() - began)
            memory, stored = held(decoder)
            read = decoder.bytes_read
            del decoder
        rows.append(
            {
                "shape": args.shape, "resident_bits": bits, "mb_read": round(read / 1e6, 1),
                "load_s_p50": round(statistics.median(times[1:]), 3), "load_s_p90": round(sorted(times[1:])[-1], 3),
                "plain_read_of_all_shards_s_p50": round(statistics.median(reads[1:]), 3),
                "matrices_held_mb": round(memory / 1e6, 1), "planes_and_tables_mb": round(stored / 1e6, 1),
                "overhead": round(memory / stored - 1, 4),
            }
        )  # fmt: skip
    run.report("cpu_load", rows, measured_on="random weights", threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
