"""Builds and runs the tests of the native kernels, with the sources and flags of the package's own build.

    python tests/native/run.py                          address and undefined-behaviour sanitizers
    python tests/native/run.py --sanitize thread        thread sanitizer: the pool, and callers in several threads
    python tests/native/run.py --cross aarch64          NEON, in an emulated processor
    python tests/native/run.py --symbols                what one instruction set's code must not share with another's

Objects are kept in build/native-MODE and rebuilt when a source, header or flag has changed.
"""

from __future__ import annotations

import argparse
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels/cpu/src"
TESTS = Path(__file__).resolve().parent
units = runpy.run_path(str(ROOT / "kernels/cpu/build_flags.py"))["units"]

# At -O3 the sanitizers' checks take minutes to compile, and -g takes 1.6 times as long as the lines alone (-g1).
SANITIZE = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
PACKAGES = {
    "g++": "g++",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "nm": "binutils",
}


def fail(message: str) -> NoReturn:
    """Ends the run with one line."""
    sys.exit(f"tests/native: {message}")


def tool(name: str) -> str:
    """Where a program is; says which Debian package has it if it is missing."""
    return shutil.which(name) or fail(f"{name} is missing (Debian package {PACKAGES[name]}).")


def run(command: list[str], label: str) -> str:
    """Runs a command and returns what it printed; ends the run if it fails."""
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if result.returncode:
        print(result.stdout[-8000:], file=sys.stderr)
        fail(f"{label} failed (exit code {result.returncode}): {shlex.join(command)}")
    return result.stdout


def processor_flags() -> set[str]:
    """Of this processor, as the compiler spells them: 'avx512vnni'. x86 only."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split(":")[1] for line in lines if line.startswith("flags")), "")
    return set(flags.replace("_", "").split())


class Build:
    """The objects of one mode."""

    def __init__(self, mode: str, machine: str, compiler: str, extra: list[str], jobs: int):
        self.folder = ROOT / "build" / f"native-{mode}"
        self.machine, self.compiler, self.extra, self.jobs = machine, compiler, extra, jobs
        self.sanitized = any(f.startswith("-fsanitize") for f in extra)

    def library(self) -> dict[str, list[str]]:
        """Object -> source and flags, of the library."""
        found = units(self.machine)
        return {
            name: [str(SOURCES / source), *flags, *(self.extra if self.runs(flags) else ["-O0"])]
            for name, (source, flags) in found.items()
        }

    def runs(self, flags: list[str]) -> bool:
        """False for code that only has to be linked: sanitizers' checks take minutes to compile, and this processor,
        for which they are, lacks the instructions to run it."""
        wanted = {f[2:] for f in flags if f.startswith("-m") and "=" not in f}
        return not self.sanitized or wanted <= processor_flags()

    def tests(self) -> dict[str, list[str]]:
        """Object -> source and flags, of the tests."""
        flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", f"-I{SOURCES}", *self.extra]
        return {path.stem: [str(path), *flags] for path in sorted(TESTS.glob("*.cpp"))}

    def compile(self, wanted: dict[str, list[str]]) -> list[Path]:
        """Compiles what is out of date, the slowest first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with ThreadPoolExecutor(self.jobs) as pool:
            order = sorted(wanted, key=lambda name: not name.startswith("isa_"))
            made = list(pool.map(lambda name: self.compile_one(name, wanted[name]), order))
        if sum(made):
            print(
                f"{self.folder.name}: compiled {sum(made)} files in {time.monotonic() - began:.0f} s",
                flush=True,
            )
        return [self.folder / f"{name}.o" for name in wanted]

    def compile_one(self, name: str, arguments: list[str]) -> bool:
        """One object; False if there was nothing to do."""
        target, note = self.folder / f"{name}.o", self.folder / f"{name}.command"
        command = [tool(self.compiler), *arguments, "-c", "-o", str(target)]
        newest = max(p.stat().st_mtime for p in [*SOURCES.iterdir(), *TESTS.glob("*.[hc]*")])
        known = note.exists() and note.read_text() == shlex.join(command)
        if known and target.exists() and target.stat().st_mtime > newest:
            return False
        run(command, f"compiling {name}")
        note.write_text(shlex.join(command))
        return True

    def executable(self, link: list[str]) -> Path:
        """The tests, linked with the library."""
        objects = self.compile(self.library() | self.tests())
        target = self.folder / "kernels_test"
        if not target.exists() or any(o.stat().st_mtime > target.stat().st_mtime for o in objects):
            run([tool(self.compiler), *map(str, objects), *link, "-pthread", "-o", str(target)], "linking")
        return target


