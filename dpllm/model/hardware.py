"""Checks what a user asks of the machine: its device, and the threads of its processor."""

from __future__ import annotations

import torch

from dpllm.base.errors import InputError
from dpllm.kernels.cpu.library import CpuOptions


def check_device(device: str) -> str:
    """The name of the device, 'cpu' or 'cuda'. Raises InputError for any other, or where torch cannot use it."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' cannot be used: torch sees no CUDA device. Use cpu.")
    if device not in ("cpu", "cuda"):
        raise InputError(f"device '{device}' is unknown. Use cpu or cuda.")
    return device


def cpu_options(threads: int | None, accuracy: str = "balanced", pin: bool = False) -> CpuOptions:
    """Options of the CPU kernels. With `threads` given, torch is held to the same number of threads.

    threads: None leaves both free, which is one per core. Raises InputError for a number that is not possible.
    """
    if threads is None:
        return CpuOptions(accuracy=accuracy, pin=pin)
    if threads < 1:
        raise InputError(f"{threads} threads are not possible; at least 1 is needed.")
    options = CpuOptions(threads=threads, accuracy=accuracy, pin=pin)
    torch.set_num_threads(threads)
    return options
