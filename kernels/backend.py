"""Chooses one backend of plain kernel functions when a model is loaded, and gives the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dpllm.base import forking
from dpllm.base.errors import InputError
from dpllm.kernels import reference
from dpllm.kernels.cpu.kernels import CpuKernels, prepare
from dpllm.kernels.cpu.library import CpuOptions, Handle

NAMES = ("cpu", "triton", "reference")
TRITON = (3, 6)  # the oldest version with which the GPU kernels are tested
CAPABILITY = (8, 0)  # the first one whose tensor cores multiply 16 x 8 x 16 float16


@dataclass(frozen=True)
class Backend:
    """Kernel functions with the signatures of kernels/reference.py.

    reason: why this backend was chosen. cpu: the native CPU kernels, with which a whole decode step can run natively;
    None for other backends.
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


def _triton(device: torch.device, reason: str) -> Backend:
    """Makes the backend of the GPU kernels. `lacking_for_triton` must have returned None."""
    from dpllm.kernels.triton import attention, products, select

    return Backend(
        name="triton",
        reason=f"{reason}; {torch.cuda.get_device_name(device)}, {_capability(device)}",
        prepare=products.prepare,
        gemv=products.gemv,
        matmul=products.matmul,
        dequantize=products.dequantize,
        int8_linear=products.int8_linear,
        select=select.select,
        decode_attention=attention.decode_attention,
        prompt_attention=reference.prompt_attention,
        attention_peaks=reference.attention_peaks,
    )


def lacking_for_triton(device: torch.device) -> str | None:
    """Returns why the GPU kernels cannot run on a device and what to do about it; None where they can run."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: it needs a CUDA build of torch and an NVIDIA driver"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"the GPU is {_capability(device)}, but the GPU kernels need sm_80 (Ampere) or newer"
    try:
        import triton
    except ImportError as e:
        return f"triton cannot be imported ({' '.join(str(e).split())[:80]}): pip install 'dpllm[triton]'"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < TRITON:
        oldest = ".".join(map(str, TRITON))
        return f"triton is {triton.__version__}: pip install --upgrade 'triton>={oldest}'"
    from dpllm.kernels.triton import self_test

    failed = self_test.lacking(device)
    return (
        failed
        and f"{failed} with triton {triton.__version__}; a C compiler and the NVIDIA driver must be installed"
    )


def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _choose_for_gpu(name: str | None, device: torch.device) -> Backend:
    lacking = lacking_for_triton(device)
    if lacking is None:
        return _triton(device, "requested by name" if name else "compiled for this GPU")
    if name is not None:
        raise InputError(f"backend 'triton' cannot be used on {device}: {lacking}.")
    return _reference(f"torch operations on {device}; the GPU kernels cannot run there: {lacking}")


def choose_backend(
    name: str | None = None, device: torch.device | str = "cpu", options: CpuOptions | None = None
) -> Backend:
    """Returns the named backend, or the fastest that this machine has for the device.

    name: 'cpu' (or 'cpu:ISA' for one instruction set), 'triton' (CUDA devices), 'reference', or None to choose.
    Raises InputError for a name that does not exist or cannot run here.
    """
    options, where = options or CpuOptions(), torch.device(device)
    forking.keep_children_on_one_thread()
    if name is not None:
        kind, _, isa = name.partition(":")
        if kind not in NAMES or (isa and kind != "cpu"):
            raise InputError(
                f"unknown kernel backend '{name}'. Choose one of: {', '.join(NAMES)}, cpu:INSTRUCTION_SET."
            )
        if kind == "reference":
            return _reference("requested by name")
        if kind == "triton" and where.type != "cuda":
            raise InputError(f"backend 'triton' runs on CUDA devices, not on {device}. Use --device cuda.")
        if kind == "triton":
            return _choose_for_gpu(name, where)
        if where.type != "cpu":
            raise InputError(f"backend '{name}' runs on the CPU, not on {device}. Use --backend reference.")
        options = CpuOptions(options.threads, options.pin, isa or options.isa, options.accuracy)
    elif where.type == "cuda":
        return _choose_for_gpu(None, where)
    elif where.type != "cpu":
        return _reference(f"torch operations on {device}; this version has no faster backend for it")
    try:
        return _cpu(options, "requested by name" if name else "the fastest for this processor")
    except OSError as e:
        why = f"the native kernels cannot be loaded ({' '.join(str(e).split())[:120]})"
        mend = "install a C++ compiler (gcc or clang) and run: pip install --force-reinstall --no-deps dpllm"
        if name is not None:
            raise InputError(f"backend '{name}' cannot be used: {why}. To build them, {mend}.") from None
        return _reference(f"torch operations, many times slower: {why}. To build them, {mend}")
