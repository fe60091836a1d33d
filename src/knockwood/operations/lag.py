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
from knockwood.postgres.connection import ServerFacts
from knockwood.postgres.waldump import walk
from knockwood.repository.archive import WalArchive
from knockwood.repository.repository import Repository

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
                self.reached = archive.inventory().end_from(self.timeline, self.start)
                if self.lsn is not None and self.reached >= self.lsn:
                    self.seconds = clock.monotonic() - started
                    return
                clock.sleep(POLL)
        except KnockwoodError as error:
            self.error = error

    def wait(self) -> None:
        """Until it is all there, or the time is up. Raises what reading the archive raised."""
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error


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
