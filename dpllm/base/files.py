"""Writing files so that a reader never sees half of one.

A file is written beside its place, flushed to disk, and renamed. Symbolic links stay links: the file or folder that a
link leads to is written.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dpllm.base.errors import InputError
from dpllm.base.places import LEFT_OVER, temporary_name


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], header: dict[str, str] | None = None
) -> None:
    """Replaces a safetensors file as a whole. On failure the file stays as it was, and nothing else is left.

    Raises InputError when the disk is full or the place cannot be written.
    """
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with _replacing(path, f"{path} ({size / 1e6:.1f} MB)") as partial:
        save_file({n: t.contiguous() for n, t in sorted(tensors.items())}, partial, metadata=header)


def write_text(path: Path, text: str) -> None:
    """Replaces a UTF-8 file as a whole. On failure the file stays as it was, and nothing else is left.

    Raises InputError when the disk is full or the place cannot be written.
    """
    with _replacing(path, str(path)) as partial, partial.open("w", encoding="utf-8", newline="\n") as f:
        f.write(text)


@contextlib.contextmanager
def _replacing(path: Path, name: str) -> Iterator[Path]:
    """Gives an empty file beside the place of `path`, and renames it into place when the block ends well.

    The file has a name of its own, so that two processes do not write into one file. It gets the permissions of the
    file that it replaces, or those of any new file. name: `path` in the error.
    """
    target, partial = Path(os.path.realpath(path)), None
    if target.exists() and not (
        target.is_file() or target.is_dir()
    ):  # a rename would replace a pipe or a device
        raise InputError(f"{name} cannot be written: it is not an ordinary file. Give the name of a file.")
    try:
        partial = temporary_name(target)
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE((target if target.exists() else partial).stat().st_mode)
        yield partial
        with partial.open("rb") as f:
            os.fsync(f.fileno())
        partial.chmod(mode)
        partial.replace(target)
        flush_folder(target.parent)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(
            f"{name} cannot be written: {reason}. Free space or choose another place, then run it again."
        ) from None
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Makes renames in a folder outlast a loss of power, where the system lets a folder be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(target: Path) -> None:
    """Deletes what killed processes left beside a file. The caller holds the lock of the file."""
    for path in target.parent.glob(f".{_literal(target.name[:32])}.????????{LEFT_OVER}"):
        with contextlib.suppress(OSError):
            path.unlink()


def _literal(name: str) -> str:
    """A glob pattern that matches this name only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
