"""The page-LSN audit: what the WAL says was written, against what is on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from knockwood.errors import HostError
from knockwood.integrity.audited import Memory, Span, without
from knockwood.integrity.budget import pace
from knockwood.integrity.catalog import Names, stake
from knockwood.integrity.check import NotChecked, Outcome, Role, Subject, Weight
from knockwood.integrity.page_audit import (
    MANAGERS,
    Deviation,
    Expectations,
    Expected,
    explained,
    judge,
    may_keep_lsn,
)
from knockwood.integrity.relation_files import DataFiles, RelationFile, data_files, listing
from knockwood.integrity.staged_wal import StagedWal, staged_wal, with_wal
from knockwood.model import Finding, Lsn, Severity
from knockwood.postgres import walrefs
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.postgres.connection import Connection, translated
from knockwood.postgres.pages import PAGE_BYTES, SEGMENT_PAGES, bad_pages
from knockwood.postgres.waldump import first_record
from knockwood.postgres.walimages import PageImage, WalImages, first_images
from knockwood.postgres.walreader import Reader
from knockwood.postgres.walrefs import Fork

LOOK_BACK_BYTES: Final = 1 << 30
"""WAL before the last checkpoint that the check answers for."""

RUN_BYTES: Final = 1 << 28
"""WAL one run reads on a server in use; on a clone it reads all of the above at once."""

_MOST_BLOCKS: Final = 1_000_000
"""Blocks remembered at once (about 100 MB of memory while they are sorted)."""

_BATCH: Final = 4096

_WORDS: Final = {
    "stale": "an old image of the page is on disk: a write was lost",
    "zeroed": "the page is all zeros, and the WAL says that it was written",
    "missing": "the file ends before this block, and the WAL says that it was written",
    "foreign": "the page was written by a record that does not name it: it belongs elsewhere",
    "future": "the page's LSN is after the end of the WAL: it is not of this history",
}


class LostWrites:
    """For every block that recent WAL touched: is the page on disk the one that the WAL left?"""

    name = "lost_writes"
    title = "Lost, misdirected and undone writes (page LSNs against the WAL)"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        with data_files(subject) as data, subject.connect() as connection:
            memory = Memory.of(subject)
            run = _Run(subject, data, connection, _redo(connection), memory.load())
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
                memory.save([*run.held, *run.read], run.floor)
            yield from run.unread()


@dataclass(slots=True)
class _Run:
    """Which WAL to read, newest first, within the bound of one run; what was read and what was not."""

    subject: Subject
    data: DataFiles
    connection: Connection
    redo: Lsn
    held: list[Span]
    read: list[Span] = field(default_factory=list)
    missed: list[tuple[Span, str]] = field(default_factory=list)

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
        found = list(_Audit(self.subject, self.data, self.connection, wal).run())
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
        programs = self.subject.programs or find_programs(self.subject.facts.major)
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


def _text(connection: Connection, query: str) -> str:
    with translated():
        row = connection.execute(query).fetchone()
    assert row is not None
    return str(row[0])


def _redo(connection: Connection) -> Lsn:
    """Up to here every change is on disk: the redo position of the last completed checkpoint."""
    return Lsn.parse(_text(connection, "select redo_lsn::text from pg_catalog.pg_control_checkpoint()"))


def _now(connection: Connection) -> Lsn:
    """The end of the WAL that is on disk: no page there is younger, no truncation was made without it."""
    return Lsn.parse(
        _text(
            connection,
            "select case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn()"
            " else pg_catalog.pg_current_wal_flush_lsn() end::text",
        )
    )


class _Audit:
    def __init__(self, subject: Subject, data: DataFiles, connection: Connection, wal: StagedWal) -> None:
        self.subject = subject
        self.data = data
        self.connection = connection
        self.wal = wal
        self.programs: Programs = subject.programs or find_programs(subject.facts.major)
        self.files = _by_fork(listing(data))
        self.later: dict[Fork, list[tuple[NDArray[np.uint32], NDArray[np.uint64]]]] = {}
        """Blocks of tables that were changed since, with the start of the last record before."""

    def run(self) -> Iterator[Outcome]:
        suspects: list[Deviation] = []
        expected = Expectations()
        wal = self.wal
        logged = (
            self.subject.facts.checksums
            or _text(self.connection, "select pg_catalog.current_setting('wal_log_hints')") == "on"
        )
        for stretch in walrefs.block_references(
            self.programs, wal.folder, wal.timeline, wal.start, wal.end, wal.segment_bytes,
            apart=lambda kind, fork: may_keep_lsn(kind, fork, logged), apart_managers=MANAGERS,
        ):  # fmt: skip
            pace(self.subject)
            expected.add(stretch)
            if expected.count >= _MOST_BLOCKS:
                # A block may be touched again later, so its last record is not known yet.
                suspects += self._compare(expected, final=False)
                expected.clear()
        wal.require_unchanged()  # before anything is compared with what it says
        suspects += self._compare(expected, final=True)
        suspects += self._written_from_old_images()
        yield from self._confirmed(suspects)

    def _compare(self, expected: Expectations, *, final: bool) -> list[Deviation]:
        found: list[Deviation] = []
        until = self.wal.end if final else Lsn(0)
        for fork, blocks in expected.by_fork():
            segments = self.files.get(fork)
            if segments is not None:  # else dropped since, or lost: segment_files compares with pg_class
                found += self._fork(fork, segments, blocks, until)
        return found

    def _fork(
        self, fork: Fork, segments: dict[int, RelationFile], expected: Expected, until: Lsn
    ) -> Iterator[Deviation]:
        # A segment may have come since the listing: its name follows from the first one's.
        some = segments[min(segments)]
        stem = some.relation_path + ("" if some.fork == "main" else f"_{some.fork}")
        for begin in range(0, len(expected.blocks), _BATCH):
            pace(self.subject)
            batch = expected.part(begin, begin + _BATCH)
            lsns = self._lsns(stem, batch)
            if until.value and fork[3] == "main":
                since = np.flatnonzero((lsns >= until.value) & ~batch.unsure)
                self.later.setdefault(fork, []).append((batch.blocks[since], batch.starts[since]))
            now = _now(self.connection)
            for at in batch.doubtful(lsns, until, now):
                block = int(batch.blocks[at])
                # A page may be written while it is read: what counts is what a second look shows.
                image = self._page(stem, block)
                if bad_pages(image, block, self.subject.facts.checksums):
                    continue  # page_checksums names it
                lsn = _lsn_of(image) if any(image) else None
                now = _now(self.connection)
                deviation = judge(fork, block, batch[at], lsn, len(image) < PAGE_BYTES, until, now)
                if deviation is not None:
                    yield deviation

    def _written_from_old_images(self) -> list[Deviation]:
        """Pages that lack a change although their LSN is new: one more change was made to an old page.

        After a checkpoint the first change logs the whole page, and in that image is the LSN that it had. WAL that is
        not there (not archived yet) is passed over: such a page is then as good as one changed since.
        """
        if not any(len(blocks) for parts in self.later.values() for blocks, _ in parts):
            return []
        now = _now(self.connection)
        reach = now - self.wal.end + 2 * self.wal.segment_bytes
        return with_wal(self.subject, now, reach, self._lacking, since=self.wal.end)

    def _lacking(self, wal: StagedWal | None) -> list[Deviation]:
        if wal is None or wal.start > self.wal.end or wal.end <= self.wal.end:
            return []
        pace(self.subject)
        reader = Reader(self.programs, wal.folder, wal.timeline, wal.segment_bytes, None)
        images: dict[Fork, dict[int, PageImage]] = {}
        for (fork, block), image in first_images(reader, self.wal.end, wal.end).items():
            images.setdefault(fork, {})[block] = image
        raw = WalImages(wal.folder, wal.timeline, wal.segment_bytes)
        found: list[Deviation] = []
        for fork, parts in self.later.items():
            mine = images.get(fork, {})
            for blocks, starts in parts:
                for at in np.flatnonzero(np.isin(blocks, list(mine))):
                    block, start = int(blocks[at]), Lsn(int(starts[at]))
                    had = None
                    with suppress(HostError):  # the end of the record is not there yet
                        had = raw.image_lsn(*mine[block])
                    # 0 and 1 are pages made anew.
                    if had is not None and 1 < had.value <= start.value:
                        found.append(Deviation(fork, block, "stale", start, had))
        return found

    def _lsns(self, stem: str, batch: Expected) -> NDArray[np.uint64]:
        """The pages' LSNs, 0 for those beyond the end of the file."""
        heads: list[bytes] = []
        numbers = batch.blocks // SEGMENT_PAGES
        for segment in np.unique(numbers):
            pages = (batch.blocks[numbers == segment] % SEGMENT_PAGES).tolist()
            heads += self.data.heads(_path(stem, int(segment)), pages, 8)
        words = np.frombuffer(b"".join(head.ljust(8, b"\0")[:8] for head in heads), "<u4").reshape(-1, 2)
        return words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1].astype(np.uint64)

    def _page(self, stem: str, block: int) -> bytes:
        """One page, or nothing where the file ends before its end."""
        segment, page = divmod(block, SEGMENT_PAGES)
        image = self.data.read(_path(stem, segment), page * PAGE_BYTES, PAGE_BYTES)
        return image if len(image) == PAGE_BYTES else b""

    def _confirmed(self, suspects: list[Deviation]) -> Iterator[Outcome]:
        """A truncated or dropped table explains missing and zero pages, also one of a moment ago."""
        if not suspects:
            return
        open_ones = [s for s in suspects if s.may_be_explained]
        certain = [s for s in suspects if not s.may_be_explained]
        if open_ones:
            now = _now(self.connection)
            reach = LOOK_BACK_BYTES + (now - self.wal.start)
            left = with_wal(
                self.subject, now, reach, partial(self._unexplained, open_ones, now), since=self.wal.start
            )
            if left is None:
                yield NotChecked(
                    LostWrites.name,
                    f"{len(open_ones)} pages are missing or zero; whether their tables were truncated"
                    f" cannot be told until the WAL up to {now} is archived",
                )
            open_ones = left or []
        yield from self._findings([*certain, *open_ones])

    def _unexplained(
        self, suspects: list[Deviation], now: Lsn, wal: StagedWal | None
    ) -> list[Deviation] | None:
        """Those that nothing up to `now` explains; None where the WAL up to there cannot be had."""
        if wal is None or wal.end < now or wal.start > self.wal.start:
            return None
        events = list(
            walrefs.relation_events(
                self.programs, wal.folder, wal.timeline, wal.start, wal.end, wal.segment_bytes
            )
        )
        return [s for s in suspects if not explained(s, self._file(s).relation_path, events)]

    def _file(self, deviation: Deviation) -> RelationFile:
        segments = self.files[deviation.fork]
        number = deviation.block // SEGMENT_PAGES
        return segments.get(number) or segments[max(segments)]

    def _findings(self, deviations: Iterable[Deviation]) -> Iterator[Finding]:
        names = Names(self.subject)
        for deviation in sorted(deviations, key=lambda d: (d.fork, d.block)):
            file = self._file(deviation)
            what = stake(names.of(file), file.fork)
            heap = what.severity is Severity.CRITICAL
            yield Finding(
                LostWrites.name,
                what.severity,
                names.location(file, deviation.block),
                _WORDS[deviation.kind],
                "rows committed since are missing, or deleted ones are back, and no query will say so"
                if heap
                else what.meaning,
                what.remedy,
                {
                    "kind": deviation.kind,
                    "last_record": str(deviation.expected),
                    "page_lsn": str(deviation.page_lsn) if deviation.page_lsn else None,
                    "wal": f"{self.wal.start}..{self.wal.end} on timeline {self.wal.timeline}",
                },
            )


def _by_fork(files: list[RelationFile]) -> dict[Fork, dict[int, RelationFile]]:
    found: dict[Fork, dict[int, RelationFile]] = {}
    for file in files:
        key = (file.tablespace, file.database, file.filenode, file.fork)
        found.setdefault(key, {})[file.segment] = file
    return found


def _path(stem: str, segment: int) -> str:
    return stem + (f".{segment}" if segment else "")


def _lsn_of(page: bytes) -> Lsn:
    return Lsn(int.from_bytes(page[:4], "little") << 32 | int.from_bytes(page[4:8], "little"))


CHECK = LostWrites()
