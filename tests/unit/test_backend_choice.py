"""Which kernels are used, why, and what is said where something else was asked for."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cpu_cases import needs_library

from dpllm.base.errors import InputError
from dpllm.base.machine import usable_cores
from dpllm.diagnostics import examination
from dpllm.kernels.backend import choose_backend
from dpllm.kernels.cpu import library
from dpllm.kernels.cpu.library import ACCURACIES, CpuOptions, choose_isa
from dpllm.model.hardware import cpu_options


def refuses(says: str):
    """One line that matches."""
    return pytest.raises(InputError, match=rf"\A[^\n]*{says}[^\n]*\Z")


@pytest.fixture
def lacking(monkeypatch):
    """A factory of machines where the library is this file."""

    def replace_by(path):
        monkeypatch.setattr(library, "LIBRARY", path)
        library.load_library.cache_clear()

    yield replace_by
    library.load_library.cache_clear()


@pytest.fixture(params=["missing", "no library", "another library"])
def without_library(request, lacking, tmp_path):
    path = tmp_path / "_native.so"
    if request.param == "no library":
        path.write_text("this is no library")
    lacking(type(path)(torch._C.__file__) if request.param == "another library" else path)


# -- by name, or the best there is --------------------------------------------------------------------------


@needs_library
def test_the_native_kernels_are_the_default():
    backend = choose_backend()
    best = choose_isa(None)
    assert backend.name == f"cpu:{best.name}"
    assert "the fastest for this processor" in backend.reason
    assert best.needs in backend.reason
    assert f"{usable_cores()} threads" in backend.reason
    assert "accuracy balanced" in backend.reason
    assert backend.cpu is not None


@needs_library
@pytest.mark.parametrize("isa", [None, "portable"])
def test_the_native_kernels_by_name(isa):
    backend = choose_backend("cpu" if isa is None else f"cpu:{isa}", options=CpuOptions(accuracy="exact"))
    assert backend.name == f"cpu:{choose_isa(isa).name}"
    assert "requested by name" in backend.reason
    assert "accuracy exact" in backend.reason
    assert choose_backend(options=CpuOptions(isa="portable")).name == "cpu:portable"


def test_the_reference_by_name():
    backend = choose_backend("reference", "meta")
    assert (backend.name, backend.cpu) == ("reference", None)
    assert "by name" in backend.reason


@pytest.mark.parametrize("name", ["abacus", "", "CPU", "reference:avx2", "cuda", "abacus:portable"])
def test_unknown_backends(name):
    with refuses(f"unknown kernel backend '{name}'.*cpu, triton, reference"):
        choose_backend(name)


@needs_library
@pytest.mark.parametrize("name", ["cpu:mmx", "cpu:AVX2", "cpu:portable:portable"])
def test_unknown_instruction_sets(name):
    with refuses(f"no instruction set '{name[4:]}'.*portable"):
        choose_backend(name)


@needs_library
def test_an_instruction_set_that_this_processor_lacks(monkeypatch):
    variants = library.instruction_sets()
    first = next(v for v in variants if v.supported)
    lacking = [replace(v, supported=v.supported and v != first) for v in variants]
    monkeypatch.setattr(library, "instruction_sets", lambda: lacking)
    with refuses(f"does not run '{first.name}'.*{first.needs}.*portable") as e:
        choose_backend(f"cpu:{first.name}")
    assert first.name not in str(e.value).partition("Choose one of: ")[2].rstrip(".").split(", ")
    assert choose_isa(None) == next(v for v in lacking if v.supported)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "meta"])
def test_other_devices(device):
    backend = choose_backend(device=device)
    assert backend.name == "reference"
    assert device in backend.reason
    for name in ("cpu", "cpu:portable"):
        with refuses(f"'{name}' runs on the CPU, not on {device}"):
            choose_backend(name, device)


@needs_library
def test_every_accuracy_has_a_meaning_at_every_width():
    for digits in ACCURACIES.values():
        assert [len(d) for d in digits] == [7, 7]
        assert {n for d in digits for n in d} <= {1, 2}
        assert all(t >= x for t, x in zip(*digits, strict=True)), (
            "16-bit activations take 16-bit tables along"
        )


# -- threads and accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [-1, 4096])
def test_impossible_thread_counts(threads):
    cores = usable_cores()
    with refuses(f"{threads} threads are not possible.*{cores} core.*1..{cores}"):
        CpuOptions(threads=threads)


@pytest.mark.parametrize(
    ("threads", "says"),
    [
        (0, "0 threads are not possible.*at least 1"),
        (-1, "-1 threads are not possible.*at least 1"),
        (4096, "4096 threads"),
    ],
)
def test_impossible_thread_counts_of_a_command(threads, says):
    before = torch.get_num_threads()
    with refuses(says):
        cpu_options(threads)
    assert torch.get_num_threads() == before


@needs_library
def test_thread_counts():
    assert choose_backend(options=CpuOptions(threads=0)).cpu.handle.threads == usable_cores()
    assert choose_backend("cpu", options=CpuOptions(threads=1)).cpu.handle.threads == 1
    before = torch.get_num_threads()
    try:
        assert cpu_options(1) == CpuOptions(threads=1)
        assert torch.get_num_threads() == 1, "torch does not fight for the other cores"
    finally:
        torch.set_num_threads(before)
    assert cpu_options(None, "fast", pin=True) == CpuOptions(accuracy="fast", pin=True)
    assert torch.get_num_threads() == before


@needs_library
def test_pinned_threads_compute_the_same():
    """And leave the caller's own cores alone."""
    from cpu_cases import inputs, kernels_of, options_of, weights_of, widths_of

    cores = usable_cores()
    options = replace(CpuOptions(), pin=True, accuracy="exact", threads=min(2, cores))
    pinned, w, x = choose_backend(options=options), weights_of(301, 1100), inputs(2, 1100)
    assert options_of().pin is False
    expected = kernels_of().gemv(x, w.prepared, widths_of(3, 6))
    assert torch.equal(pinned.gemv(x, w.prepared, widths_of(3, 6)), expected)
    assert usable_cores() == cores


