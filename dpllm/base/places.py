"""Checks that files can be read, and that files and folders can be written, before any work is done.

Symbolic links stay links: the file or folder that a link leads to is read or written.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from dpllm.base.errors import InputError

LEFT_OVER = ".tmp"  # how the names of half-written files end


def temporary_name(target: Path) -> Path:
    """A new hidden name beside a file or folder, for what is to replace it."""
    return target.with_name(f".{target.name[:32]}.{secrets.token_hex(4)}{LEFT_OVER}")


def check_readable(path: Path) -> None:
    """Raises InputError for a file that exists and cannot be read, with the system's reason.

    A missing file is left to the caller, who knows what it is for.
    """
    try:
        with path.open("rb"):
            return
    except FileNotFoundError:
        return
    except OSError as e:
        raise InputError(
            f"{path} cannot be read: {e.strerror or e}. Check the file and its permissions."
        ) from None


def file_to_write(path: Path) -> Path:
    """The file that will be written: `path`, or the file that a link leads to.

    Raises InputError where it is not an ordinary file, is write-protected, or cannot be made in its folder.
    """
    target = _followed(path)
    try:
        if target.is_dir():
            raise InputError(f"{path} is a directory. Give the name of a file.")
        if target.exists():
            if not target.is_file():
                raise InputError(f"{path} is not an ordinary file. Give the name of a file.")
            if not os.access(target, os.W_OK):
                raise InputError(f"{path} is write-protected. Choose another name, or make it writable.")
    except OSError as e:
        raise InputError(f"{path} cannot be written: {e.strerror or e}. Choose another place.") from None
    _check_folder(target.parent, path)
    return target


def folder_to_make(path: Path) -> Path:
    """The folder that will be made: `path`, or the empty folder that a link leads to.

    Raises InputError where something is there already, or where no folder can be made.
    """
    target = _followed(path)
    try:
        linked = os.path.islink(path) and target.is_dir() and not os.path.ismount(target)
        if target.exists() and not (linked and not any(target.iterdir())):
            raise InputError(f"{path} exists already. Choose another name, or remove it first.")
    except OSError as e:
        raise InputError(f"{path} cannot be made: {e.strerror or e}. Choose another place.") from None
    _check_folder(target.parent, path)
    return target


def _followed(path: Path) -> Path:
    """The place that a link leads to. Raises InputError for a link that leads nowhere."""
    target = Path(os.path.realpath(path))
    if os.path.islink(path) and not os.path.lexists(target):
        raise InputError(f"{path} is a link to {target}, which does not exist. Make it, or remove the link.")
    if os.path.islink(target):
        raise InputError(f"{path} is a link that leads in a circle. Remove it.")
    return target


def _check_folder(folder: Path, path: Path) -> None:
    """Raises InputError where nothing can be made in the folder of `path`: it makes a file there and deletes it."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a directory; {path} cannot be made there. Create it first.")
    probe = temporary_name(folder / path.name)
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        probe.unlink()
    except OSError as e:
        raise InputError(
            f"{path} cannot be made in {folder}: {e.strerror or e}. Choose another place."
        ) from None


def check_space(folder: Path, needed: int, held: int = 0) -> None:
    """Raises InputError where a folder's disk has less than `needed` bytes free.

    held: bytes of them that are written already.
    """
    free = shutil.disk_usage(folder).free + held
    if free < needed:
        raise InputError(
            f"{folder} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed. "
            "Free some space or choose another disk."
        )
