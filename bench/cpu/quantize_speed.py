"""How fast does quantisation go per core, and how much memory does it take?

Limit measured: (1) nested k-means alone, one thread, on Gaussian rows of real models' widths: sorting and
prefix sums in float64, so the limit is the core's arithmetic, not memory; the native kernel and its numpy definition
take turns; (2) the refinement of codes and tables, all threads, where products with the Hessian and coordinate descent
limit it: the native steps and torch's take turns; (3) `Quantizer` end to end on random weights of 3 layers of the 1.1B
shape in a fresh process: peak anonymous memory above the runtime's own, beside what the plan predicted (Linux only;
file-backed pages of the checkpoint can be dropped and do not count). The 8B figures are predictions from (1), and say
so.

    python -m bench.cpu.quantize_speed
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.common.report import arguments, begin, torch_instruction_set
from dpllm.kernels.cpu.quantising import quantiser_kernels
from dpllm.quant.descent import TorchSteps, steps_for
from dpllm.quant.kmeans import nested_codes
from dpllm.quant.refine import NestedMatrix, refine

REFINED = ((576, 576, 4), (1536, 576, 4), (576, 1536, 2), (512, 2048, 1))  # rows, columns, rows per table
SHAPES = ((1024, 2048), (512, 4096), (128, 14336))
LLAMA_3_8B = 6_979_321_856  # weights in its linear layers
REPEATS = 5


def kmeans_rows() -> list[dict]:
    """Million weights per second on one thread: median and slowest of REPEATS after a warm-up, in turns."""
    rows = []
    variants = {"native": quantiser_kernels(1), "numpy": None}
    rng = np.random.default_rng(0)
    for n, k in SHAPES:
        w = rng.standard_normal((n, k)).astype(np.float32)
        f = rng.random((n, k)).astype(np.float32) ** 4
        for bits in ((2, 6), (3, 6), (2, 8)):
            times: dict[str, list[float]] = {name: [] for name in variants}
            for i in range(REPEATS + 1):
                for name, kernels in variants.items():
                    began = time.perf_counter()
                    nested_codes(w, f, *bits, kernels)
                    if i:
                        times[name].append(time.perf_counter() - began)
            for name, taken in times.items():
                speed = n * k / statistics.median(taken)
                rows.append(
                    {
                        "what": f"nested k-means, 1 thread, {name}", "shape": f"{n}x{k}",
                        "bits": f"{bits[0]}-{bits[1]}",
                        "mweights_per_s": round(speed / 1e6, 2), "slowest": round(n * k / max(taken) / 1e6, 2),
                        "llama_3_8b_minutes_2_cores_predicted": round(LLAMA_3_8B / speed / 2 / 60, 1),
                    }
                )  # fmt: skip
    return rows


def refine_rows() -> list[dict]:
    """Million weights per second of refining codes and tables at 2 to 6 bits: median and slowest of 3, in turns."""
    rows, draw = [], torch.Generator().manual_seed(0)
    variants = {"native": steps_for(torch.device("cpu")), "torch": TorchSteps()}
    for n, k, share in REFINED:
        w = torch.randn(n, k, generator=draw)
        x = torch.randn(2 * k, k, generator=draw)
        flat = w.reshape(n // share, -1).numpy()
        codes, tables = nested_codes(flat, np.ones_like(flat), 2, 6, quantiser_kernels())
        found = {b: torch.from_numpy(t) for b, t in tables.items()}
        matrix = NestedMatrix(w, torch.ones(n), torch.from_numpy(codes).reshape(n, k), found, 6)
        times: dict[str, list[float]] = {name: [] for name in variants}
        for i in range(4):
            for name, steps in variants.items():
                began = time.perf_counter()
                refine(matrix, x.T @ x, steps=steps)
                if i:
                    times[name].append(time.perf_counter() - began)
        for name, taken in times.items():
            speed = n * k / statistics.median(taken)
            rows.append(
                {
                    "what": f"refinement, {torch.get_num_threads()} threads, {name}", "shape": f"{n}x{k}",
                    "bits": "2-6",
                    "mweights_per_s": round(speed / 1e6, 3), "slowest": round(n * k / max(taken) / 1e6, 3),
                    "llama_3_8b_minutes_2_cores_predicted": None,
                }
            )  # fmt: skip
    return rows


CHILD = """
import sys, json, threading, time
from pathlib import Path
from dpllm.quant.quantize import Quantizer
from dpllm.quant.quantize_plan import QuantizeOptions
from dpllm.quant.source import ModelSource
from dpllm.base.text import load_tokenizer, read_documents
from dpllm import reference
src, fisher = ModelSource.open(Path(sys.argv[1])), sys.argv[2] == "text"
docs = read_documents(reference.calibration_text()) if fisher else None
tok = load_tokenizer(reference.model_path()) if fisher else None
job = Quantizer(src, Path(sys.argv[1] + "-" + sys.argv[2]), QuantizeOptions(samples=4, sequence_length=128), documents=docs, tokenizer=tok)
import transformers.models.llama.modeling_llama, torch
torch.ones(256, 256) @ torch.ones(256, 256)
def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
base, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch); watcher.start()
t = time.perf_counter(); job.run(); seconds = time.perf_counter() - t
done.set(); watcher.join()
print(json.dumps({"peak": peak[0] - base, "planned": job.plan.peak_bytes, "seconds": seconds, "weights": job.weights_done}))
"""  # noqa: E501


def memory_rows() -> list[dict]:
    """Peak memory of a whole run, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=4096, hidden_size=2048, intermediate_size=8192, num_hidden_layers=3,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
        )  # fmt: skip
        path = Path(folder) / "model"
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
        layer = sum(p.numel() for p in LlamaForCausalLM(config).model.layers[0].parameters())
        for fisher in ("none", "text"):
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            run = subprocess.run(
                [sys.executable, "-c", CHILD, str(path), fisher], capture_output=True, text=True, env=env
            )
            if run.returncode:
                raise SystemExit(run.stderr)
            out = json.loads(run.stdout.splitlines()[-1])
            rows.append(
                {
                    "what": f"quantize end to end, --fisher {fisher}, 1 job",
                    "shape": "3 layers of 1.1B", "bits": "2-6",
                    "mweights_per_s": round(out["weights"] / out["seconds"] / 1e6, 2),
                    "peak_mb_above_runtime": round(out["peak"] / 1e6, 1), "planned_mb": round(out["planned"] / 1e6, 1),
                    "two_fp32_layers_and_embedding_mb": round((2 * layer + 4096 * 2048) * 4 / 1e6, 1),
                }
            )  # fmt: skip
    return rows


def main() -> None:
    run = begin(arguments(__doc__).parse_args())
    run.report(
        "quantize_speed",
        [*kmeans_rows(), *refine_rows()],
        instructions=torch_instruction_set(),
        measured_on="random weights",
    )
    run.report(
        "quantize_memory", memory_rows(), instructions=torch_instruction_set(), measured_on="random weights"
    )


if __name__ == "__main__":
    main()
