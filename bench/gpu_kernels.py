"""Kernels on a GPU, each against what else reads a matrix or a cache there.

Limits measured, as ratios of interleaved medians, every contender captured in a CUDA graph over buffers of at least
four times the L2: (1) our product of one row at 2..8 bits, cuBLAS in fp16 and bf16, bitsandbytes NF4, torchao int4 and
int8, gemlite and hqq where they are installed, on the matrices of the 8B shape; (2) decode attention behind 32768
tokens: all pairs, 0.3 of them kept unevenly over the heads, and torch's own. The roofline is what a
kernel that only reads gets.

    python bench/gpu_kernels.py
    python bench/gpu_kernels.py --dry-run     through Triton's interpreter, small: shows that it works
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from gpu_common import DEVICE, DRY, Contender, compare, copies_for, finish, read_gb_per_s, require_gpu, row  # isort: skip

import torch
import torch.nn.functional as F
from torch import Tensor

from dpllm.kernels.backend import Backend, choose_backend
from dpllm.kernels.errors import InputError
from dpllm.kernels.triton.attention import decode_attention
from dpllm.kernels.weight import MAX_BITS, MIN_BITS
from dpllm.shapes import _random_weight

MATRICES = [(96, 64)] if DRY else [(4096, 4096), (6144, 4096), (28672, 4096), (14336, 4096), (4096, 14336)]
BITS = (3, 4) if DRY else range(MIN_BITS, MAX_BITS + 1)
HALF = torch.float16
GROUP = 128  # weights that share a scale, of the peers


def ours_backend() -> Backend:
    """Our Triton kernels; where this version has none, what would be used here, which the rows then name."""
    try:
        return choose_backend("triton", DEVICE)
    except InputError:
        return choose_backend("reference", DEVICE)


def ours(backend: Backend, n: int, k: int, x: Tensor) -> Iterator[Contender]:
    rng = torch.Generator(DEVICE).manual_seed(0)
    count = copies_for(n * k * MIN_BITS // 8)
    weights = [_random_weight(n, k, max(BITS), rng) for _ in range(count)]
    prepared = [backend.prepare(w, DEVICE) for w in weights]
    for b in BITS:
        bits = torch.full((1,), b, dtype=torch.int32, device=DEVICE)
        calls = [lambda p=p, bits=bits: backend.gemv(x, p, bits) for p in prepared]
        yield Contender(f"ours ({backend.name})", calls, weights[0].nbytes(b), b)


def cublas(n: int, k: int, x: Tensor) -> Iterator[Contender]:
    for dtype, name in ((HALF, "cuBLAS fp16"), (torch.bfloat16, "cuBLAS bf16")):
        weights = [torch.randn(n, k, device=DEVICE, dtype=dtype) for _ in range(copies_for(2 * n * k))]
        own = x.to(dtype)
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

    holder = torch.nn.Sequential(linear(n, k, torch.bfloat16))
    quantize_(holder, config)
    return holder, int(n * k * bits / 8)


def torchao_int4(n: int, k: int) -> tuple[Callable, int]:
    from torchao.quantization import Int4WeightOnlyConfig

    return torchao(Int4WeightOnlyConfig(group_size=GROUP), n, k, 4 + 32 / GROUP)


def torchao_int8(n: int, k: int) -> tuple[Callable, int]:
    from torchao.quantization import Int8WeightOnlyConfig

    made, nbytes = torchao(Int8WeightOnlyConfig(), n, k, 8)
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
    "torchao int4": (4, torch.bfloat16, torchao_int4),
    "torchao int8": (8, torch.bfloat16, torchao_int8),
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


@torch.inference_mode()
def products(roofline: float) -> list[dict]:
    """Every matrix."""
    backend, rows = ours_backend(), []
    for n, k in MATRICES:
        x = torch.randn(1, k, device=DEVICE, dtype=HALF)
        found = [*cublas(n, k, x), *ours(backend, n, k, x), *([] if DRY else peers(n, k, x))]
        contenders = [c for c in found if isinstance(c, Contender)]
        for c in contenders:  # names are keys
            c.name = f"{c.name} {c.bits}b" if c.name.startswith("ours") else c.name
        rows += compare(f"{n}x{k}", contenders, "cuBLAS fp16", roofline)
        rows += [r for r in found if isinstance(r, dict)]
    return rows


# -- attention ----------------------------------------------------------------------------------------------

HEADS, KV_HEADS, DIM, CONTEXT = (4, 2, 16, 90) if DRY else (32, 8, 128, 32768)
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
    return compare(f"attention behind {CONTEXT}", contenders, "ours, all pairs", roofline)


def main() -> None:
    require_gpu()
    torch.manual_seed(0)
    roofline = read_gb_per_s()
    rows = products(roofline) + attention(roofline)
    finish("gpu_kernels", rows, read_gb_per_s=roofline)


if __name__ == "__main__":
    main()
