"""Compiles Triton kernels for GPUs that are not there, exactly as their wrappers launch them, and reads what the
assembler says of the result."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = (80, 87, 89, 90, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)([^;]*);", re.M)


@dataclass(frozen=True)
class Binary:
    """registers a thread, bytes of stack and of shared memory, the instructions (address, name, operands) in order,
    and Triton's last form of the kernel that still has layouts."""

    registers: int
    stack: int
    shared: int
    code: tuple[tuple[int, str, str], ...]
    ttgir: str

    @property
    def instructions(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(name for _, name, _ in self.code)

    def count(self, start: str) -> int:
        """Instructions whose name starts so."""
        return sum(i.startswith(start) for i in self.instructions)

    @property
    def spills(self) -> int:
        """Loads and stores of thread-local memory, and bytes of stack."""
        return self.count("STL") + self.count("LDL") + self.stack

    def loops(self) -> list[tuple[str, ...]]:
        """The names in each loop, the longest first: what lies between a branch back and its target."""
        found = []
        for at, name, operands in self.code:
            targets = re.findall(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else []
            if targets and int(targets[-1], 16) < at:
                start = int(targets[-1], 16)
                found.append(tuple(n for a, n, _ in self.code if start <= a <= at and n != "NOP"))
        return sorted(found, key=len, reverse=True)


class Launches:
    """Stands in for a kernel in its module: keeps what it is launched with instead of running it."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.calls: list[tuple[tuple, dict]] = []

    def __getitem__(self, grid: tuple) -> Callable:
        return lambda *args, **kwargs: self.calls.append((args, kwargs))

    def compile(self, target: int) -> list[Binary]:
        """Every launch for one target, e.g. 90."""
        return [_compile(self.kernel, args, kwargs, target) for args, kwargs in self.calls]


def _compile(kernel: Any, args: tuple, kwargs: dict, target: int) -> Binary:
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    options = {k: v for k, v in kwargs.items() if k not in names}
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(kernel.params):
        value = values[p.name]
        if p.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[p.name], constants[(i,)] = "constexpr", value
            continue
        aligned = not p.do_not_specialize_on_alignment
        if isinstance(value, torch.Tensor):
            signature[p.name] = "*" + TYPES[value.dtype]
        else:
            signature[p.name] = "fp32" if isinstance(value, float) else "i32"
            aligned = aligned and isinstance(value, int) and value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (_tool("cuobjdump", option, file.name) for option in ("-res-usage", "-sass"))
    numbers = {k: int(re.findall(rf"{k}:(\d+)", usage)[-1]) for k in ("REG", "STACK", "SHARED")}
    shared = max(numbers["SHARED"], made.metadata.shared)
    read = tuple((int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(code))
    return Binary(numbers["REG"], numbers["STACK"], shared, read, made.asm["ttgir"])


def _tool(name: str, *args: str) -> str:
    run = subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr
