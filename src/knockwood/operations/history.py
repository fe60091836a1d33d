"""The log of a cluster's transactions, and marks in it."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from knockwood.errors import KnockwoodError, PostgresError, UsageError
from knockwood.history import marks, store
from knockwood.history.index import ArchiveIndex
from knockwood.history.log import Log, Question, read_log
from knockwood.history.marks import Mark
from knockwood.history.names import RelationNames
from knockwood.host import clock
from knockwood.model.wal import Lsn
from knockwood.operations.cluster import Cluster
from knockwood.operations.freshness import bring_up_to_date
from knockwood.postgres.connection import connect, translated
from knockwood.repository.plans import ToLsn, ToTime
from knockwood.repository.repository import Repository
from knockwood.repository.targets import parse_target

MOST_TEXT = 500
"""Characters of a mark."""


def parse_moment(text: str) -> Lsn | datetime:
    """Read an LSN or a time with its zone. Raises UsageError."""
    target = parse_target(text)
    if isinstance(target, ToLsn):
        return target.lsn
    if isinstance(target, ToTime):
        return target.time
    raise UsageError(f"neither an LSN nor a time: {text!r}", hint="16/B374D848, or 2026-11-21T04:45:00Z")


def open_index(
    cluster: Cluster,
    repository: Repository,
    *,
    rebuild: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ArchiveIndex, tuple[str, ...]]:
    """The archive's index, complete to what the live server has promised; and what to know about it."""
    fresh = bring_up_to_date(cluster, repository)
    if rebuild:
        store.delete(repository)
    index = ArchiveIndex.open(repository, programs_for=cluster.programs, progress=progress)
    return index, (() if fresh.complete else (fresh.detail,))


def read_history(
    cluster: Cluster,
    question: Question,
    *,
    rebuild: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Log:
    """Answer a question about the cluster's transactions from its archive.

    With the server down the archive alone counts, and the answer says so.
    """
    repository = cluster.repository()
    index, notes = open_index(cluster, repository, rebuild=rebuild, progress=progress)
    names = RelationNames(repository, cluster.dsn)
    known = marks.read_all(repository)
    return read_log(index, names, question, known, notes, complete=not notes)


@dataclass(frozen=True, slots=True)
class Marked:
    """A mark that was made. `detail` says where it lies."""

    mark: Mark
    detail: str


def make_mark(cluster: Cluster, text: str, at: Lsn | datetime | None = None) -> Marked:
    """Store a mark durably in the repository. Without `at` it is of now, and written into the WAL as well.

    Raises UsageError for an empty or too long text.
    """
    text = text.strip()
    if not text or len(text) > MOST_TEXT:
        raise UsageError(f"a mark has 1 to {MOST_TEXT} characters", hint="knockwood mark 'release 42'")
    repository = cluster.repository()
    made = clock.now()
    by = _who()
    if isinstance(at, Lsn):
        mark = Mark(text, _time_of(repository, at) or made, made, by, at)
        detail = f"at {at}"
    elif at is not None:
        mark, detail = Mark(text, at, made, by), f"at {at.isoformat()}"
    else:
        mark, detail = _now(cluster, text, made, by)
    marks.put(repository, mark)
    return Marked(mark, detail)


def _now(cluster: Cluster, text: str, made: datetime, by: str) -> tuple[Mark, str]:
    try:
        with connect(cluster.dsn) as connection, translated(), connection.transaction():
            row = connection.execute(
                "select pg_catalog.pg_logical_emit_message(true, %s, %s)::text,"
                " pg_catalog.pg_current_xact_id()::text::bigint & 4294967295",
                [marks.PREFIX, text],
            ).fetchone()
    except PostgresError as error:
        # Not in the WAL, but not lost: a mark made while the server is down may be the one that matters.
        return Mark(text, made, made, by), f"at {made.isoformat()}, not in the WAL: {error.what}"
    assert row is not None
    return Mark(
        text, made, made, by, Lsn.parse(row[0]), row[1]
    ), f"in the WAL at {row[0]}, transaction {row[1]}"


def _time_of(repository: Repository, lsn: Lsn) -> datetime | None:
    """The time of the last commit known before a position."""
    try:
        index = ArchiveIndex.open(repository, build=False)
    except KnockwoodError:
        return None
    found = None
    for head in index.heads:
        if head.segment.start <= lsn < head.segment.end:
            for one in index.transactions(since=Lsn(head.start), until=lsn):
                found = one.commit_time
    return found


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
