"""`dpllm quantize`: makes an overlay from a checkpoint, one decoder layer at a time.

Work happens in a sibling directory `OUT.partial`. Each finished layer is a finished shard there, so a killed run
continues after the last finished layer, with a byte-identical result. The manifest is written last, and then the
directory is renamed into place. Only one process works on a place at a time (dpllm/base/locks.py), and a run with other
options leaves the work of an unfinished one alone (dpllm/base/unfinished.py).
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpllm.base.errors import InputError
from dpllm.base.files import flush_folder, write_tensors, write_text
from dpllm.base.locks import only_writer
from dpllm.base.machine import available_bytes
from dpllm.base.places import check_space, folder_to_make
from dpllm.base.progress import Progress, no_progress
from dpllm.base.text import check_tokens, documents_sha256, sample_sequences
from dpllm.base.unfinished import UnfinishedWork
from dpllm.kernels.cpu.quantising import quantiser_kernels
from dpllm.kernels.weight import pack
from dpllm.quant.descent import steps_for
from dpllm.quant.fisher import FisherPass
from dpllm.quant.gguf.imatrix import ImportanceMatrix
from dpllm.quant.kmeans import BLOCK_WEIGHTS, nested_codes
from dpllm.quant.layerwise import LayerwiseModel
from dpllm.quant.overlay import (
    FORMAT_VERSION,
    QUANT_METHOD,
    LinearLayout,
    file_sha256,
    manifest_sha256,
    tensor_sha256,
)
from dpllm.quant.quantize_plan import QuantizeOptions, default_rows_per_table, plan_quantize
from dpllm.quant.refine import NestedMatrix, RefineOptions, refine
from dpllm.quant.source import INDEX, TOKENIZER_FILES, ModelSource, TensorFile


class Quantizer:
    """One quantisation job. `run` does all of it.

    seconds: time that this run spent in each stage. weights_done: weights that this run quantised; a run that continues
    an earlier one quantises only the rest.
    """

    def __init__(
        self,
        source: ModelSource,
        out: Path,
        options: QuantizeOptions,
        *,
        documents: Sequence[str] | None,
        tokenizer: Any = None,
        device: str = "cpu",
        jobs: int = 1,
        importance: ImportanceMatrix | None = None,
        restart: bool = False,
    ):
        """documents: calibration text for the Fisher pass; None for unweighted k-means. jobs: threads of k-means.

        importance: weights of columns in k-means, where there is no Fisher pass. restart: delete the unfinished work
        of a job with other options. Raises InputError for a checkpoint or options that cannot be used, and where the
        checkpoint, the text and the tokenizer do not fit together.
        """
        self.options, self.out, self.jobs, self.restart = options, out, jobs, restart
        self.source = source
        self.model = LayerwiseModel(source, device)
        self.target = Path(os.path.realpath(out))  # a link stays, and the place that it leads to is written
        self.work = UnfinishedWork(self.target)
        self.partial, self.scratch = self.work.folder, self.work.state
        self.documents, self.tokenizer = documents, tokenizer
        self.plan = plan_quantize(self.model, options, documents is not None)
        self.sequences = self._sample() if documents is not None else None
        self.importance = importance
        if importance is not None:
            importance.check(self.plan.linears)
        self.seconds = {"fisher": 0.0, "k-means": 0.0, "refine": 0.0}
        self.weights_done = 0

    def run(self, progress: Progress = no_progress) -> Path:
        """Quantises everything and returns the overlay's directory.

        Raises InputError if `out` exists or is being made by another process, if unfinished work of other options is
        there, if disk or memory are too small, or if a tensor of the checkpoint cannot be used.
        """
        folder_to_make(self.out)
        with only_writer(self.target):
            folder_to_make(self.out)  # whoever held the lock before may have finished it
            self._check_memory()
            check_space(self.target.parent, self._needed_bytes(), self.work.held_bytes())
            self.work.begin(self._job(), restart=self.restart)
            _map_large_blocks()
            return self._run(progress)

    def _run(self, progress: Progress) -> Path:
        fisher = self._fisher_forward(progress)
        depth = len(self.model)
        for index in range(depth - 1, -1, -1):
            if not self._shard(index).exists() or (fisher and not self._mark(index).exists()):
                with self._timed("fisher"):
                    weights = fisher.backward(index) if fisher else {}
                tensors = self._layer_tensors(index, weights, fisher.hessians if fisher else {})
                write_tensors(self._shard(index), tensors)
                if fisher:
                    fisher.keep_gradient(index)
                    self._costs(index).write_text(json.dumps(fisher.int8_nats))
                    self._mark(index).touch()
                    fisher.drop_gradient(index + 1)
            progress("quantize", depth - index, depth + 1)
        if not self._shard(depth).exists():
            write_tensors(self._shard(depth), self._other_tensors())
        progress("quantize", depth + 1, depth + 1)
        self._finish()
        return self.out

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began

    # -- stages ----------------------------------------------------------------------------------------

    def _needed_bytes(self) -> int:
        return self.plan.output_bytes + self.plan.work_bytes

    def _check_memory(self) -> None:
        """Raises InputError where the predicted peak exceeds the memory that this process can still get."""
        free = available_bytes()
        if free is not None and self.plan.peak_bytes > free:
            way_out = "--refine none or fewer --samples" if self.documents is not None else "a smaller model"
            raise InputError(
                f"quantising {self.source.path} needs about {self.plan.peak_bytes / 1e9:.2f} GB of memory; "
                f"{free / 1e9:.2f} GB are free. Free some memory, or use {way_out}."
            )

    def _job(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        return {
            "format_version": FORMAT_VERSION,
            "options": asdict(self.options) | {"fisher": "none" if self.documents is None else "text"},
            "calibration_text": documents_sha256(self.documents) if self.documents else None,
            "model_config": self.source.config,
            "model_files": {p.name: _fingerprint(p) for p in self._inputs()},
            **self._imatrix(),
        }

    def _inputs(self) -> list[Path]:
        """The files that the result depends on."""
        shards = {f.path for f in self.source.files.values()}
        side = {self.source.path / name for name in TOKENIZER_FILES}
        return sorted(shards | {p for p in side if p.is_file()})

    def _shard(self, index: int) -> Path:
        return self.partial / f"model-{index + 1:05d}-of-{len(self.model) + 1:05d}.safetensors"

    def _mark(self, index: int) -> Path:
        """The file that exists when a layer's shard and the gradient below the layer are both on disk."""
        return self.scratch / f"done-{index:04d}"

    def _costs(self, index: int) -> Path:
        """The file with the cost of int8 activations at each of a layer's matrices."""
        return self.scratch / f"int8-{index:04d}.json"

    def _int8_nats(self) -> dict[str, float] | None:
        """Nats per token that int8 activations cost at each matrix; None where not all were measured.

        That is so without a text, and where an older dpllm has begun the job.
        """
        files = [self._costs(i) for i in range(len(self.model))]
        if not all(file.exists() for file in files):
            return None
        return {name: nats for file in files for name, nats in json.loads(file.read_text()).items()}

    def _sample(self) -> torch.Tensor:
        """The calibration text as tokens int64 [S, T] that the model knows."""
        o = self.options
        assert self.documents is not None
        sequences = sample_sequences(self.documents, self.tokenizer, o.samples, o.sequence_length, o.seed)
        check_tokens(sequences.flatten().tolist(), self.model.config.vocab_size, self.source.path)
        return sequences

    def _fisher_forward(self, progress: Progress) -> FisherPass | None:
        if self.sequences is None or all(self._mark(i).exists() for i in range(len(self.model))):
            return None
        guided = self.options.refine != "none"
        work = self.scratch / "work"
        fisher = FisherPass(self.model, self.sequences, work, diagonal=not guided, guided=guided)
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            progress("fisher", done, len(self.model))

        with self._timed("fisher"):
            fisher.forward(tick)
        return fisher

    def _layer_tensors(
        self, index: int, fisher: dict[str, torch.Tensor], hessians: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        prefix = self.model.layer_prefix(index) + "."
        linears = self.model.linears(index)
        tensors: dict[str, torch.Tensor] = {}
        for name in linears:
            weight = self.model.source.read(f"{name}.weight")
            hessian = hessians.pop(name, None)
            weights = fisher.pop(name, None)
            if self.importance is not None:
                weights = self.importance.weights(name, len(weight))
            tensors |= self.quantize_matrix(name, weight, weights, self.options.bits, hessian)
        quantized = {f"{n}.weight" for n in linears}
        for name in self.model.source.names():
            if name.startswith(prefix) and name not in quantized:
                tensors[name] = self.model.source.read(name)
        return tensors

    def _other_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors outside the decoder layers: embedding, final norm, and the head at its own width."""
        tensors = {}
        source, layers = self.model.source, self.model.layers_name + "."
        head_bits, head = self.options.head_bits, self.model.head_weight()
        replaced = set() if head_bits == 16 else {f"{self.model.head_name}.weight"}
        if head_bits == 8 and self.model.tied:
            replaced.add(head)  # one int8 matrix is used for both the embedding and the head
        for name in source.names():
            if not name.startswith(layers) and name not in replaced:
                tensors[name] = source.read(name)
        if head_bits == 8:
            tensors |= quantize_int8("lm_head", source.read(head))
        elif head_bits < 8:
            bits = (min(head_bits, 2), head_bits)
            tensors |= self.quantize_matrix("lm_head", source.read(head), None, bits)
        return tensors

    def quantize_matrix(
        self, name: str, weight: torch.Tensor, fisher: torch.Tensor | None, bits: tuple[int, int],
        hessian: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Planes, tables and scales of one matrix, ready to be stored.

        weight: [N, K]. fisher: [N, K], weights of the k-means (None: uniform). hessian: float32 [K, K]: its diagonal
        weighs the k-means, and the result is refined with it (None: it is not). The diagonal leads to less error after
        the refinement than the Fisher does (docs/log.md). Raises InputError for a value beyond float16.
        """
        n, k = weight.shape
        self.weights_done += n * k
        share = self.options.rows_per_table or default_rows_per_table(n, k)
        w = weight.float().numpy()
        weights = torch.ones(()) if fisher is None else fisher.float()
        if hessian is not None:
            weights = hessian.diagonal().float().cpu()
        f = np.broadcast_to(weights.numpy(), w.shape)
        scale = None
        if share > 1:
            scale, w, f = normalise_rows(w, f)
        with np.errstate(over="ignore"):
            representable = np.isfinite(w.astype(np.float16)).all()
        if not representable:
            raise InputError(
                f"'{name}' holds a value beyond float16 ({np.abs(w).max():.3g}); it cannot be stored."
            )
        with self._timed("k-means"):
            codes, tables = self._nested(w.reshape(n // share, -1), f.reshape(n // share, -1), bits)
        codes = codes.reshape(n, k)
        if hessian is not None:
            with self._timed("refine"):
                codes, tables = self._refined(w, scale, codes, tables, hessian)
        planes = pack(codes, bits[1])
        out = {f"{name}.planes.{p}": planes[p].clone() for p in range(bits[1])}
        out |= {f"{name}.lut.{b}": torch.from_numpy(t) for b, t in tables.items()}
        if scale is not None:
            out[f"{name}.scale"] = torch.from_numpy(scale)
        return out

    def _refined(
        self, w: np.ndarray, scale: np.ndarray | None, codes: np.ndarray, tables: dict[int, np.ndarray],
        hessian: torch.Tensor,
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:  # fmt: skip
        """Codes uint8 [N, K] and tables with less error in the layer's output (refine.py)."""
        matrix = NestedMatrix(
            torch.from_numpy(np.ascontiguousarray(w)),
            torch.ones(len(w)) if scale is None else torch.from_numpy(scale).float(),
            torch.from_numpy(codes),
            {b: torch.from_numpy(t) for b, t in tables.items()},
            self.options.bits[1],
        )
        options = RefineOptions(codes=self.options.refine == "full")
        hessian = hessian.to(self.model.device)
        found = refine(matrix, hessian, options, steps_for(hessian.device, self.jobs))
        return found.codes.numpy(), {b: t.numpy() for b, t in found.tables.items()}

    def _nested(self, w: np.ndarray, f: np.ndarray, bits: tuple[int, int]):
        """Runs nested_codes on `jobs` threads. The result does not depend on their number."""
        kernels = quantiser_kernels(self.jobs)
        if kernels is not None or self.jobs == 1:
            return nested_codes(w, f, *bits, kernels)
        step = max(1, 4 * BLOCK_WEIGHTS // w.shape[1])
        blocks = [slice(i, i + step) for i in range(0, len(w), step)]
        with ThreadPoolExecutor(self.jobs) as pool:
            parts = list(pool.map(lambda s: nested_codes(w[s], f[s], *bits), blocks))
        tables = {b: np.concatenate([t[b] for _, t in parts]) for b in parts[0][1]}
        return np.concatenate([c for c, _ in parts]), tables

    def _finish(self) -> None:
        """Writes config, tokenizer files and, last, the manifest. Then renames the directory."""
        for name in TOKENIZER_FILES:
            if (self.source.path / name).is_file():
                shutil.copyfile(self.source.path / name, self.partial / name)
        shards = [self._shard(i) for i in range(len(self.model) + 1)]
        tensors = {}
        for shard in shards:
            file = TensorFile(shard)
            for name in file.names():
                t = file.read(name)
                tensors[name] = {
                    "file": shard.name,
                    "shape": list(t.shape),
                    "dtype": str(t.dtype).removeprefix("torch."),
                    "nbytes": t.numel() * t.element_size(),
                    "sha256": tensor_sha256(t),
                }
        config = self.source.config | {"quantization_config": self._quantization_config(tensors)}
        write_text(self.partial / "config.json", json.dumps(config, indent=2) + "\n")
        shutil.rmtree(self.scratch / "work", ignore_errors=True)
        side = sorted(
            p.name for p in self.partial.iterdir() if p.is_file() and p not in shards and p.name != INDEX
        )
        manifest: dict[str, Any] = {
            "metadata": {"total_size": sum(t["nbytes"] for t in tensors.values())},
            "weight_map": {n: t["file"] for n, t in tensors.items()},
            "tensors": tensors,
            "files": {name: file_sha256(self.partial / name) for name in side},
        }
        manifest["sha256"] = manifest_sha256(manifest)
        write_text(self.partial / INDEX, json.dumps(manifest, indent=0) + "\n")
        self._put_into_place()

    def _put_into_place(self) -> None:
        """Renames the finished directory. Raises InputError, and keeps it, where something else has taken its place."""
        try:
            self.partial.replace(self.target)
        except OSError as e:
            raise InputError(
                f"{self.out} cannot be made: {e.strerror or e}. The finished work is in {self.partial}. Clear the "
                "place and give the same command again."
            ) from None
        flush_folder(self.target.parent)
        shutil.rmtree(self.target / self.scratch.name, ignore_errors=True)

    def _quantization_config(self, tensors: dict[str, Any]) -> dict[str, Any]:
        o, model = self.options, self.model
        shapes = dict(self.plan.linears)
        bits = dict.fromkeys(shapes, o.bits)
        if o.head_bits < 8:
            n, k = model.source.shape(model.head_weight())
            shapes["lm_head"] = (n, k)
            bits["lm_head"] = (min(o.head_bits, 2), o.head_bits)
        linears = {
            name: {
                "shape": list(shape),
                "bits": list(bits[name]),
                "rows_per_table": o.rows_per_table or default_rows_per_table(*shape),
            }
            for name, shape in shapes.items()
        }
        ours = {t for n, e in linears.items() for t in LinearLayout.of(n, e).tensors(n)}
        plain = sorted(set(tensors) - ours)
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "codebook": "lut",
            "bits": list(o.bits),
            "head_bits": o.head_bits,
            "linears": linears,
            "plain_tensors": plain,
            "unquantized": {n: _why_plain(n, model) for n in plain if ".int8" not in n and n != "lm_head.scale"},
            "refine": "none" if self.documents is None else o.refine,
            "int8_nats": self._int8_nats(),
            "fisher": None if self.documents is None else {
                "documents_sha256": documents_sha256(self.documents),
                "samples": o.samples, "sequence_length": o.sequence_length, "seed": o.seed,
            },
            **self._imatrix(),
        }  # fmt: skip

    def _imatrix(self) -> dict[str, str]:
        return {} if self.importance is None else {"imatrix_sha256": self.importance.sha256}


def _why_plain(name: str, model: LayerwiseModel) -> str:
    if name == f"{model.embedding_name}.weight":
        return "embedding: a token reads one row of it"
    if name == f"{model.head_name}.weight":
        return "head: left at 16 bits on request"
    return "vector: too small to matter"


def normalise_rows(w: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normalises rows that share a table: (scale float16 [N], rows at unit RMS [N, K], k-means weights [N, K])."""
    rms = np.sqrt((w.astype(np.float64) ** 2).mean(1))
    scale = np.clip(rms, 0, 65504).astype(np.float16)
    used = (scale > 0)[:, None]  # a row of zeros must not pull the shared table towards zero
    safe = np.where(used, scale[:, None], 1).astype(np.float32)
    return scale, np.where(used, w / safe, 0), np.where(used, f * safe**2, 0)


def quantize_int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Symmetric int8 values [N, K] with one float16 scale per row. Raises InputError for a value beyond float16."""
    w = weight.float()
    scale = (w.abs().amax(1) / 127).clamp(min=1e-7).to(torch.float16)
    if not torch.isfinite(scale).all():
        raise InputError(f"'{name}' holds a value beyond float16; it cannot be stored.")
    values = (w / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {f"{name}.int8": values, f"{name}.scale": scale}


def _map_large_blocks() -> None:
    """Makes glibc return freed matrices to the system; does nothing with another C library.

    glibc's heap keeps freed blocks of up to 32 MB, and their fragments tripled the peak of memory.
    """
    with suppress(OSError, AttributeError):
        m_mmap_threshold = -3  # malloc.h
        ctypes.CDLL("libc.so.6").mallopt(m_mmap_threshold, 8 << 20)


def _fingerprint(path: Path) -> list[int]:
    """A file's size and time of change, which show that a checkpoint was replaced between two runs."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
