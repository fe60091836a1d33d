"""What a restore proved: claims with verdicts, the last commit contained, loss and times measured."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from knockwood.model.finding import Verdict, worst
from knockwood.model.wal import Lsn, Timeline


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit record: its transaction, the LSN where the record starts, and its time (UTC)."""

    xid: int
    lsn: Lsn
    time: datetime

    def as_json(self) -> dict[str, Any]:
        return {"xid": self.xid, "lsn": str(self.lsn), "time": self.time.isoformat()}


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing a proof claims, and how it ended."""

    name: str
    verdict: Verdict
    detail: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "verdict": str(self.verdict), "detail": self.detail}


@dataclass(frozen=True, slots=True)
class Proof:
    """The outcome of restoring a backup and checking what came out. Times UTC, durations in seconds."""

    id: str
    cluster: str
    backup: str
    system_identifier: int
    timeline: Timeline
    reached_lsn: Lsn
    last_commit: Commit | None
    missing_commits: int | None
    claims: tuple[Claim, ...]
    rto_seconds: float
    rpo_seconds: float | None
    taken_at: datetime
    valid_until: datetime

    @property
    def verdict(self) -> Verdict:
        return worst(claim.verdict for claim in self.claims)

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "cluster": self.cluster,
            "backup": self.backup,
            "system_identifier": str(self.system_identifier),
            "timeline": self.timeline,
            "reached_lsn": str(self.reached_lsn),
            "last_commit": self.last_commit.as_json() if self.last_commit else None,
            "missing_commits": self.missing_commits,
            "verdict": str(self.verdict),
            "claims": [claim.as_json() for claim in self.claims],
            "rto_seconds": self.rto_seconds,
            "rpo_seconds": self.rpo_seconds,
            "taken_at": self.taken_at.isoformat(),
            "valid_until": self.valid_until.isoformat(),
        }
