"""Which code each result measures, and how to measure it again: the table that bench/stale.py reads.

An entry belongs to the result of that name in bench/results/. Paths are folders or files as they are today; earlier
names are found in git's history. The script that measures is always among them.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Evidence:
    """What makes a result. script: the module that measures it. exercises: folders and files of the code that it runs.
    arguments: of the command line. work: a folder that keeps what was measured between runs, if there is one."""

    script: str
    exercises: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    work: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """`exercises`, and the script's own file."""
        return (*self.exercises, self.script.replace(".", "/") + ".py")

    @property
    def command(self) -> str:
        """The shell command that measures everything again, from the root of the repository."""
        run = shlex.join(["python", "-m", self.script, *self.arguments])
        return f"rm -rf {self.work} && {run}" if self.work else run


CPU_KERNELS = ("kernels/cpu", "kernels/backend.py", "kernels/weight.py")
GPU_KERNELS = ("kernels/triton", "kernels/gpu_step", "kernels/backend.py", "kernels/weight.py")
STEP = ("dpllm/model", "dpllm/decode", "dpllm/policies", "calib/runtime", "kvzip_bridge/cache.py")
ENGINE = ("dpllm/engine.py", *STEP, *CPU_KERNELS)
REFERENCE_MODEL = ("dpllm/reference",)
CONTROL = ("dpllm/control", "dpllm/planning", "bench/common/random_engine.py")
TEXTS = ("bench/quality/texts.py", "bench/reference_model/reference_corpus.py")
QUANTISER = ("quant", "kernels/weight.py")
CACHE = ("kvzip_bridge", "dpllm/context")
LLAMA_CPP = (*STEP, *CPU_KERNELS, "bench/peers")
KV_QUALITY = (*ENGINE, *CACHE, *REFERENCE_MODEL, "bench/kv", "bench/reference_model/reference_corpus.py")
OTHER_PYTHON = ("--python", "OTHER_ENV/bin/python")  # an interpreter that has llama-cpp-python and gguf

EVIDENCE = {
    "control_quality": Evidence(
        "bench.quality.control_quality",
        (*ENGINE, *REFERENCE_MODEL, *CONTROL, "dpllm/evaluation"),
    ),
    "cpu_accuracy": Evidence(
        "bench.cpu.cpu_accuracy", (*ENGINE, *REFERENCE_MODEL, "kernels/reference.py", "dpllm/evaluation"),
        ("--max-tokens", "4000"),
    ),
    "cpu_attention": Evidence("bench.cpu.cpu_attention", (*CPU_KERNELS, "kernels/reference.py")),
    "cpu_decode": Evidence("bench.cpu.cpu_decode", (*ENGINE, *REFERENCE_MODEL, "bench/cpu/cpu_vs_llama_cpp.py")),
    "cpu_load": Evidence("bench.cpu.cpu_load", ("dpllm/model", "quant", "dpllm/base", *CPU_KERNELS)),
    "cpu_prompt": Evidence("bench.cpu.cpu_prompt", ("dpllm/model", *CPU_KERNELS, "bench/cpu/cpu_attention.py")),
    "cpu_sampling": Evidence("bench.cpu.cpu_sampling", ("dpllm/decode/sampling.py", *CPU_KERNELS)),
    "cpu_vs_llama_cpp": Evidence("bench.cpu.cpu_vs_llama_cpp", LLAMA_CPP, (*OTHER_PYTHON, "--rounds", "4")),
    "cpu_vs_llama_cpp_8b": Evidence(
        "bench.cpu.cpu_vs_llama_cpp", LLAMA_CPP,
        ("--shape", "8B", "--bits", "4", "--rounds", "2", "--only-llama-cpp", *OTHER_PYTHON),
    ),
    "gpu_decode": Evidence("bench.gpu.gpu_decode", (*STEP, *GPU_KERNELS, "bench/gpu/gpu_common.py")),
    "gpu_decode_*": Evidence(
        "bench.gpu.gpu_decode", (*STEP, *GPU_KERNELS, "bench/gpu/gpu_common.py"), ("--shape", "SHAPE")
    ),
    "gpu_kernels": Evidence("bench.gpu.gpu_kernels", (*GPU_KERNELS, "bench/gpu/gpu_common.py")),
    "headroom": Evidence(
        "bench.quality.headroom",
        (*ENGINE, *REFERENCE_MODEL, *CONTROL, "dpllm/evaluation", "bench/quality/control_quality.py"),
    ),
    "kv_approximations": Evidence("bench.kv.kv_approximations", KV_QUALITY),
    "kv_memory_latency": Evidence("bench.kv.kv_memory_latency", (*CACHE, "dpllm/model", *CPU_KERNELS)),
    "kv_quality": Evidence(
        "bench.kv.kv_quality", KV_QUALITY, ("--plot", "docs/kv_quality.png"), "build/kv_quality"
    ),
    "nested_quality": Evidence("bench.quality.nested_quality", (*QUANTISER, *REFERENCE_MODEL, *TEXTS)),
    "peer_quality": Evidence(
        "bench.quality.peer_quality",
        ("dpllm/model", *REFERENCE_MODEL, *TEXTS, "bench/peers", "bench/results/quality_vs_bits-cpu.json"),
        ("--peers", "OTHER_ENV/bin/python"),
    ),
    "plan_quality": Evidence(
        "bench.quality.plan_quality",
        (*ENGINE, *CACHE, *REFERENCE_MODEL, *CONTROL),
    ),
    "quality_vs_bits": Evidence(
        "bench.quality.quality_vs_bits",
        (
            *ENGINE, *REFERENCE_MODEL, *TEXTS, "calib", "dpllm/evaluation",
            *(f"bench/quality/{n}.py" for n in ("cells", "jobs", "matrix", "policies", "variants")),
            "bench/quality/other_allocations.py",
        ),
        ("--plot", "docs/quality_vs_bits.png"), "build/quality_vs_bits",
    ),
    "quantize_memory": Evidence("bench.cpu.quantize_speed", QUANTISER),
    "quantize_speed": Evidence("bench.cpu.quantize_speed", QUANTISER),
    "real_models": Evidence(
        "bench.quality.real_models", (*ENGINE, "calib", "dpllm/evaluation"),
        ("OVERLAY", "--calibration", "FILE", "--text", "FILE"),
    ),
    "reference_quality": Evidence(
        "bench.reference_model.reference_quality",
        ("dpllm/reference/model", *(f"bench/reference_model/{n}.py" for n in ("reference_corpus", "train_reference"))),
    ),
    "roofline": Evidence(
        "bench.gpu.roofline",
        ("bench/gpu/gpu_devices.py", "tests/support/gpu_code.json", "kernels/weight.py", "dpllm/model"),
    ),
    "speculation": Evidence("bench.quality.speculation", (*ENGINE, *REFERENCE_MODEL, *TEXTS, "quant")),
}  # fmt: skip


def evidence_of(bench: str) -> Evidence | None:
    """The entry of a result's "bench"; None where the table has none."""
    exact = EVIDENCE.get(bench)
    patterns = (e for name, e in EVIDENCE.items() if "*" in name and fnmatchcase(bench, name))
    return exact or next(patterns, None)
