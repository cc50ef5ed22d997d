"""Asks git about the checkout that a benchmark runs in: its commit, its edits, and what each commit changed."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = (
    "bench/results/"  # what a benchmark writes, so that one may follow another without a commit in between
)
BUILD = "build/"  # work directories of benchmarks


@dataclass(frozen=True)
class Change:
    """One file in one commit. path: its name after the commit, or before it where the commit deletes the file.
    before: its earlier name, the same unless the commit moves the file. edited: False for a move that changes nothing
    else."""

    path: str
    before: str
    edited: bool


@dataclass(frozen=True)
class Commit:
    """One commit. hash: all 40 digits. when: committer's date, seconds since 1970."""

    hash: str
    when: int
    subject: str
    changes: tuple[Change, ...]


class Checkout:
    """A git checkout. Raises OSError where git does not run, and CalledProcessError outside a checkout."""

    def __init__(self, root: Path = ROOT):
        self.root = root

    def git(self, *arguments: str) -> str:
        """The output of a git command that succeeds."""
        command = ["git", "-C", str(self.root), "-c", "core.quotePath=false", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def head(self) -> str:
        """The short hash of the commit that is checked out."""
        return self.git("rev-parse", "--short", "HEAD").strip()

    def edits(self) -> list[str]:
        """Paths that differ from the commit, sorted: edited, deleted and untracked files.

        Left out are ignored files, all of bench/results/, and untracked files in build/.
        """
        entries = iter(self.git("status", "--porcelain", "-z", "--untracked-files=all").split("\0"))
        found = []
        for entry in filter(None, entries):
            kind, path = entry[:2], entry[3:]
            if kind[0] in "RC":
                next(entries)  # the earlier name of a file that was moved
            if not path.startswith(RESULTS) and not (kind == "??" and path.startswith(BUILD)):
                found.append(path)
        return sorted(found)

    def resolve(self, commit: str) -> str | None:
        """The full hash of a commit, or None where the history of HEAD lacks it."""
        try:
            full = self.git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").strip()
        except subprocess.CalledProcessError:
            return None
        return full if any(c.hash == full for c in self.history) else None

    def since(self, commit: str) -> list[Commit]:
        """Commits that HEAD has and `commit` has not, newest first. commit: a full hash."""
        later = set(self.git("rev-list", f"{commit}..HEAD").split())
        return [c for c in self.history if c.hash in later]

    @cached_property
    def history(self) -> list[Commit]:
        """All commits of HEAD, newest first, children before their parents."""
        log = self.git("log", "--topo-order", "-M", "--name-status", "--format=%x01%H%x02%ct%x02%s")
        return [_commit(text) for text in log.split("\x01")[1:]]


def _commit(text: str) -> Commit:
    head, *lines = text.splitlines()
    full, when, subject = head.split("\x02", 2)
    changes = []
    for line in filter(None, lines):
        kind, *paths = line.split("\t")
        changes.append(Change(path=paths[-1], before=paths[0], edited=kind != "R100"))
    return Commit(full, int(when), subject, tuple(changes))
