"""Writing safetensors so that a reader never sees half a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dpllm.base.errors import InputError


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], header: dict[str, str] | None = None
) -> None:
    """Writes beside `path`, flushes to disk, renames. On failure nothing is left behind.

    Raises InputError when the disk is full or the place cannot be written.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        save_file({n: t.contiguous() for n, t in sorted(tensors.items())}, partial, metadata=header)
        with partial.open("rb") as f:
            os.fsync(f.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    except (OSError, SafetensorError) as e:
        partial.unlink(missing_ok=True)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        raise InputError(
            f"{path} ({size / 1e6:.1f} MB) cannot be written: {e}. Free space, then run it again."
        ) from None


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 beside `path`, flushes to disk, renames. On failure nothing is left behind.

    Raises InputError when the disk is full or the place cannot be written.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written: {e.strerror or e}. Free space or choose another place."
        ) from None
