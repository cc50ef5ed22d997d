"""Options of a quantisation, and its size, memory and time, before any weight is read."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpllm.base.errors import InputError
from dpllm.kernels.weight import MAX_BITS, MAX_TABLE_BITS, MIN_BITS
from dpllm.quant.layerwise import LayerwiseModel
from dpllm.quant.overlay import LinearLayout
from dpllm.quant.refine import RefineOptions, multiply_adds, working_bytes

# The linear layers of one of its 32 decoder layers, [N, K]: q, k, v, o, gate, up, down.
LLAMA_3_8B_SHAPES = (
    (4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336),
)  # fmt: skip
LLAMA_3_8B_LAYER = sum(n * k for n, k in LLAMA_3_8B_SHAPES)
REFINEMENTS = ("none", "tables", "full")
TABLE_WEIGHTS = 2048  # with fewer weights per table, tables would take a large part of the bytes


@dataclass(frozen=True)
class QuantizeOptions:
    """What to store.

    bits: the narrowest and the widest width. head_bits: 16 leaves the head unquantised, 8 makes it plain int8, 2..7
    make planes of that width. samples, sequence_length, seed: of the calibration text for the Fisher pass.
    """

    bits: tuple[int, int] = (2, 6)
    head_bits: int = 8
    rows_per_table: int = 0  # 0: enough to give a table TABLE_WEIGHTS weights
    samples: int = 64
    sequence_length: int = 512
    seed: int = 0
    refine: str = "full"  # after k-means with calibration text: "none", "tables" or "full" (tables and codes)

    def __post_init__(self) -> None:
        lo, hi = self.bits
        if not MIN_BITS <= lo <= hi <= MAX_BITS or lo > MAX_TABLE_BITS:
            raise InputError(
                f"--bits {lo}-{hi} is not possible: the range lies within {MIN_BITS}-{MAX_BITS} and starts at "
                f"{MAX_TABLE_BITS} at most. The default is 2-6."
            )
        if self.head_bits not in (2, 3, 4, 5, 6, 7, 8, 16):
            raise InputError(
                f"--head-bits {self.head_bits} is not possible. Choose 2..8, or 16 to leave it unquantised."
            )
        if self.samples < 1 or self.sequence_length < 16:
            raise InputError("at least one sample of at least 16 tokens is needed for the Fisher pass.")
        if self.refine not in REFINEMENTS:
            raise InputError(f"--refine {self.refine} is unknown. Use {', '.join(REFINEMENTS)}.")


@dataclass(frozen=True)
class QuantizePlan:
    """Size and cost of quantising one model, in bytes.

    other_bytes: embedding and head on disk. output_bytes: the whole overlay. peak_bytes: memory above the runtime's.
    work_bytes: scratch files.
    """

    linears: dict[str, tuple[int, int]]  # name -> (N, K), decoder layers only
    other_bytes: int
    output_bytes: int
    peak_bytes: int
    work_bytes: int
    refine_products: int  # multiply-adds with Hessians, which take most of the time of refining a large model


def default_rows_per_table(rows: int, columns: int) -> int:
    """Rows that share a table: a power of two that divides `rows`, large enough for >= 2048 weights if possible."""
    share = 1
    while share * columns < TABLE_WEIGHTS and rows % (share * 2) == 0:
        share *= 2
    return share


def plan_quantize(model: LayerwiseModel, options: QuantizeOptions, fisher: bool) -> QuantizePlan:
    """Computes shapes, output size, peak memory and scratch space, without reading a weight.

    fisher: whether there is calibration text. Raises InputError for rows per table that do not divide a matrix.
    """
    source = model.source
    linears: dict[str, tuple[int, int]] = {}
    for i in range(len(model)):
        for name in model.linears(i):
            n, k = source.shape(f"{name}.weight")
            linears[name] = (n, k)
    head_shape = source.shape(model.head_weight())
    _check_rows_per_table(linears | ({"lm_head": head_shape} if options.head_bits < 8 else {}), options)
    out = sum(_matrix_bytes(shape, options.bits, options) for shape in linears.values())
    other = _head_and_embedding_bytes(model, options)
    head = int(np.prod(head_shape))
    first = [s for name, s in linears.items() if name.startswith(model.layer_prefix(0) + ".")]
    layer = sum(n * k for n, k in first)
    tokens = options.samples * options.sequence_length
    boundary = tokens * model.config.hidden_size * 4
    return QuantizePlan(
        linears=linears,
        other_bytes=other,
        output_bytes=out + other,
        peak_bytes=predicted_peak_bytes(head, layer, boundary if fisher else None)
        + (refine_bytes(first, options) if fisher else 0),
        work_bytes=boundary * (len(model) + 2) if fisher else 0,
        refine_products=refine_products(list(linears.values()), options) if fisher else 0,
    )


def _check_rows_per_table(shapes: Mapping[str, Sequence[int]], options: QuantizeOptions) -> None:
    for name, shape in shapes.items():
        if options.rows_per_table and shape[0] % options.rows_per_table:
            raise InputError(
                f"--rows-per-table {options.rows_per_table} does not divide the {shape[0]} rows of '{name}'. "
                "Choose a divisor."
            )


def _matrix_bytes(shape: tuple[int, int], bits: tuple[int, int], options: QuantizeOptions) -> int:
    """Bytes of one matrix's planes, tables and scales."""
    layout = LinearLayout(shape, bits, options.rows_per_table or default_rows_per_table(*shape))
    return sum(int(np.prod(s)) * d.itemsize for s, d in layout.tensors("x").values())


