"""Builds the CPU kernels: one shared library without Python or torch headers, one source per instruction set.

Everything else about the package stands in pyproject.toml. Without a C++ compiler the package installs all the same and
computes through torch.
"""

from __future__ import annotations

import os
import platform
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCE = Path("kernels/cpu/src")
units = runpy.run_path("kernels/cpu/build_flags.py")["units"]


class BuildKernels(build_ext):
    """Compiles each source with its own flags, in parallel, and links a library that ctypes loads."""

    def build_extension(self, ext: Extension) -> None:
        """kernels/cpu/src -> dpllm/kernels/cpu/_native.so"""
        if self.compiler.compiler_type != "unix":
            raise CompileError(f"the CPU kernels need gcc or clang, not {self.compiler.compiler_type}")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda item: self.compile_unit(*item), units(platform.machine()).items()))
        self.compiler.link_shared_object(objects, str(target), target_lang="c++", extra_postargs=["-pthread"])

    def compile_unit(self, name: str, unit: tuple[str, list[str]]) -> str:
        """One source to one object file."""
        source, flags = unit
        folder = Path(self.build_temp) / name
        return self.compiler.compile([str(SOURCE / source)], output_dir=str(folder), extra_postargs=flags)[0]

    def get_ext_filename(self, fullname: str) -> str:
        """One name for every Python: nothing in the library depends on it."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class AnyPythonWheel(bdist_wheel):
    """py3-none-PLATFORM: the library is loaded with ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        """Platform-bound, but not bound to a Python."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "dpllm.kernels.cpu._native",
            sources=[str(p) for p in sorted(SOURCE.glob("*.cpp"))],
            depends=[str(p) for p in sorted([*SOURCE.glob("*.h"), Path("kernels/cpu/build_flags.py")])],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPythonWheel},
)
