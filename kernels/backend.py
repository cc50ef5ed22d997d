"""One backend of plain functions, chosen once at load and reported with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dpllm.kernels import reference
from dpllm.kernels.cpu.functions import CpuKernels, prepare
from dpllm.kernels.cpu.library import CpuOptions, Handle
from dpllm.kernels.errors import InputError

NAMES = ("cpu", "reference")


@dataclass(frozen=True)
class Backend:
    """Functions of the signatures in kernels/reference.py; `reason` says why this one was chosen.

    cpu: the native kernels' handle, None for other backends; with it a whole decode step can run natively.
    """

    name: str
    reason: str
    prepare: Callable[..., Any]
    gemv: Callable[..., Any]
    matmul: Callable[..., Any]
    dequantize: Callable[..., Any]
    int8_linear: Callable[..., Any]
    select: Callable[..., Any]
    decode_attention: Callable[..., Any]
    prompt_attention: Callable[..., Any]
    attention_peaks: Callable[..., Any]
    cpu: CpuKernels | None = None


def _reference(reason: str) -> Backend:
    return Backend(
        name="reference",
        reason=reason,
        prepare=reference.prepare,
        gemv=reference.gemv,
        matmul=reference.matmul,
        dequantize=reference.dequantize,
        int8_linear=reference.int8_linear,
        select=reference.select,
        decode_attention=reference.decode_attention,
        prompt_attention=reference.prompt_attention,
        attention_peaks=reference.attention_peaks,
    )


def _cpu(options: CpuOptions, reason: str) -> Backend:
    kernels = CpuKernels(Handle(options))
    isa = kernels.handle.isa
    return Backend(
        name=f"cpu:{isa.name}",
        reason=f"{reason}; {isa.needs}, {kernels.handle.threads} threads, accuracy {options.accuracy}",
        prepare=prepare,
        gemv=kernels.gemv,
        matmul=kernels.matmul,
        dequantize=kernels.dequantize,
        int8_linear=kernels.int8_linear,
        select=kernels.select,
        decode_attention=kernels.decode_attention,
        prompt_attention=kernels.prompt_attention,
        attention_peaks=kernels.attention_peaks,
        cpu=kernels,
    )


def choose_backend(
    name: str | None = None, device: torch.device | str = "cpu", options: CpuOptions | None = None
) -> Backend:
    """The named backend, or the best this machine has for the device.

    name: 'cpu' (or 'cpu:ISA' for one instruction set), 'reference', or None to choose.
    Raises InputError for a name that does not exist or cannot run here.
    """
    options = options or CpuOptions()
    if name is not None:
        kind, _, isa = name.partition(":")
        if kind not in NAMES or (isa and kind != "cpu"):
            raise InputError(
                f"unknown kernel backend '{name}'. Choose one of: {', '.join(NAMES)}, cpu:INSTRUCTION_SET."
            )
        if kind == "reference":
            return _reference("asked for by name")
        if torch.device(device).type != "cpu":
            raise InputError(f"backend '{name}' runs on the CPU, not on {device}. Use --backend reference.")
        options = CpuOptions(options.threads, options.pin, isa or options.isa, options.accuracy)
    elif torch.device(device).type != "cpu":
        return _reference(
            f"torch operations on {device}; no faster backend for it is built into this version"
        )
    try:
        return _cpu(options, "asked for by name" if name else "the best this processor runs")
    except OSError as e:
        why = f"the native kernels are not there ({' '.join(str(e).split())[:120]})"
        mend = "install a C++ compiler (gcc or clang) and run: pip install --force-reinstall --no-deps dpllm"
        if name is not None:
            raise InputError(f"backend '{name}' cannot be used: {why}. To have them, {mend}.") from None
        return _reference(f"torch operations, many times slower: {why}. To have them, {mend}")