def _head_and_embedding_bytes(model: LayerwiseModel, options: QuantizeOptions) -> int:
    """Bytes of head and embedding. A tied model stores one matrix for both, unless the head has its own planes."""
    name = model.head_weight()
    n, k = model.source.shape(name)
    dense = n * k * {"F64": 8, "F32": 4}.get(model.source.dtype(name), 2)
    if options.head_bits == 16:
        return dense if model.tied else 2 * dense
    if options.head_bits == 8:
        return n * k + 2 * n + (0 if model.tied else dense)
    return dense + _matrix_bytes((n, k), (2, options.head_bits), options)


def predicted_peak_bytes(head: int, layer: int, boundary: int | None) -> int:
    """Predicted peak of memory above the runtime's own, in bytes.

    It holds the embedding and one float32 layer, and in a Fisher pass also the layer's Fisher and the boundary states.
    head, layer: matrix elements. boundary: bytes of the hidden states between two layers; None without a Fisher pass.
    """
    return head * 4 + (layer * 4 if boundary is None else layer * 8 + 4 * boundary)


def refine_bytes(shapes: list[tuple[int, int]], options: QuantizeOptions) -> int:
    """Bytes for refining one layer: a Hessian per matrix, and the working space of the largest matrix."""
    if options.refine == "none":
        return 0
    widths = _free_widths(options)
    return sum(4 * k * k for _, k in shapes) + max(working_bytes(n, k, widths) for n, k in shapes)


def refine_products(shapes: list[tuple[int, int]], options: QuantizeOptions) -> int:
    """Multiply-adds with Hessians in refining matrices of these shapes [N, K]."""
    if options.refine == "none":
        return 0
    how = RefineOptions(codes=options.refine == "full")
    return sum(multiply_adds(n, k, _free_widths(options), how) for n, k in shapes)


def _free_widths(options: QuantizeOptions) -> int:
    return min(options.bits[1], MAX_TABLE_BITS) - options.bits[0] + 1


def llama_3_8b(options: QuantizeOptions, seconds: dict[str, float], weights: int, fisher: bool) -> str:
    """Predicts, in one line, what quantising Llama-3-8B would take on this machine.

    seconds: measured time per stage. weights: the weights that were quantised in this time. Time of refinement is the
    measured time per weight, plus the products with Hessians: they grow with the length of rows, so their time is
    predicted from the rate of one such product.
    """
    layer, head = LLAMA_3_8B_LAYER, 128_256 * 4096
    scale = 32 * layer / weights
    boundary = options.samples * options.sequence_length * 4096 * 4 if fisher else None
    parts = [f"{seconds['k-means'] * scale / 60:.0f} min of k-means"]
    peak = predicted_peak_bytes(head, layer, boundary)
    if fisher:
        parts.append(f"{seconds['fisher'] * scale / 3600:.1f} h of gradients")
    if fisher and options.refine != "none":
        products = 32 * refine_products(list(LLAMA_3_8B_SHAPES), options)
        hours = (seconds["refine"] * scale + products / multiply_adds_per_second()) / 3600
        parts.append(f"{hours:.0f} h of refinement")
        peak += refine_bytes(list(LLAMA_3_8B_SHAPES), options)
    cuda = " (much less with --device cuda)" if fisher else ""
    return (
        f"predicted for Llama-3-8B on this machine: {', '.join(parts)}{cuda}, {peak / 1e9:.1f} GB of memory"
    )


def multiply_adds_per_second() -> float:
    """Measures the rate of a float32 product of a block of rows with a large Hessian, on the CPU."""
    a, b = torch.ones(512, 2048), torch.ones(2048, 2048)
    a @ b
    began = time.perf_counter()
    a @ b
    return 512 * 2048**2 / (time.perf_counter() - began)
