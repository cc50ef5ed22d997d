"""Counts what became of the drafts of a text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Tally:
    """Counts what became of drafts. rejected: checks that ended with a token that was not the drafted one."""

    checks: int = 0
    plain: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0

    def add(self, drafted: int, accepted: int) -> None:
        """Counts one more round; a round without a draft is a plain step."""
        self.plain += not drafted
        self.checks += bool(drafted)
        self.drafted += drafted
        self.accepted += accepted
        self.rejected += accepted < drafted

    def summary(self) -> dict[str, float | int | None]:
        """acceptance_rate: among the drafted tokens whose predecessors were accepted. k: tokens drafted per check."""
        looked_at, passes = self.accepted + self.rejected, self.checks + self.plain
        return {
            "checks": self.checks,
            "plain_steps": self.plain,
            "acceptance_rate": round(self.accepted / looked_at, 4) if looked_at else None,
            "accepted_per_check": round(self.accepted / self.checks, 4) if self.checks else None,
            "k": round(self.drafted / self.checks, 4) if self.checks else None,
            "tokens_per_pass": round(1 + self.accepted / passes, 4) if passes else None,
        }
