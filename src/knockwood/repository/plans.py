"""Targets of a restore and the plan to get there, as values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from knockwood.model.proof import Commit
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.repository.backups.model import Backup


@dataclass(frozen=True, slots=True)
class Latest:
    """Everything the archive holds of the newest timeline."""

    def __str__(self) -> str:
        return "latest"


@dataclass(frozen=True, slots=True)
class ToLsn:
    """All commits whose record begins at or before a position."""

    lsn: Lsn

    def __str__(self) -> str:
        return str(self.lsn)


@dataclass(frozen=True, slots=True)
class ToTime:
    """All commits before the first one, in order of the WAL, that is later than a moment (UTC)."""

    time: datetime

    def __str__(self) -> str:
        return self.time.isoformat()


@dataclass(frozen=True, slots=True)
class BeforeXid:
    """All commits before that of a transaction."""

    xid: int

    def __str__(self) -> str:
        return f"before-{self.xid}"


Target = Latest | ToLsn | ToTime | BeforeXid


@dataclass(frozen=True, slots=True)
class WalPiece:
    """A WAL file that a plan needs; `partial_name` is the object to take it from where it is not whole.

    `makes_tablespace`: whether a record in it makes one at a path; None where nobody looked.
    """

    segment: WalSegment
    partial_name: str | None = None
    makes_tablespace: bool | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """What a restore that accepts loss will lack.

    `end` and `end_time` are the target's or the archive's end, None where unknown; `commits` counts the
    commits seen in readable WAL that cannot be reached (there may be more in what cannot be read).
    """

    timeline: Timeline
    start: Lsn
    end: Lsn | None
    start_time: datetime | None
    end_time: datetime | None
    commits: int
    reason: str

    def as_json(self) -> dict[str, Any]:
        return {
            "timeline": self.timeline,
            "from": {
                "lsn": str(self.start),
                "time": self.start_time.isoformat() if self.start_time else None,
            },
            "to": {
                "lsn": str(self.end) if self.end is not None else None,
                "time": self.end_time.isoformat() if self.end_time else None,
            },
            "commits_seen": self.commits,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What to restore and where to stop.

    `chain` is the backup and its ancestors, the full one first. `target_lsn` is the start of a commit
    record, contained if `inclusive`; None means the backup's own consistent state
    (recovery_target=immediate), with nothing committed after it. `last_commit` is the last contained
    one (None if the WAL read holds none). `missing` is what is accepted to be lost. `unread`: its WAL is there, but
    nobody has read whether it is whole.
    """

    chain: tuple[Backup, ...]
    timeline: Timeline
    target_lsn: Lsn | None
    inclusive: bool
    wal: tuple[WalPiece, ...]
    histories: tuple[Timeline, ...]
    last_commit: Commit | None
    missing: Missing | None
    warnings: tuple[str, ...] = ()
    unread: bool = False

    @property
    def backup(self) -> Backup:
        return self.chain[-1]
