"""How far the archive is behind its primary: in seconds, and in commits read in the primary's own WAL."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from knockwood.errors import KnockwoodError
from knockwood.host import clock, privileges
from knockwood.model import Lsn, Timeline
from knockwood.postgres.binaries import Programs
from knockwood.postgres.connection import ServerFacts, connect, server_facts, translated
from knockwood.postgres.waldump import walk
from knockwood.repository.archive import WalArchive
from knockwood.repository.repository import Repository
from knockwood.repository.route import newest_holding

POLL: Final = 0.1
"""Seconds between two looks at the archive."""


@dataclass(slots=True)
class ArchiveWatch:
    """Watches, beside the hashing, when the archive holds everything before `lsn`."""

    repository: Repository
    timeline: Timeline
    start: Lsn
    timeout: float
    lsn: Lsn | None = None
    reached: Lsn = field(default_factory=lambda: Lsn(0))
    seconds: float | None = None
    error: KnockwoodError | None = None
    _thread: threading.Thread | None = None

    def begin(self, lsn: Lsn) -> None:
        """Called again with a later position, it waits for that one."""
        first = self.lsn is None
        self.lsn = lsn
        if first:
            self._thread = threading.Thread(target=self._watch, name="archive watch", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        started = clock.monotonic()
        archive = WalArchive(self.repository)
        try:
            while clock.monotonic() - started < self.timeout:
                stock = archive.inventory()
                timeline = newest_holding(stock, self.timeline, self.lsn or Lsn(0))
                self.reached = stock.end_from(timeline, self.start)
                if self.lsn is not None and self.reached >= self.lsn:
                    self.seconds = clock.monotonic() - started
                    return
                clock.sleep(POLL)
        except KnockwoodError as error:
            self.error = error

    def give_up(self) -> None:
        """Nobody waits for it any more: the thread ends at its next look."""
        self.timeout = 0.0

    def wait(self) -> None:
        """Until it is all there, or the time is up. Raises what reading the archive raised."""
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error


def commits_of(
    dsn: str, programs: Programs, data_directory: Path | None, facts: ServerFacts, start: Lsn, end: Lsn
) -> int | None:
    """A server's commits from `start` up to `end`, from its files or through SQL; None if by neither."""
    found = commits_between(programs, data_directory, facts, start, end) if data_directory else None
    return commits_by_sql(dsn, facts.timeline, start, end) if found is None else found


def commits_between(
    programs: Programs, data_directory: Path, facts: ServerFacts, start: Lsn, end: Lsn
) -> int | None:
    """Commits whose records begin from `start` up to `end`, read in `pg_wal`; None where that WAL is not
    readable from one end to the other."""
    if start >= end:
        return 0
    try:
        found = walk(
            programs,
            data_directory / "pg_wal",
            facts.timeline,
            start,
            end,
            facts.segment_bytes,
            account=privileges.server_account(data_directory),
        )
    except KnockwoodError:
        return None
    # Right after `end` the WAL may not be written yet: what matters is that the walk came that far.
    if found.end_lsn < end and not found.sound:
        return None
    return sum(start <= commit.lsn < end for commit in found.commits)


def commits_by_sql(dsn: str, timeline: Timeline, start: Lsn, end: Lsn) -> int | None:
    """The same, asked of the server; None where it lacks the extension pg_walinspect (15+), the role the
    right to use it, or the server that WAL, as one does that was promoted meanwhile."""
    try:
        with connect(dsn) as connection, translated():
            if server_facts(connection).timeline != timeline:
                return None
            row = connection.execute(
                "select pg_catalog.quote_ident(n.nspname) from pg_catalog.pg_extension e"
                " join pg_catalog.pg_namespace n on n.oid = e.extnamespace where e.extname = 'pg_walinspect'"
            ).fetchone()
            if row is None:
                return None
            # A prepared transaction commits by a record of its own kind.
            [(count,)] = connection.execute(
                f"select pg_catalog.count(*) from {row[0]}.pg_get_wal_records_info(%s, %s)"
                " where resource_manager = 'Transaction' and record_type like 'COMMIT%%'"
                " and start_lsn >= %s::pg_catalog.pg_lsn and start_lsn < %s::pg_catalog.pg_lsn".encode(),
                [str(start), str(end), str(start), str(end)],
            ).fetchall()
    except KnockwoodError:
        return None
    return int(count)
