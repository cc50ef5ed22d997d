"""Stores a model as an overlay of nested bitplanes.

path = quantize("meta-llama/Llama-3.2-1B", "llama-1b")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dpllm.base.errors import InputError
from dpllm.base.machine import usable_cores
from dpllm.base.places import folder_to_make
from dpllm.base.progress import Progress, no_progress
from dpllm.base.text import load_tokenizer
from dpllm.model.config import ModelConfig
from dpllm.model.hardware import check_device
from dpllm.model.loading import is_overlay
from dpllm.prepare.data import calibration_documents
from dpllm.quant.gguf.imatrix import ImportanceMatrix
from dpllm.quant.quantize import Quantizer
from dpllm.quant.quantize_plan import QuantizeOptions
from dpllm.quant.resolve import resolve_model
from dpllm.quant.source import ModelSource


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    bits: tuple[int, int] = (2, 6),
    head_bits: int = 8,
    fisher: str = "text",
    imatrix: str | Path | None = None,
    refine: str = "full",
    data: str | Path | None = None,
    samples: int = 64,
    sequence_length: int = 512,
    rows_per_table: int = 0,
    device: str = "cpu",
    jobs: int = 0,
    seed: int = 0,
    restart: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Stores a model as nested bitplanes that can be read at every width of a range. Returns the overlay's directory.

    A run that is stopped continues where it was when it is called again with the same arguments.

    model: a directory with safetensors, a GGUF file, or a hub id. out: the directory to make; it must not exist.
    bits: the narrowest and the widest stored width, within 2..8. head_bits: the width of lm_head; 8 is int8, 2..7 are
    planes, 16 leaves it alone. fisher: 'text' weights errors by the gradient of the loss, 'none' uses plain k-means,
    or the importance of columns in `imatrix`, a file of llama.cpp. refine: what is improved after k-means, 'full'
    (codes and tables), 'tables' or 'none'. data: the text to calibrate on; None is the bundled Python code. samples,
    sequence_length: how many sequences of how many tokens. rows_per_table: rows that share a table; 0 is 1, or more
    where rows are short. jobs: threads; 0 is one per core. seed: of the sample. restart: delete the unfinished work of
    a run with other arguments. progress: called with (stage, done, total).

    Raises InputError for a model, a place or an option that cannot be used, and where another process is making `out`.
    """
    options = QuantizeOptions(
        bits=bits, head_bits=head_bits, rows_per_table=rows_per_table, samples=samples,
        sequence_length=sequence_length, seed=seed, refine=refine,
    )  # fmt: skip
    job = make_quantizer(
        model,
        out,
        options=options,
        fisher=fisher,
        imatrix=imatrix,
        data=data,
        device=device,
        jobs=jobs,
        restart=restart,
    )
    return job.run(progress or no_progress)


def make_quantizer(
    model: str | Path,
    out: str | Path,
    *,
    options: QuantizeOptions,
    fisher: str = "text",
    imatrix: str | Path | None = None,
    data: str | Path | None = None,
    device: str = "cpu",
    jobs: int = 0,
    tell: Callable[[str], None] = lambda line: None,
    restart: bool = False,
) -> Quantizer:
    """The job of `quantize`, checked and planned; no weight has been read yet. Its `plan` says what it will cost.

    The arguments are those of `quantize`. tell: told what takes a while. Raises InputError for a model or an option
    that cannot be used.
    """
    if fisher not in ("text", "none"):
        raise InputError(f"fisher '{fisher}' is unknown. Use 'text' or 'none'.")
    if imatrix is not None and fisher != "none":
        raise InputError("an imatrix stands in for gradients: give it with --fisher none.")
    device, place = check_device(device), Path(out).expanduser()
    folder_to_make(place)
    path = resolve_model(str(model), tell)
    if is_overlay(path):
        raise InputError(f"{path} is quantised already. Give the original checkpoint.")
    ModelConfig.read(path)  # what the decoder cannot run is not stored
    source = ModelSource.open(path)
    documents = calibration_documents(data) if fisher == "text" else None
    return Quantizer(
        source, place, options, documents=documents, tokenizer=load_tokenizer(path) if documents else None,
        device=device, jobs=jobs or usable_cores(), restart=restart,
        importance=None if imatrix is None else ImportanceMatrix.read(Path(imatrix).expanduser()),
    )  # fmt: skip
