"""`dpllm quantize`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from dpllm.base.errors import InputError
from dpllm.base.text import load_tokenizer, read_documents
from dpllm.commands.common import check_device, default_text, note, parse_bits, print_json, stage_bars
from dpllm.model.loading import check_checkpoint
from dpllm.quant.overlay import Overlay
from dpllm.quant.quantize import Quantizer
from dpllm.quant.quantize_plan import QuantizeOptions, llama_3_8b, multiply_adds_per_second
from dpllm.quant.source import ModelSource, resolve_model


def run(
    model: str, out: str, bits: str, head_bits: int, fisher: str, refine: str, data: str | None,
    samples: int, sequence_length: int, rows_per_table: int, device: str, jobs: int, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Quantises and reports size, time and speed."""
    options = QuantizeOptions(
        parse_bits(bits), head_bits, rows_per_table, samples, sequence_length, seed, refine
    )
    if fisher not in ("text", "none"):
        raise InputError(f"--fisher {fisher} is unknown. Use 'text' or 'none'.")
    source_path = resolve_model(model)
    source = ModelSource.open(source_path)
    if "quantization_config" in source.config:
        raise InputError(f"{source_path} is quantised already. Give the original checkpoint.")
    check_checkpoint(source)
    documents = read_documents(default_text(data)) if fisher == "text" else None
    tokenizer = load_tokenizer(source_path) if documents else None
    workers = jobs or os.cpu_count() or 1
    job = Quantizer(
        source, Path(out).expanduser(), options, documents=documents, tokenizer=tokenizer,
        device=check_device(device), jobs=workers,
    )  # fmt: skip
    weights = sum(n * k for n, k in job.plan.linears.values())
    note(
        f"{weights / 1e6:.1f} M weights in {len(job.plan.linears)} matrices -> {job.plan.output_bytes / 1e6:.1f} MB; "
        f"peak memory about {job.plan.peak_bytes / 1e6:.0f} MB above the runtime, "
        f"scratch {job.plan.work_bytes / 1e6:.0f} MB"
    )
    if job.plan.refine_products and job.model.device == "cpu":
        hours = job.plan.refine_products / multiply_adds_per_second() / 3600
        if hours > 0.1:
            note(
                f"refinement will take about {hours:.1f} h on this CPU (--refine tables: a quarter; none: none)"
            )
    began = time.perf_counter()
    with stage_bars() as progress:
        path = job.run(progress)
    seconds = time.perf_counter() - began
    overlay = Overlay.open(path)
    stored = overlay.stored_bytes()
    speed = job.weights_done / job.seconds["k-means"] / workers if job.weights_done else 0.0
    note(
        f"{path}: {sum(stored.values()) / 1e6:.1f} MB in {seconds:.1f} s "
        f"(k-means {speed / 1e6:.2f} M weights/s per thread, gradients {job.seconds['fisher']:.1f} s, "
        f"refinement {job.seconds['refine']:.1f} s)"
    )
    if job.weights_done:
        note(llama_3_8b(options, job.seconds, job.weights_done, documents is not None))
    note(f"next: dpllm calibrate {path}")
    if as_json:
        result = {
            "overlay": str(path), "hash": overlay.hash, "bits": list(overlay.bits), "weights": weights,
            "stored_bytes": stored, "seconds": round(seconds, 2), "weights_per_s_per_thread": round(speed),
        }  # fmt: skip
        print_json(result)
