"""Executes the inline assembly of Triton kernels, as text, for the 32 lanes of a warp at once.

Only what our kernels use, after the PTX ISA's description of each instruction. Registers are uint32 [32] (or uint64).
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np

LANES = 32
lane = np.arange(LANES)


def assembly(kernel: Any) -> list[str]:
    """The assembly texts in a kernel function, in order."""
    return re.findall(r'inline_asm_elementwise\(\s*"""(.*?)"""', inspect.getsource(kernel.fn), re.S)


def run(
    text: str, outputs: int, inputs: list[np.ndarray], memory: np.ndarray | None = None
) -> list[np.ndarray]:
    """Values of $0 .. after the text, given those of the operands that follow. memory: bytes from address 0."""
    registers: dict[str, Any] = {f"${outputs + i}": v for i, v in enumerate(inputs)}
    registers["%laneid"] = lane.astype(np.uint32)
    for statement in text.strip().removeprefix("{").removesuffix("}").split(";"):
        if statement.strip() and not statement.strip().startswith(".reg"):
            step(statement.strip(), registers, memory)
    return [registers[f"${i}"] for i in range(outputs)]


def step(statement: str, registers: dict[str, Any], memory: np.ndarray | None) -> None:
    name, rest = statement.split(None, 1)
    groups = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)
    into, sources = groups[0], [operand(g, registers) for g in groups[1:]]
    if name.startswith("ld.global.nc"):
        size = {"16": 2, "32": 4}[name[-2:]]
        at = sources[0].astype(np.int64)
        result = sum(memory[at + i].astype(np.uint32) << np.uint32(8 * i) for i in range(size))
    elif name.startswith("setp"):
        _, compare, *combine = name.split(".")
        result = {"eq": np.equal, "ne": np.not_equal}[compare](sources[0], sources[1])
        result = result & sources[2] if combine[0] == "and" else result
    else:
        result = INSTRUCTIONS[name](*sources)
    if into.startswith("{"):
        for part, value in zip(re.findall(r"[^{},\s]+", into), result, strict=True):
            registers[part] = value
    else:
        registers[into] = result


def operand(text: str, registers: dict[str, Any]) -> Any:
    if text.startswith(("{", "[")):
        parts = [registers[p] for p in re.findall(r"[^][{},\s]+", text)]
        return parts[0] if text.startswith("[") else parts
    if text.startswith("0f"):
        return np.full(LANES, int(text[2:], 16), np.uint32)
    if re.match(r"-?\d", text):
        return np.full(LANES, int(text, 0) & 0xFFFFFFFF, np.uint32)
    return registers[text]


def halves(word: np.ndarray) -> np.ndarray:
    """Packed pairs [32] -> float64 [32, 2]."""
    return np.ascontiguousarray(word).view(np.float16).reshape(-1, 2).astype(np.float64)


def pack_halves(values: np.ndarray) -> np.ndarray:
    """float [32, 2] -> packed pairs [32]."""
    return np.ascontiguousarray(values, np.float16).view(np.uint32)[:, 0]


def prmt(a, b, selector):
    pool = [a >> np.uint32(8 * i) & 255 for i in range(4)] + [b >> np.uint32(8 * i) & 255 for i in range(4)]
    result = np.zeros(LANES, np.uint32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & 15
        byte = np.choose(nibble & 7, pool)
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def lop3(a, b, c, table):
    result = np.zeros(LANES, np.uint32)
    for i in range(8):
        chosen = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        result |= np.where(table >> np.uint32(i) & 1, chosen, 0).astype(np.uint32)
    return result


def mov(source):
    """A register, or two of 16 bits packed into one."""
    return source if isinstance(source, np.ndarray) else (source[0] & 0xFFFF) | source[1] << np.uint32(16)


def shuffle(value, index, clamp, members):
    assert (clamp == 31).all() and (members == 0xFFFFFFFF).all()
    return value[index & 31]


def mma(a, b, c):
    """m16n8k16: float16 a [16, 16] (row) times b [16, 8] (column) plus float32 c [16, 8], in fragments of a warp."""
    group, thread = lane // 4, lane % 4
    left, right, sums = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for i, word in enumerate(a):  # rows g, g + 8 alternate; then columns + 8
        for half in range(2):
            left[group + 8 * (i % 2), 2 * thread + half + 8 * (i // 2)] = halves(word)[:, half]
    for i, word in enumerate(b):
        for half in range(2):
            right[2 * thread + half + 8 * i, group] = halves(word)[:, half]
    places = [(group + 8 * (i // 2), 2 * thread + i % 2) for i in range(4)]
    for place, word in zip(places, c, strict=True):
        sums[place] = word.view(np.float32)
    with np.errstate(invalid="ignore"):
        sums += np.einsum("ik,kj->ij", left, right)
    return [np.ascontiguousarray(sums[place], np.float32).view(np.uint32) for place in places]


INSTRUCTIONS = {
    "prmt.b32": prmt,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": lop3,
    "mov.u32": mov,
    "mov.b32": mov,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "mad.wide.u32": lambda a, b, c: a.astype(np.uint64) * b + c,
    "selp.f32": lambda a, b, p: np.where(p, a, b),
    "sub.f16x2": lambda a, b: pack_halves(halves(a) - halves(b)),
    "shfl.sync.idx.b32": shuffle,
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": mma,
}
