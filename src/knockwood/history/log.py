"""The log: transactions with the names of their tables, marks between them, and what is not covered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from knockwood.errors import UsageError
from knockwood.history.assemble import Asked
from knockwood.history.index import ArchiveIndex, NotCovered
from knockwood.history.marks import Mark
from knockwood.history.names import RelationNames
from knockwood.history.transaction import RelationChanges, Transaction
from knockwood.model.finding import Verdict
from knockwood.model.wal import Lsn, WalRange
from knockwood.postgres.walendings import moment

_FIRST_NORMAL = 16384


@dataclass(frozen=True, slots=True)
class TableChanges:
    """What a transaction did to one table. `what` says what counts cannot: truncated, rewritten, dropped.

    `known` is False where only the file's number is known.
    """

    database: str
    name: str
    inserted: int
    updated: int
    deleted: int
    what: str | None = None
    known: bool = True

    def as_json(self) -> dict[str, Any]:
        return {
            "database": self.database,
            "name": self.name,
            "inserted": self.inserted,
            "updated": self.updated,
            "deleted": self.deleted,
            "what": self.what,
        }


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One transaction as the log shows it."""

    transaction: Transaction
    tables: tuple[TableChanges, ...]

    def as_json(self) -> dict[str, Any]:
        one = self.transaction
        return {
            "xid": one.xid,
            "subtransactions": list(one.subxids),
            "commit_lsn": str(one.commit_lsn),
            "commit_time": one.commit_time.isoformat(),
            "first_lsn": str(one.first_lsn),
            "timeline": one.timeline,
            "bytes": one.wal_bytes,
            "tables": [table.as_json() for table in self.tables],
            "catalog_changes": one.catalog_changes,
            "gid": one.gid,
            "label": one.label,
            "complete": one.complete,
        }


