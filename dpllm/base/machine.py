"""The memory and the cores that this process may use: those of the machine, within the limits of its container.

A container's limits are those of its control group and of every group above it (cgroup v1 and v2; both may be mounted).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


def available_bytes(root: Path = ROOT) -> int | None:
    """Returns the bytes of memory that this process can still get without swapping, or None where nothing says so.

    It is the least of what the system has available and what each control group leaves: its limit less its usage,
    where files that the kernel holds in memory and can drop do not count as used. root: the root of the file system.
    """
    found = [_system_bytes(root), *(_left(group) for group in _groups("memory", root))]
    known = [n for n in found if n is not None]
    return max(0, min(known)) if known else None


def usable_cores(root: Path = ROOT) -> int:
    """Returns the number of cores that this process may use: its affinity, within the CPU time of its control groups.

    A quota of one and a half cores counts as two. root: the root of the file system.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [q for group in _groups("cpu", root) if (q := _quota(group)) is not None]
    return max(1, min([cores, *(math.ceil(q) for q in quotas)]))


def _system_bytes(root: Path) -> int | None:
    """What the system has available, or None where it does not say."""
    kilobytes = _table(root / "proc/meminfo").get("MemAvailable")
    return None if kilobytes is None else kilobytes * 1024


@dataclass(frozen=True)
class _Group:
    """A directory of the control group file system, of version 1 or 2."""

    path: Path
    version: int


def _groups(controller: str, root: Path) -> Iterator[_Group]:
    """The groups of this process and all above them, for 'memory' or 'cpu'.

    A path in /proc/self/cgroup is relative to the hierarchy, and /proc/self/mountinfo says which part of the
    hierarchy is mounted where. A container may see its own group as the root of the mount.
    """
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if (version := 2 if number == "0" and not names else 1) == 2 or controller in names.split(","):
            paths[version] = Path(path)
    for version, part, mounted in _mounts(controller, root):
        if version not in paths:
            continue
        try:
            inside = paths[version].relative_to(part)
        except ValueError:  # the group lies outside the mount: the mount's own root is all that can be seen
            inside = Path()
        if ".." in inside.parts:
            inside = Path()
        top = root / mounted.relative_to("/")
        yield from (_Group(top / p, version) for p in (inside, *inside.parents))


def _mounts(controller: str, root: Path) -> Iterator[tuple[int, Path, Path]]:
    """(version, the part of the hierarchy that is mounted, where) for every mount with this controller."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        if kinds[0] == "cgroup2" or (kinds[0] == "cgroup" and controller in kinds[2].split(",")):
            yield 2 if kinds[0] == "cgroup2" else 1, Path(fields[3]), Path(fields[4])


def _left(group: _Group) -> int | None:
    """The bytes that a group leaves: the limit less what is used and cannot be dropped. None without a limit."""
    names = ("memory.max", "memory.high") if group.version == 2 else ("memory.limit_in_bytes",)
    limits = [n for name in names if (n := _number(group.path / name)) is not None]
    used = _number(group.path / ("memory.current" if group.version == 2 else "memory.usage_in_bytes"))
    if not limits or used is None:
        return None
    table = _table(group.path / "memory.stat")
    prefix = "" if group.version == 2 else "total_"  # version 1 counts the groups below only in these
    droppable = sum(table.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return min(limits) - max(0, used - droppable)


def _quota(group: _Group) -> float | None:
    """The CPU time that a group may take, in cores. None without a limit."""
    if group.version == 2:
        words = " ".join(_lines(group.path / "cpu.max")).split()
        quota, period = (_integer(w) for w in words) if len(words) == 2 else (None, None)
    else:
        quota, period = (_number(group.path / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return quota / period if quota and period and quota > 0 and period > 0 else None


def _number(path: Path) -> int | None:
    """The number in a file; None for 'max', anything else, and no file."""
    return _integer(" ".join(_lines(path)))


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    pairs = (line.replace(":", " ").split()[:2] for line in _lines(path))
    return {p[0]: number for p in pairs if len(p) == 2 and (number := _integer(p[1])) is not None}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
