"""A git repository of a test's own, in which every commit has a date that the test gives."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

DAY = 24 * 3600


class Repository:
    """A repository in a folder. `commit` takes days since 1970 as the date."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir()
        self.git("init", "--quiet")

    def git(self, *arguments: str, **environment: str) -> str:
        mine = {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        mine |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        command = ["git", "-C", str(self.root), *arguments]
        env = os.environ | mine | environment
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def commit(self, subject: str, day: int = 0) -> str:
        """Everything there is. Returns the short hash."""
        date = f"@{day * DAY} +0000"
        self.git("add", "--all")
        self.git(
            "commit", "--quiet", "--allow-empty", "-m", subject, GIT_AUTHOR_DATE=date, GIT_COMMITTER_DATE=date
        )
        return self.git("rev-parse", "--short", "HEAD").strip()