@pytest.mark.parametrize("accuracy", ["best", "", "Exact"])
def test_unknown_accuracies(accuracy):
    with refuses(f"accuracy '{accuracy}' is unknown.*balanced, exact, fast"):
        CpuOptions(accuracy=accuracy)


# -- no library ---------------------------------------------------------------------------------------------


def test_without_the_library_torch_computes(without_library):
    backend = choose_backend()
    assert (backend.name, backend.cpu) == ("reference", None)
    assert "slower" in backend.reason
    assert "compiler" in backend.reason and "pip install" in backend.reason, "what would make it faster"
    assert "\n" not in backend.reason


@pytest.mark.parametrize("name", ["cpu", "cpu:portable"])
def test_without_the_library_its_name_is_refused(without_library, name):
    with refuses(f"backend '{name}' cannot be used.*pip install"):
        choose_backend(name)


@needs_library
def test_a_library_that_appears_is_used(lacking, tmp_path):
    built = library.LIBRARY
    lacking(tmp_path / "_native.so")
    assert choose_backend().name == "reference"
    lacking(built)
    assert choose_backend().name.startswith("cpu:")


# -- doctor -------------------------------------------------------------------------------------------------


@pytest.fixture
def report(capsys, monkeypatch):
    """What `dpllm doctor --json` says."""
    import json

    from dpllm.commands.main import main

    def run():
        monkeypatch.setattr(sys, "argv", ["dpllm", "doctor", "--json"])
        with pytest.raises(SystemExit) as e:
            main()
        assert e.value.code == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@needs_library
def test_doctor_lists_what_the_library_offers(report):
    found = report()
    variants = library.instruction_sets()
    assert list(found["instruction_sets"]) == [v.name for v in variants]
    usable = {v.name for v in variants if v.supported}
    assert {n for n, state in found["instruction_sets"].items() if state == "runs here"} == usable
    assert set(found["gemv_relative_error"]) == {"reference", *(f"cpu:{n}" for n in usable)}
    assert found["backend"]["name"] == f"cpu:{choose_isa(None).name}"
    for errors in found["gemv_relative_error"].values():
        assert set(errors) == {str(b) for b in range(2, 9)}
        assert all(0 < e < 1e-4 for e in errors.values())
    assert found["ok"] is True


def test_doctor_without_the_library(without_library, report):
    found = report()
    assert found["backend"]["name"] == "reference"
    assert "pip install" in found["backend"]["reason"]
    assert found["instruction_sets"] == {}
    assert set(found["gemv_relative_error"]) == {"reference"}
    assert found["ok"] is True


@needs_library
def test_doctor_notices_wrong_results(report, monkeypatch):
    monkeypatch.setattr(examination, "TOLERANCE", 1e-9)
    assert report()["ok"] is False


def test_doctor_of_a_gpu_that_does_not_work(monkeypatch):
    """Says so in a line and is not well; there is none here, so its kernels cannot run."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert examination.examine_gpu() is None
    monkeypatch.setattr(examination.gpu_info, "describe", lambda: {"name": "a GPU", "capability": "9.0"})
    monkeypatch.setattr(examination.gpu_info, "copy_gb_per_s", lambda: 123.45)
    found = examination.examine_gpu()
    assert found["ok"] is False
    assert found["kernels"].startswith("cannot run: ") and "\n" not in found["kernels"]
    assert abs(found["copy_gb_per_s"] - 123.45) < 0.1
    assert found["backend"]["name"] and found["backend"]["reason"]


def test_doctor_of_a_gpu_that_others_fill(monkeypatch):
    """Its bandwidth is left out, with the reason; its kernels are looked at all the same."""
    monkeypatch.setattr(examination.gpu_info, "describe", lambda: {"name": "a GPU"})
    monkeypatch.setattr(
        examination, "choose_backend", lambda device: SimpleNamespace(name="triton", reason="")
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 10**8, 10**10))
    monkeypatch.setattr(examination.gpu_info, "check_step_kernels", lambda device: {"norm": 1e-4})
    monkeypatch.setattr(examination.gpu_info, "check_products", lambda device: {"gemm": wrong})
    for wrong in (1e-4, 1.0):
        found = examination.examine_gpu()
        assert found["copy_gb_per_s"] is None
        assert found["copy"] == "cannot run: 300 MB of the GPU's memory are free, 537 are needed"
        assert found["kernel_errors"] == {"step: norm": 1e-4, "gemm": wrong}
        assert found["ok"] is (wrong < 1)


def test_a_copy_fits_into_what_is_free(monkeypatch):
    for free, size in ((10**11, 1 << 30), (10**9, 25 * 10**7)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 10**12))
        assert examination.gpu_info.copy_bytes() == size
