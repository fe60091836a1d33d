"""Whether the WAL arrives in the archive, whole and in time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from knockwood.integrity.check import NotChecked, Outcome, Role, Subject, Weight
from knockwood.integrity.databases import about_the_server, rows
from knockwood.model import Finding, Location, Lsn, Severity
from knockwood.postgres.connection import Connection, current_insert_lsn
from knockwood.repository.archive import WalArchive
from knockwood.repository.gaps import list_gaps
from knockwood.repository.inventory import ArchiveInventory

_SLOTS = b"""
select slot_name, slot_type, wal_status, active from pg_catalog.pg_replication_slots
where wal_status in ('unreserved', 'lost') order by slot_name
"""

_ARCHIVER = b"""
select pg_catalog.current_setting('archive_mode'), pg_catalog.current_setting('archive_command'),
       coalesce(pg_catalog.current_setting('archive_library', true), ''),
       last_failed_wal, last_failed_time::text, failed_count
from pg_catalog.pg_stat_archiver
"""

_FAILING = b"""
select last_failed_time > coalesce(last_archived_time, '-infinity') from pg_catalog.pg_stat_archiver
"""

_ALWAYS_SUCCEEDS: Final = re.compile(
    r"""^\s*(?:/usr)?(?:/bin/)?true\s*$ | ^\s*:\s*$ | ^\s*exit\s+0\s*$
      | (?:\|\||;)\s*(?:(?:/usr)?(?:/bin/)?true|:|exit\s+0)\s*$""",
    re.VERBOSE,
)
_OVERWRITES: Final = re.compile(
    r"^\s*(?:/usr)?(?:/bin/)?(?:cp|mv|scp)\s(?!.*(?:-n\b|--no-clobber|--update=none))"
)

LAG_BYTES: Final = 64 << 20
LAG_SEGMENTS: Final = 4


def command_fault(command: str) -> tuple[Severity, str] | None:
    """What is wrong with an archive_command that reports success without archiving; None: nothing."""
    if _ALWAYS_SUCCEEDS.search(command):
        return Severity.CRITICAL, "always succeeds, so that PostgreSQL removes WAL that was never archived"
    if _OVERWRITES.match(command):
        return Severity.HIGH, "overwrites: a second server with the same archive destroys the first one's WAL"
    return None


def archive_end(inventory: ArchiveInventory) -> Lsn:
    """The furthest position that the archive holds on any timeline; zero if it holds none."""
    ends = [(numbers[-1] + 1) * inventory.segment_bytes for numbers in inventory.segments.values() if numbers]
    ends += [partial.end.value for partial in inventory.partials]
    return Lsn(max(ends, default=0))


@dataclass(frozen=True, slots=True)
class WalArchiveCheck:
    """The archive has no gap, ends near the server's position, and nothing that feeds it is failing."""

    name = "wal_archive"
    title = "The WAL archive is whole and up to date"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        if subject.role is Role.CLONE:
            yield from about_the_server(subject, self.name)
            return
        with subject.connect() as connection:
            yield from self._slots(connection)
            yield from self._archiver(connection)
            here = current_insert_lsn(connection)
        if subject.repository is None:
            yield NotChecked(self.name, "no repository is set for this cluster")
            return
        inventory = WalArchive(subject.repository).inventory()
        for gap in list_gaps(subject.repository, inventory):
            if gap.acknowledged is None:
                yield replace(gap.finding(subject.cluster), check=self.name)
        yield from self._lag(subject, inventory, here)

    def _slots(self, connection: Connection) -> Iterator[Outcome]:
        for slot, kind, status, active in rows(connection, _SLOTS):
            lost = status == "lost"
            yield self._finding(
                Severity.CRITICAL if lost else Severity.HIGH,
                Location(key=slot),
                f"replication slot {slot} is {status}",
                "WAL that its consumer still needs is gone"
                if lost
                else "its WAL goes at the next checkpoint",
                "drop and make it anew, then take a base backup"
                if lost
                else "start its consumer now, or raise max_slot_wal_keep_size",
                {"slot": slot, "type": kind, "wal_status": status, "active": active},
            )

    def _archiver(self, connection: Connection) -> Iterator[Outcome]:
        [(mode, command, library, failed_wal, failed_time, failures)] = rows(connection, _ARCHIVER)
        if mode == "off":
            return
        fault = command_fault(command) if not library else None
        if fault is not None:
            yield self._finding(
                fault[0],
                Location(),
                f"archive_command {fault[1]}",
                "the archive has holes, or wrong WAL, that only a restore would show",
                "archive_command = 'knockwood wal push %p'",
                {"archive_command": command},
            )
        [(failing,)] = rows(connection, _FAILING)
        if failing:
            yield self._finding(
                Severity.HIGH,
                Location(key=failed_wal),
                f"archiving fails: {failed_wal} at {failed_time}, {failures} failures in all",
                "nothing committed since is in the archive, and pg_wal grows until the disk is full",
                "read the server's log for what archive_command printed",
                {"last_failed_wal": failed_wal, "last_failed_time": failed_time, "failed_count": failures},
            )

    def _lag(self, subject: Subject, inventory: ArchiveInventory, here: Lsn) -> Iterator[Outcome]:
        end = archive_end(inventory)
        allowed = max(LAG_BYTES, LAG_SEGMENTS * inventory.segment_bytes)
        if end.value and here - end > allowed:
            yield self._finding(
                Severity.HIGH,
                Location(cluster=subject.cluster, lsn=end),
                f"the archive ends at {end}, {(here - end) >> 20} MB behind the server at {here}",
                "if the server were lost now, everything committed since could not be restored",
                "is `knockwood wal receive` (or up) running, or archive_command failing?",
                {"archive_end": str(end), "server": str(here), "bytes": here - end},
            )
        elif not end.value:
            yield self._finding(
                Severity.CRITICAL,
                Location(cluster=subject.cluster),
                "the archive holds no WAL at all",
                "no backup can be restored",
                "start `knockwood wal receive`, or set archive_command = 'knockwood wal push %p'",
                {"server": str(here)},
            )

    def _finding(
        self,
        severity: Severity,
        location: Location,
        summary: str,
        meaning: str,
        remedy: str,
        evidence: dict[str, object],
    ) -> Finding:
        return Finding(self.name, severity, location, summary, meaning, remedy, evidence)


CHECK = WalArchiveCheck()
