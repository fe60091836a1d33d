"""What a check says: three answers, and a finding where something is broken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from knockwood.model.wal import Lsn


class Verdict(StrEnum):
    """How a check ended. What could not be checked is never `HELD`."""

    HELD = "held"
    BROKEN = "broken"
    NOT_CHECKED = "not_checked"


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict for many: broken beats not checked beats held; of none it is not checked."""
    seen = set(verdicts)
    for verdict in (Verdict.BROKEN, Verdict.NOT_CHECKED, Verdict.HELD):
        if verdict in seen:
            return verdict
    return Verdict.NOT_CHECKED


class Severity(StrEnum):
    """How bad a finding is for the data."""

    CRITICAL = "critical"
    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a finding is, as exactly as the check knows. `file` is relative to the data directory."""

    cluster: str | None = None
    database: str | None = None
    relation: str | None = None
    file: str | None = None
    block: int | None = None
    index: str | None = None
    key: str | None = None
    lsn: Lsn | None = None

    def as_json(self) -> dict[str, Any]:
        pairs = {name: getattr(self, name) for name in self.__slots__}
        return {k: str(v) if isinstance(v, Lsn) else v for k, v in pairs.items() if v is not None}

    def __str__(self) -> str:
        names = ("database", "relation", "index", "file", "block", "key", "lsn")
        parts = [f"{n} {getattr(self, n)}" for n in names if getattr(self, n) is not None]
        return ", ".join(parts) or (self.cluster or "")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a check found broken: what, where, what it means for the data, what to do.

    `evidence` holds what the check saw (JSON values only), so that it can be judged without trust.
    """

    check: str
    severity: Severity
    location: Location
    summary: str
    meaning: str = ""
    remedy: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "severity": str(self.severity),
            "location": self.location.as_json(),
            "summary": self.summary,
            "meaning": self.meaning,
            "remedy": self.remedy,
            "evidence": dict(self.evidence),
        }
