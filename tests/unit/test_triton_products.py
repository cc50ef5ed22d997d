"""The products' Triton kernels: numbers through the interpreter, in a process of its own; machine code by the
assembler, for GPUs that are not here; what torch.compile and the choice of a backend see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from dpllm.base.errors import InputError
from dpllm.kernels.backend import choose_backend
from dpllm.kernels.triton import products
from dpllm.kernels.triton import self_test as trial
from dpllm.kernels.triton.pack import TritonWeight, pack_plane, table_offset
from dpllm.kernels.weight import Int8Weight, unpack

TESTS = Path(__file__).resolve().parents[1]


def process(*command: str, **env: str) -> None:
    run = subprocess.run(
        [sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"} | env, cwd=TESTS.parent,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.slow
def test_numbers_through_the_interpreter():
    file = str(TESTS / "interpreted" / "products.py")
    process("-m", "pytest", "-q", "-W", "ignore", file, TRITON_INTERPRET="1")


def test_machine_code():
    """No spills, wide loads, no barriers, instructions a weight: tests/support/gpu_code.json."""
    process(str(TESTS / "support" / "gpu_code.py"))


def test_the_order_of_columns():
    """Bit q or q + 8 of word kw: column 2 (m KW + kw) and the next."""
    plane = torch.randint(-(2**31), 2**31 - 1, (3, 5), generator=torch.Generator().manual_seed(0)).to(
        torch.int32
    )
    stored = torch.nn.functional.pad(unpack(plane[None], 160), (0, 96))  # 8 words a row
    bits = unpack(pack_plane(plane, 8)[None], 256).view(3, 8, 32)
    for m in range(16):
        q = m if m < 8 else m + 8
        for kw in range(8):
            for half in range(2):
                assert torch.equal(bits[:, kw, q + 8 * half], stored[:, 2 * (m * 8 + kw) + half])


def test_fake_tensors_pass_through():
    """Shapes and types without a device, as torch.compile asks for them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        planes = torch.empty(6, 30, 12, dtype=torch.int32)
        tables = torch.empty(table_offset(10, 7, 2), dtype=torch.uint8)
        w = TritonWeight(planes, tables, 10, 380, 2, torch.empty(30), (2, 6))
        x = torch.empty(3, 380, dtype=torch.bfloat16)
        y = products.gemv(x, w, torch.empty(3, dtype=torch.int32))
        assert (y.shape, y.dtype) == ((3, 30), torch.bfloat16)
        assert products.matmul(torch.empty(200, 380), w).shape == (200, 30)
        head = Int8Weight(torch.empty(50, 384, dtype=torch.int8), torch.empty(50))
        assert products.int8_linear(torch.empty(1, 384), head).shape == (1, 50)


# -- the choice ---------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU of this capability."""

    def pretend(major: int, minor: int = 0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
        monkeypatch.setattr(trial, "lacking", lambda device: None)

    return pretend


@pytest.mark.parametrize("name", [None, "triton"])
def test_a_gpu_gets_triton(gpu, name):
    gpu(9)
    backend = choose_backend(name, "cuda:0")
    assert (backend.name, backend.cpu) == ("triton", None)
    assert backend.gemv is products.gemv
    assert "Some GPU" in backend.reason and "sm_90" in backend.reason and "\n" not in backend.reason


@pytest.mark.parametrize("lacking", ["capability", "triton", "an old triton", "a compiler"])
def test_a_gpu_without_what_it_takes(gpu, monkeypatch, lacking):
    gpu(7 if lacking == "capability" else 9, 5)
    if lacking == "triton":
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "dpllm.kernels.triton.products")
    if lacking == "an old triton":
        monkeypatch.setattr(sys.modules["triton"], "__version__", "3.2.0")
    if lacking == "a compiler":
        monkeypatch.setattr(trial, "lacking", lambda device: "a first product fails (OSError: gcc)")
    says = {"capability": "sm_75", "a compiler": "C compiler"}.get(lacking, "pip install")
    backend = choose_backend(device="cuda")
    assert backend.name == "reference"
    assert says in backend.reason and "\n" not in backend.reason
    with pytest.raises(InputError, match=rf"\A[^\n]*'triton' cannot be used[^\n]*{says}[^\n]*\Z"):
        choose_backend("triton", "cuda")


def test_a_first_product_that_fails_is_a_reason():
    """There is no GPU here to launch it on."""
    why = trial.lacking(torch.device("cpu"))
    assert why is not None and why.startswith("a test product fails (") and "\n" not in why


def test_triton_by_name_on_the_cpu():
    with pytest.raises(InputError, match=r"\A[^\n]*'triton' runs on CUDA devices, not on cpu[^\n]*\Z"):
        choose_backend("triton", "cpu")
