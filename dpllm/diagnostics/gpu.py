"""Describes the GPU and checks its kernels against their definitions, for `dpllm doctor` and the benchmarks."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from typing import Any

import torch
from torch import Tensor

from dpllm.calib.runtime.token_sensitivity import DECAY, LIMIT
from dpllm.kernels import reference
from dpllm.kernels.gpu_step import definition as step_reference
from dpllm.kernels.gpu_step import tables
from dpllm.kernels.gpu_step.tables import CacheTable, Heads, PolicyTable, Site
from dpllm.kernels.weight import MAX_BITS, MAX_TABLE_BITS, MIN_BITS, Int8Weight, QuantizedWeight, pack

QUERIED = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit")
COPY_BYTES = 1 << 30
LEAST_COPY = 1 << 27  # bytes; a smaller copy would stay in the caches of a large GPU


def describe() -> dict[str, Any] | None:
    """Returns name, capability, memory, caches, driver and clocks of the current GPU, or None without a GPU."""
    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gb": round(p.total_memory / 1e9, 1),
        "multiprocessors": p.multi_processor_count, "l2_mb": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
        "cuda": torch.version.cuda, **_queried(str(p.uuid)),
    }  # fmt: skip


def _queried(uuid: str) -> dict[str, str]:
    """Returns driver and clocks as nvidia-smi reports them, or an empty dict if it does not run."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader"]
    command.append(f"--id=GPU-{uuid}")  # by uuid, because its device numbers may differ from those of torch
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [v.strip() for v in run.stdout.strip().split(",")]
    return dict(zip(QUERIED, values, strict=True)) if len(values) == len(QUERIED) else {}


def copy_bytes() -> int:
    """Returns the bytes to copy: at most a quarter of the current GPU's free memory.

    Raises RuntimeError if the copy would be so small that it measures the caches.
    """
    free, _ = torch.cuda.mem_get_info()
    if free // 4 < LEAST_COPY:
        raise RuntimeError(
            f"{free / 1e6:.0f} MB of the GPU's memory are free, {4 * LEAST_COPY / 1e6:.0f} are needed"
        )
    return min(COPY_BYTES, free // 4)


def copy_gb_per_s(rounds: int = 12) -> float:
    """Returns the median bandwidth of a copy on the current GPU: GB read and written per second."""
    nbytes = copy_bytes()
    source = torch.ones(nbytes // 4, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(rounds):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        target.copy_(source)
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended))
    return 2 * source.nbytes / statistics.median(times[2:]) / 1e6


# -- every kernel of a step, once, against its definition ---------------------------------------------------

HEADS, KV_HEADS, DIM, COLUMNS, VOCABULARY = 8, 2, 64, 512, 3000
LENGTHS = (300, 0)  # pairs of each head; one head has none


