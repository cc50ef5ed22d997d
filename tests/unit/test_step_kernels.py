"""The step's Triton kernels: numbers through the interpreter, in a process of its own; code by the assembler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import TARGETS, Launches
from step_cases import cache_of, policy_table, site_of

from dpllm.kernels.gpu_step import tables
from dpllm.kernels.gpu_step.tables import Heads
from dpllm.kernels.triton import attention, select
from dpllm.kernels.triton import norm_silu_finish as small_ops

TESTS = Path(__file__).resolve().parents[1]
HALF, FLOAT = torch.float16, torch.float32


@pytest.mark.slow
def test_numbers_through_the_interpreter():
    files = [str(TESTS / "interpreted" / f"{name}.py") for name in ("step_kernels", "attention")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore", *files],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


# -- compiled for GPUs that are not here --------------------------------------------------------------------


def attend(
    dim: int, dtype: torch.dtype, stored: torch.dtype, heads: int = 8, group: int = 4, groups: int = 1,
    normed: bool = False,
):  # fmt: skip
    _, cache = cache_of([1] * heads, group, dim, stored, since=0)
    columns = heads * group * dim
    table = policy_table([columns] * groups, tables.WEIGHTED, parts=64)
    norms = (torch.ones(dim, dtype=dtype),) * 2 if normed else None
    shape = Heads(dim, 1e-5, norms, (torch.ones(dim // 2),) * 2)
    qkv = torch.zeros(1, columns + 2 * heads * dim, dtype=dtype)
    attention.attend(qkv, shape, cache, 0, site_of(*range(groups), columns=columns), table)


def norm(columns: int, dtype: torch.dtype, groups: int = 1):
    x, table = torch.zeros(1, columns, dtype=dtype), policy_table([columns] * groups, tables.WEIGHTED)
    site = site_of(*range(groups), first=groups == 1, columns=columns)
    small_ops.norm(x, x, x[0], 1e-5, site, table, 3.0)


def silu(columns: int, dtype: torch.dtype, groups: int):
    table = policy_table([columns] * groups, tables.WEIGHTED)
    site = site_of(*range(groups), columns=columns)
    small_ops.silu_mul(torch.zeros(1, 2 * columns, dtype=dtype), site, table)


def after_the_head(vocabulary: int):
    logits, table = torch.zeros(1, vocabulary), policy_table([64] * 128, tables.WEIGHTED)
    _, cache = cache_of([1], 1, 16, FLOAT, since=0)
    small_ops.finish(logits, torch.zeros(1, dtype=torch.int32), table, *scratch())
    small_ops.observe(logits, cache, table, 0.8)


def estimate(columns: int, dtype: torch.dtype):
    table = policy_table([columns] * 2, tables.ESTIMATED)
    select.estimate(torch.zeros(1, columns, dtype=dtype), site_of(0, 1), table, *scratch())


def select_rows(columns: int, dtype: torch.dtype):
    x = torch.zeros(2, columns, dtype=dtype)
    select.select(x, torch.zeros(columns, dtype=HALF), torch.zeros(4), 2)


def undecided():
    """A policy of fixed widths, a cache as the decoder hands it over, no biases of any kind."""
    x, table = torch.zeros(1, 4096, dtype=HALF), policy_table([4096])
    small_ops.norm(x, None, x[0], 1e-5, site_of(0), table, 3.0)
    small_ops.silu_mul(torch.zeros(1, 2 * 4096, dtype=HALF), site_of(0), table)
    runs = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
    pairs = torch.zeros(9, 128, dtype=HALF)
    attention.decode_attention(torch.zeros(32, 128, dtype=HALF), pairs, pairs, *runs, 0.1)


def scratch():
    return torch.zeros(4096), torch.zeros(8, dtype=torch.int32)


# what is launched, and how many registers a thread may take: what was seen and a little room
CASES = [
    ("attention of 128, half", attention, {"attend_kernel": 212, "join_kernel": 64}, lambda: attend(128, HALF, HALF)),
    ("attention of 64, half, normed", attention, {"attend_kernel": 164, "join_kernel": 64},
     lambda: attend(64, HALF, HALF, normed=True)),
    ("attention of 80, bfloat", attention, {"attend_kernel": 216, "join_kernel": 64},
     lambda: attend(80, torch.bfloat16, torch.bfloat16, group=7, groups=2)),
    ("attention of 128, float", attention, {"attend_kernel": 128, "join_kernel": 64},
     lambda: attend(128, FLOAT, FLOAT)),
    ("attention of 128, mixed", attention, {"attend_kernel": 218, "join_kernel": 64},
     lambda: attend(128, FLOAT, HALF)),
    ("norm of 4096", small_ops, {"norm_kernel": 64}, lambda: norm(4096, HALF)),
    ("norm of 8192", small_ops, {"norm_kernel": 104}, lambda: norm(8192, torch.bfloat16)),
    ("norm for five groups", small_ops, {"norm_kernel": 104}, lambda: norm(4096, HALF, 5)),
    ("silu", small_ops, {"silu_kernel": 48}, lambda: silu(14336, HALF, 2)),
    ("after the head", small_ops, {"finish_kernel": 48, "observe_kernel": 48}, lambda: after_the_head(128256)),
    ("fixed widths", small_ops, {"norm_kernel": 48, "silu_kernel": 48}, undecided),
    ("attention of a flat cache", attention, {"attend_kernel": 160, "join_kernel": 64}, undecided),
    ("estimate", select, {"estimate_kernel": 64}, lambda: estimate(4096, HALF)),
    ("select", select, {"select_kernel": 48}, lambda: select_rows(4096, HALF)),
    ("a width alone", select, {"decide_kernel": 48}, lambda: select.decide(3, policy_table([64] * 4, tables.WEIGHTED))),
]  # fmt: skip


KERNELS = {k: getattr(m, k) for _, m, ceilings, _ in CASES for k in ceilings}
OTHERS = [
    (small_ops, ("norm_kernel", "silu_kernel")), (attention, ("attend_kernel", "join_kernel")),
]  # fmt: skip


def targets(name: str) -> tuple[int, ...]:
    """The kernel that most models spend their attention in for all; what is seldom asked for, for two."""
    return (
        TARGETS
        if name.endswith("128, half")
        else (80, 120)
        if "float" in name or "mixed" in name
        else (80, 90, 120)
    )


def appended_before_it_is_read(code: tuple[str, ...]) -> bool:
    """Whether the new pair is stored, and a barrier passed, before pairs are loaded; the interpreter cannot tell."""
    stored = next(i for i, name in enumerate(code) if name.startswith("STG"))
    barrier = next(i for i, name in enumerate(code) if i > stored and name.startswith("BAR"))
    loads = [i for i, name in enumerate(code) if name.startswith("LDGSTS")]
    return sum(name.startswith("STG") for name in code[stored:barrier]) >= 2 and barrier < min(loads)


@pytest.mark.parametrize(("name", "module", "ceilings", "launch"), CASES, ids=[c[0] for c in CASES])
def test_compiled(monkeypatch, name, module, ceilings, launch):
    if launch is undecided:  # also launches what is not looked at in this case
        for other, kernels in OTHERS:
            for kernel in kernels:
                monkeypatch.setattr(other, kernel, Launches(getattr(other, kernel)))
    recorded = {kernel: Launches(KERNELS[kernel]) for kernel in ceilings}
    for kernel, launches in recorded.items():
        monkeypatch.setattr(module, kernel, launches)
    launch()
    for kernel, ceiling in ceilings.items():
        assert len(recorded[kernel].calls) == 1
        for target in targets(name):
            (binary,) = recorded[kernel].compile(target)
            where = f"{kernel}, sm_{target}: {binary.registers} registers, {binary.shared} B shared"
            assert binary.count("STL") + binary.count("LDL") + binary.stack == 0, f"{where} spills"
            assert binary.registers <= ceiling, where
            assert binary.shared <= 48 << 10, where
            if kernel == "attend_kernel" and "flat" not in name:
                assert appended_before_it_is_read(binary.instructions), where
            if kernel == "attend_kernel" and "half" in name:
                copies = [i for i in binary.instructions if i.startswith("LDGSTS")]
                assert copies and all(i.endswith(".128") for i in copies), f"{where}: narrow loads of pairs"
                assert any("MMA" in i for i in binary.instructions), where


def test_fake_implementations():
    """What torch.compile asks: shapes without running anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(8, 64, dtype=HALF), torch.empty(99, 64, dtype=HALF)
        runs = torch.empty(2, dtype=torch.int64), torch.empty(2, dtype=torch.int32)
        assert attention.decode_attention(q, k, k, *runs, 0.1).shape == (8, 64)
        assert select.select(torch.empty(3, 9), torch.empty(9), torch.empty(4), 2).dtype == torch.int32
