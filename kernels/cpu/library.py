"""The C interface of the library (src/api.h, src/step.h) in ctypes, and the handle that every call needs.

Structures have empty `__slots__`. Without them, a misspelt field would become a Python attribute and stay zero in C.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dpllm.base import forking
from dpllm.base.errors import InputError
from dpllm.base.machine import usable_cores
from dpllm.kernels.weight import MAX_BITS, MIN_BITS

LIBRARY = Path(__file__).with_name("_native.so")
INTERFACE = 3  # api.h: dpllm_interface; another number for every change of a function or a structure
WIDTHS = MAX_BITS + 1  # arrays in the structures are indexed by width

STORAGE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # kernels.h: Storage

Pointer = ctypes.c_void_p
Int = ctypes.c_int32
Long = ctypes.c_int64
Double = ctypes.c_double


class Matrix(ctypes.Structure):
    """`Matrix` of kernels.h."""

    __slots__ = ()
    _fields_ = (
        ("planes", Pointer), ("plane_bytes", Long), ("row_bytes", Long), ("tables", Pointer * WIDTHS),
        ("scales", Pointer * WIDTHS), ("row_scale", Pointer), ("bias", Pointer),
        ("rows", Int), ("columns", Int), ("rows_per_table", Int), ("x_digits", Int),
    )  # fmt: skip


class Accuracy(ctypes.Structure):
    """`Accuracy` of context.h."""

    __slots__ = ()
    _fields_ = (("table_digits", Int * WIDTHS), ("x_digits", Int * WIDTHS))


class Draw(ctypes.Structure):
    """`Draw` of draw.h."""

    __slots__ = ()
    _fields_ = (
        ("temperature", Double), ("top_p", Double), ("min_p", Double), ("penalty", Double), ("seen", Pointer),
        ("seen_count", Long), ("seed", ctypes.c_uint64), ("number", ctypes.c_uint32), ("top_k", Int),
    )  # fmt: skip


# Digits (1: int8, 2: 16 bits) of tables and of activations at widths 2..8. `balanced` uses two digits where that takes
# no time on hardware that is limited by memory; `exact` always uses two (bench/cpu/cpu_accuracy.py).
ACCURACIES = {
    "balanced": ((1, 1, 1, 2, 2, 1, 1), (1, 1, 1, 1, 1, 1, 1)),
    "exact": ((2,) * 7, (2,) * 7),
    "fast": ((1,) * 7, (1,) * 7),
}


@dataclass(frozen=True)
class CpuOptions:
    """Options of the CPU kernels.

    threads: number of threads; 0: one for each core that this process may use. pin: keep thread i on core i. isa: the
    instruction set to use; None: the fastest. accuracy: 'balanced', 'exact' (16-bit activations and tables) or 'fast'.
    Raises InputError for other values.
    """

    threads: int = 0
    pin: bool = False
    isa: str | None = None
    accuracy: str = "balanced"

    def __post_init__(self) -> None:
        cores = usable_cores()
        if self.threads < 0 or self.threads > cores:
            raise InputError(
                f"{self.threads} threads are not possible: this process may use {cores} "
                f"core{'s' * (cores > 1)}. Choose 1..{cores}."
            )
        if self.accuracy not in ACCURACIES:
            raise InputError(
                f"accuracy '{self.accuracy}' is unknown. Choose one of: {', '.join(ACCURACIES)}."
            )


def torch_reports(capability: str) -> bool:
    """Tells whether torch reports a capability of this processor. Old versions of torch cannot tell: False."""
    return bool(getattr(torch.cpu, capability, lambda: False)())


def multiplies_bfloat16() -> bool:
    """Tells whether this processor multiplies bfloat16 matrices faster than float32 ones."""
    return any(map(torch_reports, ("_is_amx_tile_supported", "_is_avx512_bf16_supported")))


@cache
def load_library() -> ctypes.CDLL:
    """Loads the shared library and declares its signatures. Raises OSError where it is missing or does not load."""
    lib = ctypes.CDLL(str(LIBRARY))
    signatures = {
        "dpllm_interface": (Int,),
        "dpllm_isa_name": (ctypes.c_char_p, Int),
        "dpllm_isa_needs": (ctypes.c_char_p, Int),
        "dpllm_isa_supported": (Int, Int),
        "dpllm_open": (Pointer, Int, Int, Int, Pointer),
        "dpllm_close": (None, Pointer),
        "dpllm_hold": (None, Pointer),
        "dpllm_release": (None, Pointer),
        "dpllm_forked": (None, Pointer),
        "dpllm_digits": (None, Pointer, Long, Int, Pointer, Pointer),
        "dpllm_gemm": (None, Pointer, Pointer, Pointer, Pointer, Int, Pointer),
        "dpllm_matmul": (None, Pointer, Pointer, Pointer, Int, Int, Int, Pointer),
        "dpllm_dequantize": (None, Pointer, Pointer, Int, Int, Pointer, Int, Int),
        "dpllm_int8_gemm": (None, Pointer, Pointer, Pointer, Int, Int, Pointer, Int, Pointer),
        "dpllm_weighted_square": (None, Pointer, Pointer, Pointer, Int, Int, Pointer),
        "dpllm_attention": (
            None, Pointer, Pointer, Pointer, Pointer, Int, Pointer, Pointer, Int, Int, Int,
            ctypes.c_float, Pointer,
        ),
        "dpllm_prompt_attention": (
            None, Pointer, Pointer, Pointer, Pointer, Int, Pointer, Pointer, Int, Int, Int, Int, Int,
            ctypes.c_float, Pointer,
        ),
        "dpllm_attention_peaks": (
            None, Pointer, Pointer, Pointer, Int, Int, Int, Int, Int, Int, Int, Int, ctypes.c_float,
            Pointer, Pointer,
        ),
        "dpllm_draw": (Int, Pointer, Pointer, Int, Pointer),
        "dpllm_read_bandwidth": (ctypes.c_double, Pointer, Pointer, Long),
        "dpllm_descend": (None, Pointer, Pointer, Int),
        "dpllm_table_values": (None, Pointer, Pointer, Pointer, Int, Int, Int, Int, Int, Pointer),
        "dpllm_table_sums": (None, Pointer, Pointer, Pointer, Pointer, Int, Int, Int, Int, Int, Pointer),
        "dpllm_nested_codes": (None, Pointer, Pointer, Pointer, Int, Int, Int, Int, Int, Pointer, Pointer),
        "dpllm_step_open": (Pointer, Pointer, Pointer),
        "dpllm_step_close": (None, Pointer),
        "dpllm_step_rows": (Int, Pointer, Pointer, Pointer, Pointer),
    }  # fmt: skip
    for name, (result, *arguments) in signatures.items():
        function = getattr(lib, name, None)
        if function is None:
            raise OSError(f"{LIBRARY.name} was built from another version: it lacks {name}")
        function.restype, function.argtypes = result, arguments
    if (number := lib.dpllm_interface()) != INTERFACE:
        raise OSError(
            f"{LIBRARY.name} was built from another version: it has interface {number}, not {INTERFACE}. "
            "Build it again: pip install -e ."
        )
    return lib


@dataclass(frozen=True)
class InstructionSet:
    """One variant that is compiled into the library. supported: whether this processor can run it."""

    index: int
    name: str
    needs: str
    supported: bool


def instruction_sets() -> list[InstructionSet]:
    """Returns every variant in the library, the fastest first."""
    lib = load_library()
    found: list[InstructionSet] = []
    while (name := lib.dpllm_isa_name(len(found))) is not None:
        i = len(found)
        found.append(
            InstructionSet(
                i, name.decode(), lib.dpllm_isa_needs(i).decode(), bool(lib.dpllm_isa_supported(i))
            )
        )
    return found


def choose_isa(name: str | None) -> InstructionSet:
    """Returns the named variant, or the fastest for this processor. Raises InputError where it cannot be used."""
    variants = instruction_sets()
    usable = [v for v in variants if v.supported]
    if name is None:
        return usable[0]
    for variant in variants:
        if variant.name == name and variant.supported:
            return variant
        if variant.name == name:
            raise InputError(
                f"this processor does not run '{name}' (it needs {variant.needs}). "
                f"Choose one of: {', '.join(v.name for v in usable)}."
            )
    raise InputError(
        f"this build has no instruction set '{name}'. Choose one of: {', '.join(v.name for v in usable)}."
    )


class Handle:
    """An opened library: instruction set, threads, accuracy. Closed with the last reference to it.

    Several Python threads may share a handle. Its thread pool serves one call at a time; the library itself makes the
    calls take turns. A process that was forked from this one has a pool of its own (dpllm/base/forking.py).
    """

    def __init__(self, options: CpuOptions = CpuOptions()):
        self.lib = load_library()
        self.isa = choose_isa(options.isa)
        self.threads = options.threads or usable_cores()
        self.options = options
        accuracy = Accuracy()
        for digits, chosen in zip(
            (accuracy.table_digits, accuracy.x_digits), ACCURACIES[options.accuracy], strict=True
        ):
            for bits, count in enumerate(chosen, MIN_BITS):
                digits[bits] = count
        self.context = self.lib.dpllm_open(
            self.isa.index, self.threads, int(options.pin), ctypes.byref(accuracy)
        )
        forking.watch(self)

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a function of the library on this handle's context, in turn with other threads."""
        function: Callable[..., Any] = getattr(self.lib, name)
        return function(self.context, *arguments)

    def hold(self) -> None:
        """Waits until no call is under way, and lets none begin in other threads before `release`."""
        self.lib.dpllm_hold(self.context)

    def release(self) -> None:
        """Ends `hold`."""
        self.lib.dpllm_release(self.context)

    def renew(self) -> None:
        """Gives the handle, which was held when this process was forked, threads of this process."""
        self.lib.dpllm_forked(self.context)

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.lib.dpllm_close(self.context)
