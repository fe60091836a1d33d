"""What the archive lacks, counted in the primary's own WAL."""

from __future__ import annotations

from pathlib import Path

from knockwood.errors import KnockwoodError
from knockwood.host import privileges
from knockwood.model import Lsn
from knockwood.postgres.binaries import Programs
from knockwood.postgres.connection import ServerFacts
from knockwood.postgres.waldump import walk


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
