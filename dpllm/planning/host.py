"""Describes the machine that a figure was measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from dpllm.model.decoder import Decoder


@dataclass(frozen=True)
class HostFacts:
    """The machine that a figure was measured on.

    processor: its name. cores: logical cores of the machine. backend: the kernels in use. threads: threads that the
    kernels use. versions: package name -> version.
    """

    processor: str
    cores: int
    backend: str
    threads: int
    versions: dict[str, str]


def processor_name() -> str:
    """Returns the processor's name as the operating system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def host_facts(decoder: Decoder) -> HostFacts:
    """Returns the facts of this machine, of the decoder's backend, and of the packages that decide a figure."""
    cpu = decoder.backend.cpu
    versions = {"python": platform.python_version()}
    versions |= {p: metadata.version(p) for p in ("dpllm", "torch", "transformers", "numpy")}
    return HostFacts(
        processor=processor_name(), cores=os.cpu_count() or 1, backend=decoder.backend.name,
        threads=cpu.handle.threads if cpu is not None else torch.get_num_threads(), versions=versions,
    )  # fmt: skip
