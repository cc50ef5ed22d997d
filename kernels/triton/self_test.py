"""Tests whether the GPU kernels run on a device, by one small product.

It is not enough that torch and Triton can be imported. Triton also needs a C compiler for its launcher and an assembler
that knows the GPU, and must lay out registers as the inline assembly expects."""

from __future__ import annotations

import torch

from dpllm.kernels import reference
from dpllm.kernels.triton import products
from dpllm.kernels.weight import QuantizedWeight

TOLERANCE = 5e-3  # relative; float16 activations and tables cause about a tenth of it
ROWS, COLUMNS = 24, 160
_passed: set[torch.device] = set()


def lacking(device: torch.device) -> str | None:
    """Returns one line that says why a small product fails on the device; None where it is right.

    A device whose product was right is not tested again."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    why = None if device in _passed else _failed(device)
    if why is None:
        _passed.add(device)
    return why


def _failed(device: torch.device) -> str | None:
    rng = torch.Generator().manual_seed(0)
    planes = torch.randint(-(2**31), 2**31 - 1, (3, ROWS, COLUMNS // 32), generator=rng).to(torch.int32)
    weight = QuantizedWeight(planes, torch.randn(ROWS, 4 + 8, generator=rng).half(), COLUMNS, 2)
    x, bits = torch.randn(1, COLUMNS, generator=rng).half(), torch.tensor([3], dtype=torch.int32)
    try:
        prepared = products.prepare(weight, device).between(3, 3)
        found = products.gemv(x.to(device), prepared, bits.to(device)).cpu().double()
    except Exception as e:  # a compiler, an assembler or a driver may raise anything
        return f"a test product fails ({type(e).__name__}: {' '.join(str(e).split())[:160]})"
    expected = reference.gemv(x.double(), reference.prepare(weight), bits)
    error = float((found - expected).norm() / expected.norm())
    return None if error < TOLERANCE else f"a test product is wrong (relative error {error:.2g})"