class _Case:
    """Inputs of every operation of a step. Two objects hold the same values."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.rng, self.device, self.dtype = torch.Generator().manual_seed(0), device, dtype
        self.partial = torch.zeros(4096, device=device)
        self.counter = torch.zeros(8, dtype=torch.int32, device=device)
        diagonals = torch.rand(1, COLUMNS, generator=self.rng).to(device, torch.float16)
        self.site = Site((0,), torch.zeros(1, dtype=torch.int32, device=device), True, diagonals)
        start = torch.tensor([[0, LENGTHS[0] + 4]], device=device)
        self.k, self.v = (self.draw(sum(LENGTHS) + 8, DIM) for _ in range(2))
        self.cache = CacheTable.empty(1, KV_HEADS, dtype, device)
        self.cache.write([self.k], [self.v], start, torch.tensor([LENGTHS], dtype=torch.int32))
        self.cache.request[tables.OBSERVE] = tables.ALL
        self.cache.request[tables.SPARE] = 700

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng).to(self.device, self.dtype)

    def table(self, kind: str) -> PolicyTable:
        """Returns a policy table whose thresholds lie near the median signal of a random input."""
        table = PolicyTable.empty([1.0], COLUMNS, self.device)
        table.kind = kind
        table.base.fill_(2)
        table.state.fill_(0.25)
        if kind == tables.WEIGHTED:
            table.compare(torch.tensor([[0.01, 0.1, 1.0, 1e9]], device=self.device) * COLUMNS)
            table.limit(100 * torch.arange(1, 5)[None], torch.full((1,), 300.0), 1.5)
            table.left.fill_(650)  # enough for some of the decisions, but not for all
        else:
            table.rows.fill_(16)
            table.line.copy_(torch.tensor([[1.0, 0.0]]))
            matrix = torch.randn(16, COLUMNS, generator=self.rng).to(self.device, torch.float16)
            table.point([matrix])
            table.compare(torch.full((1, 1), 1.0, device=self.device))
        return table


def _outputs(
    ops: Any, products: Any, select: Any, attention: Any, device: torch.device, dtype: torch.dtype
) -> dict[str, list[Tensor]]:
    """Runs every kernel of a step and returns its outputs: {kernel: tensors}."""
    case = _Case(device, dtype)
    scratch = case.partial, case.counter
    weighted, estimated = case.table(tables.WEIGHTED), case.table(tables.ESTIMATED)
    out: dict[str, list[Tensor]] = {}

    def decided(x: Tensor, w: Any) -> list[Tensor]:
        """Returns the product (with a matrix) and the width that the signals choose, with the signals and the rest."""
        alone = lambda x, w, bits, bias: bits  # noqa: E731
        y = ops.chosen_gemv(x, w, None, 0, weighted, alone if w is None else products.gemv)
        return [y.clone(), weighted.signals.sum(1), weighted.bits.clone(), weighted.left.clone()]

    x, delta, weight = case.draw(1, COLUMNS), case.draw(1, COLUMNS), case.draw(COLUMNS)
    h = ops.norm(x, delta, weight, 1e-5, case.site, weighted, LIMIT)
    out["norm"] = [x, h, *decided(h, None)]
    matrix = products.prepare(_matrix(case.rng, (9, COLUMNS), 1), device)
    out["gemv at a width it chooses"] = decided(h, matrix)
    rope = case.draw(DIM // 2).float(), case.draw(DIM // 2).float()
    qkv = case.draw(1, (HEADS + 2 * KV_HEADS) * DIM)
    norms = case.draw(DIM), case.draw(DIM)
    weighted.signals.zero_()  # the next kernel writes fewer parts
    mixed = ops.attend(qkv, Heads(DIM, 1e-5, norms, rope), case.cache, 0, case.site, weighted)
    out["attend"] = [mixed, case.k, case.v, *decided(mixed, None)]
    q = qkv.view(-1, DIM)[:HEADS]
    start, length = case.cache.start[0], case.cache.length[0]
    out["decode_attention"] = [attention(q, case.k, case.v, start, length, DIM**-0.5)]
    weighted.signals.zero_()
    inner = ops.silu_mul(case.draw(1, 2 * COLUMNS), case.site, weighted)
    out["silu_mul"] = [inner, *decided(inner, None)]
    ops.estimate(h, case.site, estimated, *scratch)
    out["estimate"] = [estimated.bits]
    assert case.site.diagonals is not None
    out["select"] = [select(case.draw(3, COLUMNS), case.site.diagonals[0], weighted.thresholds[0], 2)]
    logits = case.draw(1, VOCABULARY).float()
    token = torch.zeros(1, dtype=torch.int32, device=device)
    ops.finish(logits, token, weighted, *scratch)
    out["finish"] = [token, weighted.state[tables.LOG_TOTAL : tables.ENTROPY + 1].clone()]
    ops.observe(logits, case.cache, weighted, DECAY)
    out["observe"] = [weighted.state, weighted.left]
    return out


def check_step_kernels(device: torch.device, dtype: torch.dtype = torch.float16) -> dict[str, float]:
    """Returns the relative error of each kernel of a decode step against its definition in torch: {kernel: error}.

    The error is infinite if a width differs.
    """
    from dpllm.kernels.triton import products, step_operations
    from dpllm.kernels.triton.attention import decode_attention
    from dpllm.kernels.triton.select import select

    found = _outputs(step_operations, products, select, decode_attention, device, dtype)
    expected = _outputs(
        step_reference, reference, reference.select, reference.decode_attention, device, dtype
    )
    return {
        name: max(_error(a, b) for a, b in zip(found[name], expected[name], strict=True)) for name in found
    }


# -- the same for products ------------------------------------------------------------------------------------

ROWS, SHAPE = 12, (200, 4224)  # rows of activations; shape of the matrices, not a multiple of the blocks


def _matrix(rng: torch.Generator, shape: tuple[int, int], share: int) -> QuantizedWeight:
    """Returns random codes and tables; `share` rows share a table."""
    n, k = shape
    codes = torch.randint(0, 1 << MAX_BITS, shape, generator=rng, dtype=torch.uint8)
    widths = range(MIN_BITS, MAX_TABLE_BITS + 1)
    tables = [torch.randn(n // share, 1 << b, generator=rng).sort(1).values for b in widths]
    scale = None if share == 1 else (torch.rand(n, generator=rng) + 0.5).half()
    return QuantizedWeight(pack(codes.numpy(), MAX_BITS), torch.cat(tables, 1).half(), k, MIN_BITS, scale)


def _activations(columns: int, dtype: torch.dtype) -> Tensor:
    """Returns activations [ROWS, columns]; their values exceed the range of float16 if `dtype` can hold them."""
    x = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(1))
    return (x if dtype == torch.float16 else 1e6 * x).to(dtype)


def _products(ops: Any, x: Tensor, shape: tuple[int, int], share: int) -> dict[str, Tensor]:
    """Runs every product on x's device in x's type: {kernel: result}. Every call uses the same matrices."""
    rng = torch.Generator().manual_seed(0)
    weight = ops.prepare(_matrix(rng, shape, share), x.device)
    values = torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8)
    head = Int8Weight(values, (torch.rand(len(values), generator=rng) * 0.1).half()).to(x.device)
    widths = range(MIN_BITS, MAX_BITS + 1)
    mixed = [widths[i % len(widths)] for i in range(ROWS)]
    bits = torch.tensor(mixed, dtype=torch.int32, device=x.device)
    out = {f"gemv of {b} bits": ops.gemv(x[i : i + 1], weight, bits[i : i + 1]) for i, b in enumerate(widths)}
    out["gemm"], out["tall gemm"] = (ops.gemv(x.repeat(n, 1), weight, bits.repeat(n)) for n in (1, 2))
    out["dequantize"] = torch.cat([ops.dequantize(weight, b, x.dtype) for b in widths])
    out["int8_gemv"], out["int8_gemm"] = ops.int8_linear(x[:1], head), ops.int8_linear(x, head)
    return out


def check_products(device: torch.device, shape: tuple[int, int] = SHAPE) -> dict[str, float]:
    """Returns the relative error of each product kernel against its definition in float64: {"kernel, dtype": error}."""
    from dpllm.kernels.triton import products
    from dpllm.kernels.triton.activations import halves_of

    errors: dict[str, float] = {}
    for dtype, share in ((torch.float16, 1), (torch.bfloat16, 2)):
        x, columns = _activations(shape[1], dtype), 2 * shape[1]
        found = _products(products, x.to(device), shape, share)
        exact = _products(reference, x.double(), shape, share)
        halves, factor = halves_of(x.to(device), columns)
        found["halve"] = halves.double() if factor is None else halves.double() * factor[:, None]
        exact["halve"] = torch.nn.functional.pad(x, (0, columns - shape[1]))
        kind = str(dtype).removeprefix("torch.")
        errors |= {f"{name}, {kind}": _error(y.cpu(), exact[name]) for name, y in found.items()}
    return errors


def _error(found: Tensor, expected: Tensor) -> float:
    """Returns the relative error in the 2-norm. Integers must be equal; else the error is infinite, as for NaN."""
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    a, b = found.double(), expected.double()
    error = float((a - b).norm() / b.norm().clamp(min=1e-30))
    return error if error == error else float("inf")
