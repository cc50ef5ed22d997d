"""Lists the results in bench/results/ that are older than the code that they measured, and how to measure them again.

A result is stale when a commit after its own changed a file that its benchmark exercises (bench/common/evidence.py
says which). Files are followed through moves; a move without an edit counts for nothing. Git cannot tell an edit of a
comment from one that moves a figure, so that "stale" means "not known to hold today". A result is also to be measured
again when it comes from an edited work tree, or from a commit that the history lacks.

    python -m bench.stale [--json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.common.checkout import RESULTS, Change, Checkout, Commit
from bench.common.evidence import Evidence, evidence_of

DAY = 24 * 3600


@dataclass(frozen=True)
class Age:
    """How old a result is.

    file: its name in bench/results/. commit: as recorded, without the mark of an edited work tree. dirty: whether the
    work tree was edited. behind: commits of HEAD since; days: since that commit; both None where the history lacks it.
    touched: how many of these commits changed what the benchmark exercises. last: the newest of them, as short hash
    and subject. declared: whether bench/common/evidence.py has an entry. command: measures it again.
    """

    file: str
    bench: str
    commit: str
    dirty: bool
    behind: int | None = None
    days: float | None = None
    touched: int = 0
    last: str | None = None
    declared: bool = True
    command: str | None = None

    @property
    def reasons(self) -> list[str]:
        """Why the result is to be measured again; empty where it is current."""
        found = []
        if not self.declared:
            found.append("not in bench/common/evidence.py")
        if self.behind is None:
            found.append("unknown commit")
        if self.touched:
            found.append("stale")
        return found + (["edited work tree"] if self.dirty else [])


def touching(commits: list[Commit], paths: tuple[str, ...]) -> list[Commit]:
    """Those of the commits that changed a file of these.

    paths: folders and files by their names in the newest commit. A commit that moves a file without an edit is not
    among them, and changes under the file's earlier names count too, in whatever order branches list them.
    """
    earlier: set[str] = set()

    def ours(change: Change) -> bool:
        names = {change.path, change.before}
        return bool(names & earlier) or any(n == p or n.startswith(f"{p}/") for n in names for p in paths)

    known = -1
    while known < len(earlier):
        known = len(earlier)
        earlier |= {c.before for commit in commits for c in commit.changes if ours(c)}
    return [commit for commit in commits if any(c.edited and ours(c) for c in commit.changes)]


def age_of(path: Path, checkout: Checkout, now: float) -> Age:
    """The age of one result file. now: seconds since 1970."""
    result = json.loads(path.read_text())
    recorded: str = result["commit"]
    age = Age(path.name, result["bench"], recorded.rstrip("+"), recorded.endswith("+"))
    known = asdict(age)
    evidence: Evidence | None = evidence_of(age.bench)
    known |= {"declared": evidence is not None, "command": evidence and evidence.command}
    full = checkout.resolve(age.commit)
    if full is not None:
        since = checkout.since(full)
        touched = touching(since, evidence.paths) if evidence else []
        when = next(c.when for c in checkout.history if c.hash == full)
        known |= {"behind": len(since), "days": round((now - when) / DAY, 1), "touched": len(touched)}
        if touched:
            known["last"] = f"{touched[0].hash[:7]} {touched[0].subject}"
    return Age(**known)


def ages(checkout: Checkout, now: float) -> list[Age]:
    """The ages of all results, by file name. now: seconds since 1970.

    Raises OSError or CalledProcessError where git does not answer.
    """
    files = sorted((checkout.root / RESULTS).glob("*.json"))
    return [age_of(f, checkout, now) for f in files]


def show(found: list[Age]) -> None:
    """Prints what is to be measured again as a table, and the commands."""
    old = [a for a in found if a.reasons]
    table = Table("result", "commit", "commits since", "days", "touch its code", "why")
    table.add_column("last that does", no_wrap=True, overflow="ellipsis")
    for a in old:
        table.add_row(
            a.file, a.commit + "+" * a.dirty, str(a.behind) if a.behind is not None else "?",
            f"{a.days:.0f}" if a.days is not None else "?", str(a.touched), ", ".join(a.reasons), a.last or "",
        )  # fmt: skip
    console = Console(width=180, markup=False)
    if old:
        console.print(table)
        console.print(
            "'+' marks a result from an edited work tree. Commands that measure again; commit a picture"
        )
        console.print("that --plot draws before the next one, which does not run on an edited work tree:")
        for command in dict.fromkeys(a.command for a in old if a.command):
            console.print(f"    {command}", soft_wrap=True, highlight=False)
    console.print(f"{len(found) - len(old)} of {len(found)} results are current.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="every result, as one line of JSON")
    args = parser.parse_args()
    checkout = Checkout()
    try:
        head, found = checkout.head(), ages(checkout, time.time())
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"bench: git knows of no checkout at {checkout.root}: ages of results need its history.")
    if args.json:
        print(json.dumps({"head": head, "results": [asdict(a) | {"reasons": a.reasons} for a in found]}))
    else:
        show(found)


if __name__ == "__main__":
    main()
