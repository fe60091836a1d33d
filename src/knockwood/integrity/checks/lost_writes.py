"""The page-LSN audit: what the WAL says was written, against what is on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from knockwood.integrity.audited import Block, Memory, Span, without
from knockwood.integrity.block_audit import LOOK_BACK_BYTES, BlockAudit, text
from knockwood.integrity.catalog import Names, stake
from knockwood.integrity.check import NotChecked, Outcome, Role, Subject, Weight
from knockwood.integrity.last_changes import LastChanges
from knockwood.integrity.mended import Mended
from knockwood.integrity.page_audit import Deviation
from knockwood.integrity.relation_files import DataFiles, RelationFile, data_files
from knockwood.integrity.staged_wal import StagedWal, staged_wal, with_wal
from knockwood.model import Finding, Lsn, Severity
from knockwood.postgres.connection import Connection
from knockwood.postgres.waldump import first_record

RUN_BYTES: Final = 1 << 28
"""WAL one run reads on a server in use; on a clone it reads all of the above at once."""

_WORDS: Final = {
    "stale": "an old image of the page is on disk: a write was lost",
    "zeroed": "the page is all zeros, and the WAL says that it was written",
    "missing": "the file ends before this block, and the WAL says that it was written",
    "foreign": "the page was written by a record that does not name it: it belongs elsewhere",
    "used": "an old image of the page was on disk, and was changed again: a write had been lost",
    "future": "the page's LSN is after the end of the WAL: it is not of this history",
}

_ROWS_MISSING: Final = "rows committed since are missing, or deleted ones are back, and no query will say so"

_OLD_PAGE_USED: Final = (
    "rows committed before that change are missing, or deleted ones are back; the WAL went on from the old page, so"
    " that a restore lacks them too, and no query will say so"
)

_BRING_ROWS_OVER: Final = (
    "bring the lost changes over as rows, from the WAL before that change: knockwood recover; where that is refused,"
    " by hand from a restore to just before it, and then say so: the evidence has the statement"
)


class LostWrites:
    """For every block that recent WAL touched: is the page on disk the one that the WAL left?"""

    name = "lost_writes"
    title = "Lost, misdirected and undone writes (page LSNs against the WAL)"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        with data_files(subject) as data, subject.connect() as connection:
            memory = Memory.of(subject)
            changes = memory.changes()
            run = _Run(subject, data, connection, _redo(connection), memory.load(), changes)
            clean = True
            for outcome in run.outcomes():
                clean = False
                yield outcome
            if not run.read:
                yield NotChecked(
                    self.name,
                    "there is no WAL to compare with: neither the server's pg_wal can be read nor is there"
                    " a repository with WAL of this timeline up to its last checkpoint",
                )
                return
            # WAL that showed damage is read again, so that the next run shows it too.
            if clean:
                fresh = any(start < end for start, end in run.read)
                memory.save([*run.held, *run.read], run.floor, changes if fresh else None, run.once_old)
            yield from run.unread()


@dataclass(slots=True)
class _Run:
    """Which WAL to read, newest first, within the bound of one run; what was read and what was not."""

    subject: Subject
    data: DataFiles
    connection: Connection
    redo: Lsn
    held: list[Span]
    changes: LastChanges
    read: list[Span] = field(default_factory=list)
    missed: list[tuple[Span, str]] = field(default_factory=list)
    once_old: set[Block] = field(default_factory=set)

    @property
    def floor(self) -> Lsn:
        """The start of the WAL this run answers for: back to what the last one held, at the least."""
        floor = Lsn(max(self.redo.value - LOOK_BACK_BYTES, 0))
        return min([floor, *(end for _, end in self.held[-1:])])

    def outcomes(self) -> Iterator[Outcome]:
        size = self.subject.facts.segment_bytes
        most = LOOK_BACK_BYTES if self.subject.role is Role.CLONE else max(RUN_BYTES, 2 * size)
        left = most
        spans = without((self.floor, self.redo), self.held)
        if self.held and self.held[-1][1] >= self.redo:  # no checkpoint since the last run
            self.read.append((self.redo, self.redo))
        for start, end in reversed(spans):
            if left < size and self.read:
                self.missed.append(((start, end), f"one run reads {most >> 20} MB"))
                continue
            audit = partial(self._audit, start)
            read, used, found = with_wal(self.subject, end, left, audit, since=start)
            if isinstance(read, str):
                self.missed.append(((start, end), read))
                continue
            left -= used
            self._note((start, end), read, most, bounded=left < size)
            yield from found

    def _audit(self, start: Lsn, wal: StagedWal | None) -> tuple[Span | str, int, list[Outcome]]:
        """What of the WAL from `start` on was read (or why nothing), how many bytes there were, what was found."""
        if wal is None or wal.end <= wal.start:
            return "it is neither in pg_wal nor in the repository", 0, []
        begin = self._begin(start, wal)
        if begin >= wal.end:  # all that is left is the end of a record that began before
            return "it is no longer there", 0, []
        audit = BlockAudit(self.subject, self.data, self.connection, wal, self.changes)
        names = Names(self.subject)
        deviations = sorted(audit.deviations(), key=lambda each: (each.fork, each.block))
        self.once_old |= audit.once_old
        found: list[Outcome] = [NotChecked(LostWrites.name, reason) for reason in audit.unknown]
        found += [_finding(each, audit.file(each), names, wal) for each in deviations]
        return (begin, wal.end), wal.end - wal.start, found

    def _note(self, wanted: Span, read: Span, most: int, *, bounded: bool) -> None:
        self.read.append(read)
        if wanted[0] < read[0]:
            reason = f"one run reads {most >> 20} MB" if bounded else "it is no longer there"
            self.missed.append(((wanted[0], read[0]), reason))
        if wanted[1] - read[1] > self.subject.facts.segment_bytes:
            self.missed.append(((read[1], wanted[1]), "it is not archived yet"))

    def _begin(self, start: Lsn, wal: StagedWal) -> Lsn:
        """Where the WAL begins that can be read: a record that crosses into the first segment cannot.

        It belongs to what is left for the next run, which reads up to here.
        """
        if wal.start <= start:
            return wal.start
        programs = self.subject.server_programs
        first = first_record(programs, wal.folder, wal.timeline, wal.start, wal.end, wal.segment_bytes)
        return first if first is not None else wal.end

    def unread(self) -> Iterator[NotChecked]:
        """What this run answers for and did not read; never is it passed over in silence."""
        ends = {end for _, end in self.held}
        for (start, end), reason in self.missed:
            # Below all that was ever read, nothing is promised but what the server still keeps.
            if start == self.floor and start not in ends and not self._exists(end):
                continue
            yield NotChecked(
                LostWrites.name,
                f"WAL from {start} to {end} was not compared with the disk: {reason};"
                " the next run goes on with what is still there",
            )

    def _exists(self, before: Lsn) -> bool:
        """Whether there is WAL of the segment before the one that holds this position."""
        size = self.subject.facts.segment_bytes
        border = Lsn(before.value // size * size)
        if border <= self.floor:
            return before > self.floor
        with staged_wal(self.subject, border, size) as wal:
            return wal is not None and wal.end == border


def _redo(connection: Connection) -> Lsn:
    """Up to here every change is on disk: the redo position of the last completed checkpoint."""
    return Lsn.parse(text(connection, "select redo_lsn::text from pg_catalog.pg_control_checkpoint()"))


def _finding(deviation: Deviation, file: RelationFile, names: Names, wal: StagedWal) -> Finding:
    what = stake(names.of(file), file.fork)
    heap = what.severity is Severity.CRITICAL
    meaning, remedy = (_ROWS_MISSING if heap else what.meaning), what.remedy
    evidence: dict[str, object] = {
        "kind": deviation.kind,
        "last_record": str(deviation.expected),
        "page_lsn": str(deviation.page_lsn) if deviation.page_lsn else None,
        "wal": f"{wal.start}..{wal.end} on timeline {wal.timeline}",
    }
    if deviation.image is not None:
        evidence["image"] = str(deviation.image)
        evidence["once_mended"] = Mended(file.relation_path, deviation.block, deviation.image).statement
        if heap:
            meaning, remedy = _OLD_PAGE_USED, _BRING_ROWS_OVER
    return Finding(
        LostWrites.name,
        what.severity,
        names.location(file, deviation.block),
        _WORDS["used" if deviation.image is not None else deviation.kind],
        meaning,
        remedy,
        evidence,
    )


CHECK = LostWrites()
