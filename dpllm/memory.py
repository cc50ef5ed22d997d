"""How many planes fit: resident bytes of an overlay at each width, without reading it."""

from __future__ import annotations

from pathlib import Path

from dpllm.kernels.errors import InputError
from dpllm.quant.overlay import Overlay


def resident_bytes(overlay: Overlay, bits: int) -> int:
    """Bytes held when `bits` planes are resident: planes, tables up to that width, scales, everything else."""
    total = 0
    for name, entry in overlay.entries():
        layout = overlay.linear_of(name)
        kind, _, number = name.rpartition(".")
        if layout is not None and layout.bits == overlay.bits:
            if kind.endswith(".planes") and int(number) >= bits:
                continue
            if kind.endswith(".lut") and int(number) > bits:
                continue
        total += entry
    return total


def resident_bits_within(path: Path, limit: int) -> int:
    """The largest number of planes whose resident bytes stay within `limit`; InputError if none does."""
    overlay = Overlay.open(path)
    lo, hi = overlay.bits
    fitting = [b for b in range(lo, hi + 1) if resident_bytes(overlay, b) <= limit]
    if not fitting:
        raise InputError(
            f"{path} needs {resident_bytes(overlay, lo) / 1e6:.1f} MB even at {lo} bits; "
            f"--max-memory allows {limit / 1e6:.1f} MB. Raise it, or use a smaller model."
        )
    return max(fitting)
