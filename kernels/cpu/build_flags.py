"""The sources of src/ to compile for a processor family, with their flags. setup.py and tests/native/run.py read it.

This file imports nothing from the package, because it runs before the package is installed.
"""

from __future__ import annotations

COMMON = ["-std=c++17", "-O3", "-fno-math-errno", "-fvisibility=hidden", "-g0", "-w"]
AVX512 = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mfma",
    "-mf16c",
    "-mprefer-vector-width=512",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]

# object -> (source, if its name differs from the object's, and flags added to COMMON)
PLAIN: dict[str, tuple[str, list[str]]] = {
    name: ("", []) for name in ("api", "attention", "draw", "pool", "quantize", "step")
}
X86: dict[str, tuple[str, list[str]]] = {
    "isa_avx512": ("", [*AVX512, "-mavx512vbmi", "-mavx512vnni", "-mgfni"]),
    "isa_avx512bw": ("", AVX512),
    "isa_avx2": ("", AVX2),
    "isa_avx2vnni": ("isa_avx2", [*AVX2, "-mavxvnni"]),
}
ARM: dict[str, tuple[str, list[str]]] = {
    "isa_neon": ("", []),
    "isa_neondot": ("isa_neon", ["-march=armv8.2-a+dotprod"]),
}
PORTABLE: dict[str, tuple[str, list[str]]] = {"isa_portable": ("", ["-O2"])}  # -O3 is slower there, too


def units(machine: str) -> dict[str, tuple[str, list[str]]]:
    """Returns what to compile for `machine`, a name of platform.machine(): object -> (source file, flags)."""
    machine = machine.lower()
    isas = X86 if machine in ("x86_64", "amd64") else ARM if machine in ("aarch64", "arm64") else {}
    return {
        name: (f"{source or name}.cpp", [*COMMON, *flags])
        for name, (source, flags) in (PLAIN | isas | PORTABLE).items()
    }
