"""Compiles the kernels of products for five kinds of GPU and compares their machine code with gpu_code.json.

    python tests/support/gpu_code.py                  the widths that matter most, as every test run checks them
    python tests/support/gpu_code.py --all            every kernel for every target
    python tests/support/gpu_code.py --all --write    ... and makes that the table

The table is for one version of Triton; under another, differences are shown and only what must never be (spills,
barriers in a loop, narrow loads, another layout) is an error. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from ahead_of_time import TARGETS, Binary, Launches

from dpllm.kernels.gpu_step.tables import PARTS, PolicyTable
from dpllm.kernels.triton import activations, products
from dpllm.kernels.triton.pack import TritonWeight, table_offset
from dpllm.kernels.weight import Int8Weight

TABLE = Path(__file__).with_suffix(".json")
WORSE = 1.05  # instructions for each weight against the table: more than this fails
MORE_REGISTERS = 8
ROW = (
    "#ttg.blocked<{sizePerThread = [1, %d], threadsPerWarp = [1, 32], warpsPerCTA = [4, 1], order = [1, 0]}>"
)


@dataclass(frozen=True)
class Found:
    """per_weight: instructions of the main loop for each weight that a thread decodes in it; 0 where not counted."""

    registers: int
    instructions: int
    per_weight: float


def weight(n: int, k: int, low: int, high: int) -> TritonWeight:
    """Zeros: only shapes and types matter."""
    planes = torch.zeros(high, 1, 1, dtype=torch.int32).expand(high, n, k // 32)
    tables = torch.zeros(1, dtype=torch.uint8).expand(table_offset(n, high + 1, 2))
    return TritonWeight(planes, tables, n, k, 2, None, (low, high))


def product(low: int, high: int, k: int = 4096, m: int = 1, dtype: torch.dtype = torch.float16) -> None:
    """A product with a matrix of 4096 rows."""
    bits = torch.zeros(m, dtype=torch.int32)
    products.gemv(torch.zeros(m, k, dtype=dtype), weight(4096, k, low, high), bits)


def choosing(low: int, high: int, k: int = 4096, parts: int = PARTS) -> None:
    """A product that chooses its width."""
    table = PolicyTable.empty([0.5, 0.5], k, torch.device("cpu"), parts)
    products.chosen_gemv(torch.zeros(1, k).half(), weight(4096, k, low, high), None, 0, table, torch.mv)


def head(m: int) -> None:
    """The int8 head of 4096 columns."""
    values = torch.zeros(1, 1, dtype=torch.int8).expand(128256, 4096)
    with patch.object(torch.Tensor, "is_contiguous", lambda self: True):
        products.int8_linear(torch.zeros(m, 4096).half(), Int8Weight(values, torch.zeros(128256).half()))


CASES = {
    **{f"gemv {b}": lambda b=b: product(b, b) for b in range(2, 9)},
    **{f"gemv {b}, K 14336": lambda b=b: product(b, b, 14336) for b in (3, 4, 6)},
    **{f"gemv {b}, K 11008": lambda b=b: product(b, b, 11008) for b in (3, 4, 6)},
    "gemv 3-4": lambda: product(3, 4),
    "gemv 2-6": lambda: product(2, 6),
    "gemv 2-8": lambda: product(2, 8),
    "gemv 2-6, choosing": lambda: choosing(2, 6),
    "gemv 2-6, choosing, K 14336": lambda: choosing(2, 6, 14336),
    "gemv 3-4, choosing by 64 parts": lambda: choosing(3, 4, parts=64),
    **{f"gemm {b}, 16 rows": lambda b=b: product(b, b, m=16) for b in (3, 4, 6)},
    "gemm 3-4, 16 rows": lambda: product(3, 4, m=16),
    "gemm 4, 32 rows": lambda: product(4, 4, m=32),
    "gemm 6, 64 rows": lambda: product(6, 6, m=64),
    **{f"dense {b}": lambda b=b: products.dequantize(weight(4096, 4096, 2, b), b, torch.float16) for b in (4, 6)},
    "int8 head": lambda: head(1),
    "int8 head, 16 rows": lambda: head(16),
    "activations": lambda: product(2, 2, dtype=torch.bfloat16),
}  # fmt: skip
ALWAYS = {"gemv 3", "gemv 6"}  # for every target, in every run
ONE_TARGET = {
    "gemv 8", "gemv 2-6, choosing", "gemv 3-4, choosing by 64 parts", "gemv 4, K 14336", "gemm 4, 16 rows",
    "gemm 6, 64 rows", "dense 6", "int8 head", "activations",
}  # fmt: skip
KERNELS = {
    "gemv_kernel": products, "gemm_kernel": products, "dequantize_kernel": products, "int8_gemv_kernel": products,
    "int8_gemm_kernel": products, "halve_kernel": activations,
}  # fmt: skip


def compiled(case: str, target: int) -> Binary:
    """What the case launches (its last launch), as machine code."""
    recorded = {name: Launches(getattr(module, name)) for name, module in KERNELS.items()}
    patches = [patch.object(KERNELS[name], name, launches) for name, launches in recorded.items()]
    for p in patches:
        p.start()
    try:
        CASES[case]()
    finally:
        for p in patches:
            p.stop()
    if case == "activations":
        recorded = {"halve_kernel": recorded["halve_kernel"]}
    (used,) = [launches for name, launches in recorded.items() if launches.calls and (name != "halve_kernel" or case == "activations")]  # fmt: skip  # noqa: E501
    return used.compile(target)[-1]


def look(case: str, target: int) -> tuple[Found, list[str]]:
    """(figures, what must never be)."""
    binary = compiled(case, target)
    loops = binary.loops()
    main, wrong = loops[0] if loops else (), []
    if binary.spills:
        wrong.append(f"{binary.spills} spilled")
    if binary.shared > 48 << 10:
        wrong.append(f"{binary.shared} B of shared memory")
    per_weight = 0.0
    if case.startswith(("gemv", "int8 head")) and "rows" not in case:
        lanes = 2 if "K 14336" in case else 4
        if ROW % lanes not in binary.ttgir or re.search(r"convert_layout.*tensor<\d+x\d+x", binary.ttgir):
            wrong.append("a layout that the kernel does not allow")
        for loop in loops:
            bad = {n for n in loop if n.startswith(("BAR", "LDS", "STS", "ATOM"))}
            if bad:
                wrong.append(f"{', '.join(sorted(bad))} in a loop")
        wide = f".{32 * lanes}"
        narrow = [n for n in main if n.startswith("LDG") and wide not in n and ".U16" not in n]
        if narrow:
            wrong.append(f"loads that are not {wide[1:]} bits wide: {', '.join(sorted(set(narrow)))}")
        loads = [n for n in binary.instructions if n.startswith("LDG")]
        if "choosing" in case:
            if not all(wide in n for n in loads[:4]):
                wrong.append("the planes of both rows that every width needs are not requested first")
            if any(
                n.startswith("BAR") for n in binary.instructions[: binary.instructions.index("REDUX.MAX.S32")]
            ):
                wrong.append("a barrier before the width is known")
        if not any("MMA" in n for n in main):
            wrong.append("no tensor core instruction")
        per_weight = round(len(main) / (2 * lanes * (4 if case == "int8 head" else 32)), 3)
    elif case.startswith(("gemm", "int8")) and not any("MMA" in n for n in binary.instructions):
        wrong.append("no tensor core instruction")
    return Found(binary.registers, len(binary.code), per_weight), wrong


def compare(found: Found, row: dict | None) -> list[str]:
    """Why `found` is worse than the table's row."""
    if row is None:
        return ["not in the table: run tests/support/gpu_code.py --all --write"]
    said = []
    if found.per_weight > WORSE * row["per_weight"]:
        said.append(f"{found.per_weight} instructions a weight, were {row['per_weight']}")
    if found.registers > row["registers"] + MORE_REGISTERS:
        said.append(f"{found.registers} registers, were {row['registers']}")
    if found.instructions > 1.15 * row["instructions"] + 64:
        said.append(f"{found.instructions} instructions, were {row['instructions']}")
    return said


