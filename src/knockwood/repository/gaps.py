"""Gaps: WAL that the archive lacks between what it has. No restore crosses one.

A gap is recorded when the receiver learns of it, and computed from the inventory as well, so that it
shows also when nobody recorded it. It stays visible until it is acknowledged, or filled after all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from knockwood.errors import ObjectDamagedError, ObjectExistsError, UsageError
from knockwood.host import clock
from knockwood.model import Finding, Location, Severity
from knockwood.model.wal import Lsn, Timeline, WalRange
from knockwood.repository.archive import WalArchive
from knockwood.repository.inventory import ArchiveInventory, merged, subtracted
from knockwood.repository.repository import Repository

REMEDY = "take a new base backup now: `knockwood backup`; what is after the gap is recoverable from then on"

_NAME = re.compile(r"gaps/([0-9A-F]{8})-([0-9A-F]{16})-([0-9A-F]{16})(\.ack)?\.json\Z")


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """Somebody has seen the gap and accepts it."""

    by: str
    note: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Gap:
    """A hole in the WAL. `detected_at` is None where only the inventory tells of it."""

    range: WalRange
    reason: str
    detected_at: datetime | None = None
    acknowledged: Acknowledgement | None = None

    def as_json(self) -> dict[str, Any]:
        seen = self.acknowledged
        return {
            "timeline": self.range.timeline,
            "start": str(self.range.start),
            "end": str(self.range.end),
            "reason": self.reason,
            "detected_at": self.detected_at.isoformat() if self.detected_at else None,
            "acknowledged": {"by": seen.by, "note": seen.note, "at": seen.at.isoformat()} if seen else None,
        }

    def finding(self, cluster: str) -> Finding:
        """The gap as what a check reports."""
        return Finding(
            check="wal-gap",
            severity=Severity.LOW if self.acknowledged else Severity.CRITICAL,
            location=Location(cluster=cluster, lsn=self.range.start),
            summary=f"the archive has no WAL for {self.range}: {self.reason}",
            meaning=f"no moment after {self.range.start} can be restored from a backup taken before"
            f" {self.range.end}",
            remedy=REMEDY,
            evidence=self.as_json(),
        )


def gap_object(gap: WalRange) -> str:
    """The object name of a gap, without `.json` or `.ack.json`."""
    return f"gaps/{gap.timeline:08X}-{gap.start.value:016X}-{gap.end.value:016X}"


def record(repository: Repository, gap: WalRange, reason: str) -> bool:
    """Write a gap down; False if it is written down already."""
    value = {
        "timeline": gap.timeline,
        "start": str(gap.start),
        "end": str(gap.end),
        "reason": reason,
        "detected_at": clock.now().isoformat(),
    }
    return _put_once(repository, f"{gap_object(gap)}.json", value)


def acknowledge(repository: Repository, gap: WalRange, by: str, note: str) -> None:
    """Accept a gap: it stays listed, as acknowledged. Raises UsageError if there is no such gap."""
    found = [g for g in list_gaps(repository) if g.range == gap]
    if not found:
        raise UsageError(f"there is no gap {gap}", hint="`knockwood verify` lists the gaps")
    record(repository, gap, found[0].reason)
    value = {"by": by, "note": note, "at": clock.now().isoformat()}
    _put_once(repository, f"{gap_object(gap)}.ack.json", value)


def list_gaps(repository: Repository, inventory: ArchiveInventory | None = None) -> tuple[Gap, ...]:
    """Every gap, recorded or computed, by timeline and start; what was filled since is left out.

    Raises ObjectDamagedError for a record that cannot be read.
    """
    records: dict[WalRange, Mapping[str, Any]] = {}
    seen: dict[WalRange, Mapping[str, Any]] = {}
    for info in repository.storage.list("gaps/"):
        match = _NAME.match(info.name)
        if match is not None:
            where = WalRange(Timeline(int(match[1], 16)), Lsn(int(match[2], 16)), Lsn(int(match[3], 16)))
            (seen if match[4] else records)[where] = repository.get_json(info.name)
    stock = inventory if inventory is not None else WalArchive(repository).inventory()
    try:
        return combine(stock, (_gap(where, records[where], seen.get(where)) for where in records))
    except (KeyError, TypeError, ValueError) as error:
        raise ObjectDamagedError(f"a gap's record cannot be read: {error}", where="gaps/") from error


def combine(inventory: ArchiveInventory, recorded: Iterable[Gap]) -> tuple[Gap, ...]:
    """The recorded gaps that are still open, and the inventory's holes that no record tells of."""
    open_gaps = [gap for gap in recorded if not inventory.covers(gap.range)]
    known = merged(gap.range for gap in open_gaps)
    computed = (
        Gap(left, "segments are missing from the archive")
        for hole in inventory.gaps()
        for left in subtracted(hole, known)
    )
    return tuple(
        sorted([*open_gaps, *computed], key=lambda g: (g.range.timeline, g.range.start, g.range.end))
    )


def _gap(where: WalRange, value: Mapping[str, Any], seen: Mapping[str, Any] | None) -> Gap:
    return Gap(
        where,
        str(value["reason"]),
        datetime.fromisoformat(value["detected_at"]),
        Acknowledgement(str(seen["by"]), str(seen["note"]), datetime.fromisoformat(seen["at"]))
        if seen is not None
        else None,
    )


def _put_once(repository: Repository, name: str, value: Mapping[str, Any]) -> bool:
    try:
        repository.put_json(name, value)
    except ObjectExistsError:
        return False
    return True
