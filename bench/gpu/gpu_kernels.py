"""Kernels on a GPU, each against what else reads a matrix or a cache there.

Limits measured, as ratios of interleaved medians, every contender captured in a CUDA graph over buffers of at least
four times the L2, on the matrices of the 8B shape: (1) our product of one row at 2..8 bits, its kernel made for that
width or for a range ("3 of 2-6"), cuBLAS in fp16 and bf16, bitsandbytes NF4, torchao int4 and int8, gemlite and hqq
where they are installed; (2) products of 4, 8 and 16 rows of mixed widths against cuBLAS; (3) prompts of 512 and 2048
rows, which are to take no more than 1 / 0.6 of cuBLAS's time in bf16; (4) the int8 head; (5) decode attention after
32768 tokens: all pairs, 0.3 of them kept unevenly over the heads, and torch's own. The roofline is what a kernel that
only reads gets.

    python -m bench.gpu.gpu_kernels
    python -m bench.gpu.gpu_kernels --dry-run     through Triton's interpreter, small: shows that it works
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from bench.gpu.gpu_common import DEVICE, DRY, Contender, begun, compare, copies_for, finish, our_backend  # isort: skip
from bench.gpu.gpu_common import read_gb_per_s, row  # isort: skip

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.report import arguments
from dpllm.kernels.gpu_step import tables as step_tables
from dpllm.kernels.gpu_step.tables import PolicyTable
from dpllm.kernels.triton.attention import decode_attention
from dpllm.kernels.triton.pack import TritonWeight
from dpllm.kernels.triton.products import chosen_gemv
from dpllm.kernels.weight import MAX_BITS, MIN_BITS
from dpllm.model.random_models import _random_int8, _random_weight

MATRICES = [(8, 128)] if DRY else [(4096, 4096), (6144, 4096), (28672, 4096), (14336, 4096), (4096, 14336)]
HEAD = (16, 128) if DRY else (128256, 4096)
PLANES = 6  # that an engine holds
# Of one row: width, and the range that the kernel is made for, as an engine narrows it.
READ = [*((b, b, b) for b in range(MIN_BITS, MAX_BITS + 1)), (3, 2, 6), (4, 2, 6), (3, 3, 4)]
CHOSEN = ((3, 2, 6), (4, 2, 6), (3, 3, 4))
MIXED = ((2, 6), (3, 4))
FEW, PROMPT = (4, 8, 16), (130,) if DRY else (512, 2048)
BAR = 0.6  # of cuBLAS's speed in bf16, for a prompt
HALF, BFLOAT = torch.float16, torch.bfloat16
GROUP = 128  # weights that share a scale, of the peers


def packed(n: int, k: int) -> list[TritonWeight]:
    """The matrix at every width, as often as it takes for the narrowest to exceed the L2."""
    rng, backend = torch.Generator(DEVICE).manual_seed(0), our_backend()
    count = copies_for(n * k * MIN_BITS // 8)
    return [backend.prepare(_random_weight(n, k, MAX_BITS, rng), DEVICE) for _ in range(count)]


def ours(weights: list[TritonWeight], x: Tensor) -> Iterator[Contender]:
    """One row."""
    gemv = our_backend().gemv
    for b, low, high in READ:
        bits = torch.full((1,), b, dtype=torch.int32, device=DEVICE)
        narrowed = [w.between(low, high) for w in weights]
        calls = [lambda w=w, bits=bits: gemv(x, w, bits) for w in narrowed]
        yield Contender(f"ours, {b} of {low}-{high}", calls, weights[0].nbytes(b), b)


def ours_choosing(weights: list[TritonWeight], x: Tensor) -> Iterator[Contender]:
    """One row, the width chosen by the product itself, as in a decode step."""
    gemv = our_backend().gemv
    for b, low, high in CHOSEN:
        table = PolicyTable.empty([1.0], x.shape[1], DEVICE)
        table.base.fill_(low)
        table.state[step_tables.MULTIPLIER] = 1.0
        table.compare(torch.arange(1.0, high - low + 1, device=DEVICE)[None])
        table.signals[0, 0] = b - low + 0.5
        narrowed = [w.between(low, high) for w in weights]
        calls = [lambda w=w, table=table: chosen_gemv(x, w, None, 0, table, gemv) for w in narrowed]
        yield Contender(f"ours, choosing {b} of {low}-{high}", calls, weights[0].nbytes(b), b)


def ours_mixed(weights: list[TritonWeight], x: Tensor) -> Iterator[Contender]:
    """Some rows, their widths in turns; all planes of the widest are read."""
    gemv = our_backend().gemv
    for low, high in MIXED:
        bits = (torch.arange(len(x), device=DEVICE) % (high - low + 1) + low).int()
        narrowed = [w.between(low, high) for w in weights]
        calls = [lambda w=w, bits=bits: gemv(x, w, bits) for w in narrowed]
        nbytes = weights[0].nbytes(int(bits.max()))
        yield Contender(f"ours, mixed widths of {low}-{high}", calls, nbytes, float(bits.float().mean()))


def ours_prompt(weights: list[TritonWeight], x: Tensor) -> Iterator[Contender]:
    """A prompt at every plane that an engine holds, in either type of activations."""
    matmul = our_backend().matmul
    held = [replace(w, planes=w.planes[:PLANES], widths=(MIN_BITS, PLANES)) for w in weights]
    for name, dtype in (("fp16", HALF), ("bf16", BFLOAT)):
        own = x.to(dtype)
        calls = [lambda w=w, own=own: matmul(own, w) for w in held]
        note = f"bar: {BAR} times as fast as cuBLAS bf16"
        yield Contender(f"ours, {PLANES} bits, {name}", calls, held[0].nbytes(PLANES), PLANES, note)


def cublas(
    n: int, k: int, x: Tensor, dtypes: tuple[torch.dtype, ...] = (HALF, BFLOAT)
) -> Iterator[Contender]:
    for dtype in dtypes:
        weights = [torch.randn(n, k, device=DEVICE, dtype=dtype) for _ in range(copies_for(2 * n * k))]
        own, name = x.to(dtype), "cuBLAS fp16" if dtype == HALF else "cuBLAS bf16"
        yield Contender(name, [lambda w=w, own=own: F.linear(own, w) for w in weights], 2 * n * k, 16)


# -- peers: each takes (n, k) and gives (a module, bytes that it reads) ---------------------------------------


def linear(n: int, k: int, dtype: torch.dtype = HALF) -> torch.nn.Linear:
    made = torch.nn.Linear(k, n, bias=False, dtype=dtype, device=DEVICE)
    return made.requires_grad_(False)


def bitsandbytes_nf4(n: int, k: int) -> tuple[Callable, int]:
    from bitsandbytes.nn import LinearNF4

    made = LinearNF4(k, n, bias=False, compute_dtype=HALF)
    made.load_state_dict(linear(n, k).state_dict())
    return made.to(DEVICE), n * k // 2 + n * k // 64 * 4


def torchao(config: Any, n: int, k: int, bits: float) -> tuple[Callable, int]:
    from torchao.quantization import quantize_

    holder = torch.nn.Sequential(linear(n, k, BFLOAT))
    quantize_(holder, config)
    return holder, int(n * k * bits / 8)


def torchao_int4(n: int, k: int) -> tuple[Callable, int]:
    from torchao.quantization import Int4WeightOnlyConfig

    return torchao(Int4WeightOnlyConfig(group_size=GROUP), n, k, 4 + 32 / GROUP)


def torchao_int8(n: int, k: int) -> tuple[Callable, int]:
    from torchao.quantization import Int8WeightOnlyConfig

    made, nbytes = torchao(Int8WeightOnlyConfig(), n, k, 8)
    torch._dynamo.config.recompile_limit = (
        1024  # modules are compiled one by one, and share their code object
    )
    torch._dynamo.config.accumulated_recompile_limit = 4096
    return torch.compile(made), nbytes


def hqq_4bit(n: int, k: int) -> tuple[Callable, int]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=GROUP)
    made = HQQLinear(linear(n, k), config, compute_dtype=HALF, device=str(DEVICE))
    return made, int(n * k * (4 + 32 / GROUP) / 8)


def gemlite_bits(bits: int) -> Callable[[int, int], tuple[Callable, int]]:
    def make(n: int, k: int) -> tuple[Callable, int]:
        from gemlite.core import DType, GemLiteLinear

        made = GemLiteLinear(bits, GROUP, k, n, input_dtype=DType.FP16, output_dtype=DType.FP16)
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device=DEVICE)
        scale = torch.full((n, k // GROUP), k**-0.5, dtype=HALF, device=DEVICE)
        made.pack(codes, scale, torch.full_like(scale, 2 ** (bits - 1)), None)
        return made, int(n * k * (bits + 32 / GROUP) / 8)

    return make


PEERS: dict[str, tuple[float, torch.dtype, Callable[[int, int], tuple[Callable, int]]]] = {
    "bitsandbytes NF4": (4, HALF, bitsandbytes_nf4),
    "torchao int4": (4, BFLOAT, torchao_int4),
    "torchao int8": (8, BFLOAT, torchao_int8),
    "gemlite 4": (4, HALF, gemlite_bits(4)),
    "gemlite 8": (8, HALF, gemlite_bits(8)),
    "hqq 4": (4, HALF, hqq_4bit),
}


def peers(n: int, k: int, x: Tensor) -> Iterator[Contender | dict]:
    """Those that install and run; a row that says why of the others."""
    for name, (bits, dtype, make) in PEERS.items():
        try:
            first, nbytes = make(n, k)
            modules = [first, *(make(n, k)[0] for _ in range(copies_for(nbytes) - 1))]
            own = x.to(dtype)
            modules[0](own)
        except Exception as e:  # whatever another package raises
            yield row(f"{n}x{k}", name, bits=bits, note=f"not run: {' '.join(str(e).split())[:100]}")
            continue
        yield Contender(name, [lambda m=m, own=own: m(own) for m in modules], nbytes, bits)


def drawn(rows: int, k: int) -> Tensor:
    return torch.randn(rows, k, device=DEVICE, dtype=HALF)


@torch.inference_mode()
def products(n: int, k: int, roofline: float) -> list[dict]:
    """A matrix with one row, some rows, a prompt."""
    name, weights, x = f"{n}x{k}", packed(n, k), drawn(1, k)
    found = [
        *cublas(n, k, x),
        *ours(weights, x),
        *ours_choosing(weights, x),
        *([] if DRY else peers(n, k, x)),
    ]
    rows = compare(name, [c for c in found if isinstance(c, Contender)], "cuBLAS fp16", roofline)
    rows += [r for r in found if isinstance(r, dict)]
    del found
    for m in FEW:
        x = drawn(m, k)
        some = [*cublas(n, k, x, (HALF,)), *ours_mixed(weights, x)]
        rows += compare(f"{name}, {m} rows", some, "cuBLAS fp16", roofline)
    for m in PROMPT:
        x = drawn(m, k)
        some = [*cublas(n, k, x), *ours_prompt(weights[: copies_for(weights[0].nbytes(PLANES))], x)]
        rows += compare(f"{name}, prompt of {m}", some, "cuBLAS bf16", roofline)
    return rows


@torch.inference_mode()
def head(roofline: float) -> list[dict]:
    """The int8 head, one row."""
    (n, k), rng, linear = HEAD, torch.Generator(DEVICE).manual_seed(0), our_backend().int8_linear
    x = drawn(1, k)
    weights = [_random_int8(n, k, rng) for _ in range(copies_for(n * k))]
    calls = [lambda w=w: linear(x, w) for w in weights]
    own = Contender("ours, int8", calls, weights[0].nbytes(), 8)
    return compare(f"head {n}x{k}", [*cublas(n, k, x, (HALF,)), own], "cuBLAS fp16", roofline)


# -- attention ----------------------------------------------------------------------------------------------

HEADS, KV_HEADS, DIM, CONTEXT = (4, 2, 16, 70) if DRY else (32, 8, 128, 32768)
KEPT = 0.3


def cache(lengths: list[int]) -> tuple[Tensor, ...]:
    """(k, v, start, length) of runs of these lengths."""
    sizes = torch.tensor(lengths, device=DEVICE)
    k, v = (torch.randn(int(sizes.sum()), DIM, device=DEVICE, dtype=HALF) for _ in range(2))
    return k, v, sizes.cumsum(0) - sizes, sizes.int()


def uneven(total: int) -> list[int]:
    """Lengths of the heads that add up to total, the longest some five times the shortest, as scoring leaves them."""
    shares = [1 + 4 * h / (KV_HEADS - 1) for h in range(KV_HEADS)]
    lengths = [int(total * s / sum(shares)) for s in shares]
    return [min(n, CONTEXT) for n in lengths]


@torch.inference_mode()
def attention(roofline: float) -> list[dict]:
    q, scale = torch.randn(HEADS, DIM, device=DEVICE, dtype=HALF), DIM**-0.5
    pair = 2 * DIM * HALF.itemsize
    contenders = []
    for name, lengths in (
        ("ours, all pairs", [CONTEXT] * KV_HEADS),
        (f"ours, {KEPT} kept", uneven(int(KEPT * CONTEXT * KV_HEADS))),
    ):
        nbytes = sum(lengths) * pair
        caches = [cache(lengths) for _ in range(copies_for(nbytes))]
        calls = [lambda c=c: decode_attention(q, *c, scale) for c in caches]
        contenders.append(Contender(name, calls, nbytes))
    shape = (1, KV_HEADS, CONTEXT, DIM)
    nbytes = KV_HEADS * CONTEXT * pair
    dense = [
        tuple(torch.randn(shape, device=DEVICE, dtype=HALF) for _ in range(2))
        for _ in range(copies_for(nbytes))
    ]
    own = q[None, :, None]
    calls = [
        lambda k=k, v=v: F.scaled_dot_product_attention(own, k, v, scale=scale, enable_gqa=True)
        for k, v in dense
    ]
    contenders.append(Contender("torch SDPA, all pairs", calls, nbytes))
    return compare(f"attention after {CONTEXT}", contenders, "ours, all pairs", roofline)


def main() -> None:
    _, run = begun(arguments(__doc__))
    torch.manual_seed(0)
    roofline = read_gb_per_s()
    rows = [r for n, k in MATRICES for r in products(n, k, roofline)]
    rows += head(roofline) + attention(roofline)
    finish(run, "gpu_kernels", rows, read_gb_per_s=roofline)


if __name__ == "__main__":
    main()
