"""The memory and cores of a container: limits of cgroup v1 and v2, nested ones, and none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dpllm.base.machine import available_bytes, usable_cores

GB = 10**9
V1_MEMORY = "30 20 0:25 {part} /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory"
V1_CPU = "31 20 0:26 {part} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct"
V2 = "29 20 0:24 {part} /sys/fs/cgroup rw - cgroup2 cgroup2 rw"


@pytest.fixture
def machine(tmp_path):
    """A factory of roots with 10 GB available: what a process of a container sees in /proc and /sys."""

    def make(groups: str, mounts: list[str], files: dict[str, str | int] | None = None) -> Path:
        proc = {"proc/meminfo": f"MemTotal: 16000000 kB\nMemAvailable: {10 * GB // 1024} kB\n"}
        proc |= {"proc/self/cgroup": groups, "proc/self/mountinfo": "".join(m + "\n" for m in mounts)}
        for name, text in (proc | {f"sys/fs/cgroup/{n}": f"{t}\n" for n, t in (files or {}).items()}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(str(text))
        return tmp_path

    return make


def v2(folder: str, limit: str | int, used: int, active: int = 0, inactive: int = 0) -> dict[str, str | int]:
    stat = f"anon 123\nfile 999\ninactive_file {inactive}\nactive_file {active}\nshmem 7"
    return {
        f"{folder}memory.max": limit,
        f"{folder}memory.current": used,
        f"{folder}memory.stat": stat,
    }


def v1(folder: str, limit: int, used: int, active: int = 0, inactive: int = 0) -> dict[str, str | int]:
    own = "active_file 1\ninactive_file 1"  # without the groups below
    return {
        f"memory/{folder}memory.limit_in_bytes": limit, f"memory/{folder}memory.usage_in_bytes": used,
        f"memory/{folder}memory.stat": f"{own}\ntotal_active_file {active}\ntotal_inactive_file {inactive}",
    }  # fmt: skip


ROOT, BELOW = V2.format(part="/"), "0::/a/b\n"
DOCKER = "4:memory:/docker/x\n"
UNLIMITED = 9223372036854771712
SEEN = [
    ("no groups", "", [], {}, 10 * GB),
    ("groups that are not mounted", BELOW, [], {}, 10 * GB),
    ("v2", "0::/\n", [ROOT], v2("", 4 * GB, 1 * GB), 3 * GB),
    ("v2, files in memory can go", "0::/\n", [ROOT], v2("", 4 * GB, 3 * GB, 1 * GB, 1 * GB), 3 * GB),
    ("v2 'max'", "0::/\n", [ROOT], v2("", "max", 3 * GB), 10 * GB),
    ("v2 beyond the machine", "0::/\n", [ROOT], v2("", 64 * GB, 0), 10 * GB),
    ("v2 used up", "0::/\n", [ROOT], v2("", GB, GB + 5), 0),
    ("v2 memory.high", "0::/\n", [ROOT], v2("", "max", GB) | {"memory.high": 3 * GB}, 2 * GB),
    ("v2, the group above", BELOW, [ROOT], v2("a/", 5 * GB, 1 * GB) | v2("a/b/", "max", 9), 4 * GB),
    ("v2, the group itself", BELOW, [ROOT], v2("a/", 5 * GB, 1 * GB) | v2("a/b/", 2 * GB, GB), GB),
    ("v2, mounted from the group on", BELOW, [V2.format(part="/a/b")], v2("", 2 * GB, 0), 2 * GB),
    ("v2, a namespace", "0::/../../other\n", [ROOT], v2("", 2 * GB, 0), 2 * GB),
    ("v2, no controller", BELOW, [ROOT], {"a/b/cpu.max": "max 100000"}, 10 * GB),
    ("v1", DOCKER, [V1_MEMORY.format(part="/")], v1("docker/x/", 3 * GB, GB), 2 * GB),
    ("v1, files", DOCKER, [V1_MEMORY.format(part="/")], v1("docker/x/", 3 * GB, 2 * GB, GB, GB), 3 * GB),
    ("v1, a container", DOCKER, [V1_MEMORY.format(part="/docker/x")], v1("", 3 * GB, GB), 2 * GB),
    ("v1 without a limit", DOCKER, [V1_MEMORY.format(part="/")], v1("docker/x/", UNLIMITED, GB), 10 * GB),
    ("v1, the group above", DOCKER, [V1_MEMORY.format(part="/")],
     v1("docker/", 2 * GB, 0) | v1("docker/x/", UNLIMITED, 0), 2 * GB),
    ("v1 beside v2", DOCKER + BELOW, [ROOT.replace("/cgroup ", "/cgroup/unified "), V1_MEMORY.format(part="/")],
     v1("docker/x/", 3 * GB, GB), 2 * GB),
    ("nonsense", "x\n:\n0::/\n", ["", "a - b", ROOT], {"memory.max": "lots", "memory.current": "x"}, 10 * GB),
]  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"), [s[1:] for s in SEEN], ids=[s[0] for s in SEEN]
)
def test_memory(groups, mounts, files, expected, machine):
    found = available_bytes(machine(groups, mounts, files))
    assert found is not None and expected - 1024 <= found <= expected


def test_a_system_that_does_not_say(tmp_path):
    assert available_bytes(tmp_path) is None


QUOTAS = [
    ("v2, half a core", "0::/\n", [ROOT], {"cpu.max": "50000 100000"}, 1),
    ("v2 'max'", "0::/\n", [ROOT], {"cpu.max": "max 100000"}, None),
    ("v2, plenty", "0::/\n", [ROOT], {"cpu.max": "100000000 100000"}, None),
    ("v2, the group above", BELOW, [ROOT], {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),
    ("v1", "1:cpu,cpuacct:/\n", [V1_CPU.format(part="/")],
     {"cpu/cpu.cfs_quota_us": 70000, "cpu/cpu.cfs_period_us": 100000}, 1),
    ("v1 without", "1:cpu,cpuacct:/\n", [V1_CPU.format(part="/")],
     {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, None),
    ("nonsense", "0::/\n", [ROOT], {"cpu.max": "0 0"}, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"), [q[1:] for q in QUOTAS], ids=[q[0] for q in QUOTAS]
)
def test_cores(groups, mounts, files, expected, machine):
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert usable_cores(machine(groups, mounts, files)) == (expected or every)


def test_part_of_a_core_counts_as_one(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_cores(machine("0::/\n", [ROOT], {"cpu.max": "150000 100000"})) == 2
    assert usable_cores(machine("0::/\n", [ROOT], {"cpu.max": "800000 100000"})) == 8


def test_this_machine():
    free = available_bytes()
    assert free is None or 1 << 20 < free < 1 << 50
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