@dataclass(frozen=True, slots=True)
class Log:
    """The answer: `entries` in the order of their commits (or the largest first), `marks` of the same
    range, and the parts of the range that are `not_covered`.
    """

    entries: tuple[LogEntry, ...]
    marks: tuple[Mark, ...]
    covered: tuple[WalRange, ...]
    not_covered: tuple[NotCovered, ...]
    notes: tuple[str, ...] = ()
    more: bool = False
    complete: bool = True
    """False where there may be newer transactions that the archive does not hold, and they are asked for."""

    @property
    def verdict(self) -> Verdict:
        known = self.complete and all(entry.transaction.complete for entry in self.entries)
        return Verdict.HELD if known and not self.not_covered else Verdict.NOT_CHECKED

    def as_json(self) -> dict[str, Any]:
        return {
            "transactions": [entry.as_json() for entry in self.entries],
            "marks": [mark.as_json() for mark in self.marks],
            "covered": [_range(one) for one in self.covered],
            "not_covered": [{**_range(one.range), "reason": one.reason} for one in self.not_covered],
            "more": self.more,
            "complete": self.complete,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of the log: a range by LSN (half open) or time, a table by name, an xid."""

    since: Lsn | None = None
    until: Lsn | None = None
    after: datetime | None = None
    before: datetime | None = None
    table: str | None = None
    xid: int | None = None
    largest: bool = False
    limit: int = 50


def read_log(
    index: ArchiveIndex,
    names: RelationNames,
    question: Question,
    marks: Sequence[Mark] = (),
    notes: Iterable[str] = (),
    *,
    complete: bool = True,
) -> Log:
    """Answer from an index, which is `complete` if it holds all that there is to know now.

    Raises UsageError for a table that nobody knows, and for a name of several.
    """
    filenodes = _files(names, question.table) if question.table is not None else None
    xids = frozenset([question.xid]) if question.xid is not None else None
    asked = Asked(question.since, question.until, question.after, question.before, filenodes, xids)
    # One more than wanted tells whether there is more.
    limit = question.limit + 1
    found = index.largest(limit, asked) if question.largest else index.newest(limit, asked)
    more = len(found) > question.limit
    found = found[: question.limit] if question.largest else found[-question.limit :]
    entries = tuple(LogEntry(one, named(one, names)) for one in found)
    return Log(
        entries=entries,
        marks=_marks_of(marks, question, entries, more),
        covered=index.covered,
        not_covered=_gaps(index, question, entries[0] if more and not question.largest else None),
        notes=(*notes, *names.problems),
        more=more,
        complete=complete or _ends_inside(index, question),
    )


def named(one: Transaction, names: RelationNames) -> tuple[TableChanges, ...]:
    """The tables of a transaction by name. Indexes, TOAST tables and catalogs are left out."""
    groups: dict[tuple[object, ...], list[RelationChanges]] = {}
    for changes in one.relations:
        known = names.of(changes.database, changes.filenode)
        if known is not None and (not known.is_table or known.schema in ("pg_catalog", "information_schema")):
            continue
        if known is None and changes.filenode < _FIRST_NORMAL:
            continue
        if known is not None and known.oid < _FIRST_NORMAL:
            continue
        key = (
            (known.database_oid, known.oid)
            if known is not None
            else (changes.database, changes.filenode, None)
        )
        groups.setdefault(key, []).append(changes)
    return tuple(
        sorted((_table(group, names) for group in groups.values()), key=lambda t: (t.database, t.name))
    )


def _table(group: Sequence[RelationChanges], names: RelationNames) -> TableChanges:
    """One table's changes: with a rewrite or a TRUNCATE it has two files in one transaction."""
    last = group[-1]
    known = names.of(last.database, last.filenode)
    gone = [one for one in group if one.dropped]
    fresh = [one for one in group if not one.dropped and one.rewritten]
    what = None
    if any(one.truncated for one in gone):
        what = "truncated"
    elif gone and (fresh or any(one.rewritten for one in gone) or len(group) > len(gone)):
        # Both files are known to be this table's.
        what = "rewritten"
    elif gone:
        what = "dropped, truncated or rewritten" if known is None else "file dropped"
    elif fresh:
        what = "rewritten"
    return TableChanges(
        database=names.database(last.database),
        name=names.text(last.database, last.filenode),
        inserted=sum(one.inserted for one in group),
        updated=sum(one.updated for one in group),
        deleted=sum(one.deleted for one in group),
        what=what,
        known=known is not None,
    )


def _files(names: RelationNames, table: str) -> frozenset[tuple[int, int]]:
    found = names.find(table)
    tables = {(one.database, str(one)) for one in found if one.is_table and one.source}
    distinct = {(one.database_oid, one.oid) for one in found}
    if not found:
        raise UsageError(
            f"no table {table} is known",
            hint="give SCHEMA.TABLE or DATABASE.SCHEMA.TABLE; for a partitioned table name its partitions",
        )
    if len(distinct) > 1:
        listed = ", ".join(sorted(f"{database}.{name}" for database, name in tables))
        raise UsageError(f"{table} may be any of {listed}", hint="give DATABASE.SCHEMA.TABLE")
    return frozenset((one.database_oid, one.filenode) for one in found)


def _marks_of(
    marks: Sequence[Mark], question: Question, entries: Sequence[LogEntry], more: bool
) -> tuple[Mark, ...]:
    """Marks of the range asked for; where older transactions are left out, those since the first shown."""
    begin = question.after
    if more and not question.largest and entries:
        oldest = min(entry.transaction.commit_time for entry in entries)
        begin = max(begin, oldest) if begin is not None else oldest
    chosen = []
    for mark in marks:
        if (begin is not None and mark.at < begin) or (
            question.before is not None and mark.at > question.before
        ):
            continue
        if mark.lsn is not None:
            if question.since is not None and mark.lsn < question.since:
                continue
            if question.until is not None and mark.lsn >= question.until:
                continue
        chosen.append(mark)
    return tuple(chosen)


def _gaps(index: ArchiveIndex, question: Question, oldest: LogEntry | None) -> tuple[NotCovered, ...]:
    """What is not covered of the range asked for, or of that from the oldest entry shown on."""
    since = question.since
    if oldest is not None:
        since = max(oldest.transaction.commit_lsn, since or Lsn(0))
    found: list[NotCovered] = []
    for gap in index.not_covered:
        begin = max(gap.range.start, since or gap.range.start)
        end = min(gap.range.end, question.until or gap.range.end)
        if begin < end and _may_be_of_that_time(index, gap, question):
            found.append(NotCovered(WalRange(gap.range.timeline, begin, end), gap.reason))
    return (*found, *_outside(index, question))


def _may_be_of_that_time(index: ArchiveIndex, gap: NotCovered, question: Question) -> bool:
    """Whether a gap may hold commits of the time asked for, going by the commits around it."""
    before = [head.times for head in index.heads if head.end <= gap.range.start.value and head.times]
    after = [head.times for head in index.heads if head.start >= gap.range.end.value and head.times]
    if question.after is not None and after and moment(after[0][1]) < question.after:
        return False
    return not (question.before is not None and before and moment(before[-1][0]) > question.before)


def _ends_inside(index: ArchiveIndex, question: Question) -> bool:
    """Whether what is asked for ends before the archive does."""
    covered = index.covered
    if question.until is not None and covered and question.until <= max(one.end for one in covered):
        return True
    times = [head.times for head in index.heads if head.times]
    return question.before is not None and bool(times) and question.before < moment(times[-1][0])


def _outside(index: ArchiveIndex, question: Question) -> list[NotCovered]:
    """The parts of a range asked for by LSN that lie before or after all WAL of the archive."""
    covered, known = index.covered, index.not_covered
    if not covered:
        return (
            []
            if known
            else [NotCovered(WalRange(index.timeline, Lsn(0), Lsn(0)), "the archive holds no WAL")]
        )
    ranges = [*covered, *(gap.range for gap in known)]
    first, last = min(one.start for one in ranges), max(one.end for one in ranges)
    found = []
    if question.since is not None and question.since < first:
        end = min(first, question.until or first)
        found.append(
            NotCovered(WalRange(ranges[0].timeline, question.since, end), "the archive begins after it")
        )
    if question.until is not None and question.until > last:
        begin = max(last, question.since or last)
        found.append(
            NotCovered(WalRange(index.timeline, begin, question.until), "the archive ends before it")
        )
    return found


def _range(one: WalRange) -> dict[str, Any]:
    return {"timeline": one.timeline, "from": str(one.start), "to": str(one.end)}


__all__ = ["Log", "LogEntry", "Question", "TableChanges", "named", "read_log"]
