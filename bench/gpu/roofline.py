"""PREDICTION, not measurement: time per token of a decode step on GPUs that nobody ran it on.

A step is a row of launches. Each takes what its bytes take at a share of the published bandwidth, or what its
instructions take at the published clock with every scheduler issuing every cycle, whichever is longer, and a gap before
it. Bytes are counted as the decoder counts them; instructions per weight are of compiled code. Everything that a real
GPU adds (latency, clocks under load, bank conflicts) is missing, so the figures are bounds from below more than
forecasts; bench/gpu/gpu_decode.py writes what is really so, and its rows beside these show by how much this model errs.

    python -m bench.gpu.roofline [--shape 8B] [--context 1024]
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.common.report import arguments, begin
from bench.gpu.gpu_devices import DEVICES, Device
from dpllm.kernels.weight import MAX_TABLE_BITS
from dpllm.model.config import ModelConfig
from dpllm.model.random_models import SHAPES, shape

CODE = (
    Path(__file__).resolve().parents[2] / "tests" / "support" / "gpu_code.json"
)  # of compiled kernels, checked by the tests
# Whose code a device runs, of the targets in CODE. Code for sm_86 is that for sm_87 but for its padding.
TARGETS = {
    "H200 SXM": 90, "A100 SXM 80GB": 80, "RTX 5090": 120, "RTX 4090": 89, "RTX 4060 Ti": 89, "RTX 3090": 87,
    "Jetson AGX Orin 64GB": 87, "Jetson Orin Nano Super 8GB": 87,
}  # fmt: skip
HEAD = 0  # in place of a width: the int8 head
DENSE = 1.0  # instructions per weight of fp16 products: loads and multiply-adds
LANES = 128  # that a multiprocessor issues to in a cycle
ATTAINED = 0.9  # of the published bandwidth, by long reads
GAP_US = 1.2  # between launches of a graph that wait for each other
BITS: tuple[float, ...] = (2, 3, 3.5, 4, 5, 6, 8)


@dataclass(frozen=True)
class Launch:
    """Bytes read, and instructions of all threads."""

    nbytes: float
    instructions: float = 0.0


def instructions_per_weight(target: int) -> dict[int, float]:
    """Of the main loop of each width's product compiled for a target, loads of weights and input included; HEAD: of the
    head's."""
    found = json.loads(CODE.read_text())["rows"]
    names = {HEAD: "int8 head", **{b: f"gemv {b}" for b in range(2, 9)}}
    return {b: found[f"{name} sm_{target}"]["per_weight"] for b, name in names.items()}


def product(rows: int, columns: int, bits: float, per_weight: dict[int, float]) -> Launch:
    """A matrix with a table for each row, at a width between two whole ones as their mixture; 16: fp16."""
    if bits == 16:
        return Launch(2.0 * rows * columns, DENSE * rows * columns)
    low, share = int(bits), bits - int(bits)

    def at(b: int) -> tuple[float, float]:
        table = rows * 2 ** min(b, MAX_TABLE_BITS) * 2
        return rows * columns * b / 8 + table, per_weight[b] * rows * columns

    a, b = at(low), at(low + 1) if share else at(low)
    return Launch(*((1 - share) * x + share * y for x, y in zip(a, b, strict=True)))


def step(c: ModelConfig, bits: float, context: int, per_weight: dict[int, float]) -> list[Launch]:
    """Every launch of a decode step after `context` tokens of half-precision pairs."""
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    h, inner = c.hidden_size, c.intermediate_size
    small = Launch(8.0 * h)
    layer = [
        small, product(q + 2 * kv, h, bits, per_weight), Launch(4.0 * kv * context), small,
        product(h, q, bits, per_weight), small, product(2 * inner, h, bits, per_weight), Launch(6.0 * inner),
        product(h, inner, bits, per_weight),
    ]  # fmt: skip
    head = c.vocab_size * h
    last = Launch(2.0 * head, DENSE * head) if bits == 16 else Launch(head, per_weight[HEAD] * head)
    return [small] * 4 + layer * c.num_layers + [small, last, small]


def predicted_ms(device: Device, launches: list[Launch]) -> dict[str, float]:
    """ms: the step's time; and what of it is bytes, instructions beyond them, and gaps."""
    by_bytes = [x.nbytes / (ATTAINED * device.gb_per_s * 1e9) for x in launches]
    issued = device.multiprocessors * LANES * device.ghz * 1e9
    longer = [max(0.0, x.instructions / issued - t) for x, t in zip(launches, by_bytes, strict=True)]
    gaps = len(launches) * GAP_US * 1e-6
    total = sum(by_bytes) + sum(longer) + gaps
    parts = {"ms": total, "bytes": sum(by_bytes), "instructions": sum(longer), "gaps": gaps}
    return {k: v * 1e3 for k, v in parts.items()}


def table(name: str, context: int) -> list[dict[str, Any]]:
    """A row for each device and width; 16 is the fp16 model."""
    c, rows = shape(name), []
    for device in DEVICES:
        counts = instructions_per_weight(TARGETS[device.name])
        base = predicted_ms(device, step(c, 16, context, counts))["ms"]
        for bits in (16, *BITS):
            launches = step(c, bits, context, counts)
            p = predicted_ms(device, launches)
            rows.append(
                {
                    "kind": "prediction", "device": device.name, "code": f"sm_{TARGETS[device.name]}",
                    "shape": name, "bits": bits, "context": context,
                    "gb_read": round(sum(x.nbytes for x in launches) / 1e9, 3),
                    "predicted_tpot_ms": round(p["ms"], 3), "of_it_bytes_ms": round(p["bytes"], 3),
                    "of_it_instructions_ms": round(p["instructions"], 3), "of_it_gaps_ms": round(p["gaps"], 3),
                    "times_fp16": round(base / p["ms"], 3),
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    run = begin(args)
    assumed = {
        "attained_bandwidth": ATTAINED,
        "gap_us": GAP_US,
        "instructions_per_weight": {
            f"sm_{t}": instructions_per_weight(t) for t in sorted({*TARGETS.values()})
        },
    }
    run.report(
        "roofline", table(args.shape, args.context), device="prediction", hardware="prediction: nothing was run",
        instructions="prediction: nothing was run", kind="prediction", assumed=assumed,
        published=[asdict(d) for d in DEVICES],
    )  # fmt: skip


if __name__ == "__main__":
    main()