def run(job: tuple[str, int]) -> tuple[str, int, Found, list[str], float]:
    """One kernel for one target."""
    began = time.perf_counter()
    found, wrong = look(*job)
    return *job, found, wrong, time.perf_counter() - began


def main() -> int:
    """0: as good as the table says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", nargs="+", default=("",), help="cases whose names start so")
    options = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": triton.__version__, "rows": {}}
    gated = table["triton"] == triton.__version__ and not options.write
    jobs = [
        (case, target)
        for target in TARGETS
        for case in CASES
        if options.all or case in ALWAYS or (case in ONE_TARGET and target == 90)
    ]
    jobs = [j for j in jobs if j[0].startswith(tuple(options.only))]
    rows, failed = {}, 0
    print(f"triton {triton.__version__}, the table's is {table['triton']}", flush=True)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        for case, target, found, wrong, seconds in pool.map(run, jobs):
            key = f"{case} sm_{target}"
            rows[key] = asdict(found)
            worse = compare(found, table["rows"].get(key)) if not options.write else []
            failed += bool(wrong or (gated and worse))
            print(
                f"{key:28s} {found.per_weight:6.3f}/weight {found.registers:4d} registers {found.instructions:6d} "
                f"instructions {seconds:5.1f} s  {'; '.join(wrong + worse)}",
                flush=True,
            )
    if options.write:
        TABLE.write_text(
            json.dumps({"triton": triton.__version__, "rows": table["rows"] | rows}, indent=1) + "\n"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