def test(label: str, command: list[str]) -> str:
    """Runs the tests and reports in one line."""
    began = time.monotonic()
    output = run(command, label)
    parts = [line for line in output.splitlines() if line.endswith(": ok")]
    if not parts:
        fail(f"{label}: nothing ran.\n{output}")
    variants = [line.split(":")[0] for line in output.splitlines() if line.endswith(": supported")]
    names = ", ".join(line.removesuffix(": ok") for line in parts)
    print(f"{label}: {names} ok on {', '.join(variants)} in {time.monotonic() - began:.0f} s", flush=True)
    return output


def sanitize(kinds: str, jobs: int) -> None:
    """The tests under sanitizers, on this machine."""
    flags = [f"-fsanitize={kinds}", *SANITIZE]
    build = Build(kinds.replace(",", "-"), platform.machine(), "g++", flags, jobs)
    program = build.executable(flags)
    parts = (
        ["--quick", "products", "step", "attention", "pool", "threads"]
        if "thread" in kinds.split(",")
        else []
    )
    test(f"sanitizers {kinds}", [str(program), *parts])


def cross(machine: str, jobs: int) -> None:
    """The tests under an emulator: a processor with everything, and one without dot products."""
    build = Build(machine, machine, f"{machine}-linux-gnu-g++", [], jobs)
    program = build.executable(["-static"])
    emulator = tool(f"qemu-{machine}")
    output = test(f"{machine}, all extensions", [emulator, "-cpu", "max", str(program), "--quick"])
    if "neondot: supported" not in output:
        fail("the dot-product variant did not run on a processor that has it.")
    without = [emulator, "-cpu", "cortex-a53", str(program), "--quick", "products"]
    output = test(f"{machine}, cortex-a53", without)
    if "neondot: not on this processor" not in output:
        fail("the dot-product variant claims to run on a Cortex-A53, which cannot.")
    check_symbols(build)


def check_symbols(build: Build) -> None:
    """No function of an instruction set may be one that the linker merges with those of others.

    A processor would be handed instructions that it does not have.
    """
    names = [name for name in build.library() if name.startswith("isa_")]
    build.compile({name: build.library()[name] for name in names})
    for name in names:
        lines = run([tool("nm"), "-C", "--defined-only", str(build.folder / f"{name}.o")], "nm").splitlines()
        shared = [line for line in lines if " W " in line or " u " in line]
        if shared:
            fail(f"{name} shares functions with other instruction sets:\n" + "\n".join(shared))
    print(f"symbols: {', '.join(names)} share nothing", flush=True)


def main() -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--sanitize", default="address,undefined", metavar="KINDS", help="as in -fsanitize=KINDS"
    )
    mode.add_argument("--cross", choices=["aarch64"], help="cross-compile and run under qemu")
    mode.add_argument("--symbols", action="store_true", help="check the objects of an ordinary build")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    options = parser.parse_args()
    if options.cross:
        cross(options.cross, options.jobs)
    elif options.symbols:
        check_symbols(Build("symbols", platform.machine(), "g++", [], options.jobs))
    else:
        sanitize(options.sanitize, options.jobs)


if __name__ == "__main__":
    main()
