"""Computes the memory that an overlay needs at each width, without reading its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dpllm.base.errors import InputError
from dpllm.base.machine import available_bytes
from dpllm.quant.overlay import Overlay


def resident_bytes(overlay: Overlay, bits: int) -> int:
    """Returns the bytes held when `bits` planes are resident: planes, tables up to that width, scales, and the rest."""
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
    """Returns the largest number of planes that fit into `limit` bytes. Raises InputError if none fits."""
    overlay = Overlay.open(path)
    lo, hi = overlay.bits
    fitting = [b for b in range(lo, hi + 1) if resident_bytes(overlay, b) <= limit]
    if not fitting:
        raise InputError(
            f"{path} needs {resident_bytes(overlay, lo) / 1e6:.1f} MB even at {lo} bits; "
            f"--max-memory allows {limit / 1e6:.1f} MB. Raise it, or use a smaller model."
        )
    return max(fitting)


def process_peak_bytes() -> int | None:
    """The most memory this process has held so far, or None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        return None


def check_memory(model: str | Path, sizes: Mapping[int, int], available: int | None = None) -> None:
    """Raises InputError if the largest of `sizes` (planes -> bytes) exceeds the available memory.

    available: bytes; None: what this process can still get (base/machine.py)."""
    free = available_bytes() if available is None else available
    widest = max(sizes)
    if free is None or sizes[widest] <= free:
        return
    fitting = [b for b, size in sizes.items() if size <= free]
    way_out = (
        f"{max(fitting)} planes would fit: use --resident-bits {max(fitting)} or --max-memory."
        if fitting
        else f"even {min(sizes)} planes need {sizes[min(sizes)] / 1e9:.1f} GB. Use a smaller model."
    )
    raise InputError(
        f"{model} needs {sizes[widest] / 1e9:.1f} GB with {widest} planes; {free / 1e9:.1f} GB of memory are free. "
        f"{way_out}"
    )
