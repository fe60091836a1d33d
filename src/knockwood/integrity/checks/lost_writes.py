"""The page-LSN audit: what the WAL says was written, against what is on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from knockwood.integrity.budget import pace
from knockwood.integrity.catalog import Names, stake
from knockwood.integrity.check import NotChecked, Outcome, Subject, Weight
from knockwood.integrity.page_audit import Deviation, Expectations, Fork, explained, judge
from knockwood.integrity.relation_files import DataFiles, RelationFile, data_files, listing
from knockwood.integrity.staged_wal import StagedWal, staged_wal
from knockwood.model import Finding, Lsn, Severity
from knockwood.postgres import walrefs
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.postgres.connection import translated
from knockwood.postgres.pages import PAGE_BYTES, SEGMENT_PAGES, bad_pages

LOOK_BACK_BYTES: Final = 1 << 30
"""WAL one run reads back from the last checkpoint."""

_MOST_BLOCKS: Final = 300_000
"""Blocks remembered at once (about 100 MB of memory)."""

_RUN_BLOCKS: Final = 256
_RUN_GAP: Final = 8

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
        with data_files(subject) as data:
            redo = _redo(subject)
            with staged_wal(subject, redo, LOOK_BACK_BYTES) as wal:
                if wal is None or wal.end <= wal.start:
                    yield NotChecked(
                        self.name,
                        "there is no WAL to compare with: neither the server's pg_wal can be read"
                        " nor is there a repository with WAL of this timeline up to its last checkpoint",
                    )
                    return
                yield from _Audit(subject, data, wal).run()


def _redo(subject: Subject) -> Lsn:
    """Up to here every change is on disk: the redo position of the last completed checkpoint."""
    with subject.connect() as connection, translated():
        row = connection.execute("select redo_lsn::text from pg_catalog.pg_control_checkpoint()").fetchone()
    assert row is not None
    return Lsn.parse(row[0])


def _now(subject: Subject) -> Lsn:
    """The end of the WAL that is on disk: no page there is younger, no truncation was made without it."""
    with subject.connect() as connection, translated():
        row = connection.execute(
            "select case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn()"
            " else pg_catalog.pg_current_wal_flush_lsn() end::text"
        ).fetchone()
    assert row is not None
    return Lsn.parse(row[0])


def _hints_are_logged(subject: Subject) -> bool:
    with subject.connect() as connection, translated():
        row = connection.execute("select pg_catalog.current_setting('wal_log_hints') = 'on'").fetchone()
    return subject.facts.checksums or bool(row and row[0])


@dataclass(frozen=True, slots=True)
class _Page:
    """A page as read: `lsn` is None for one that is zero or missing."""

    block: int
    lsn: Lsn | None
    missing: bool


class _Audit:
    def __init__(self, subject: Subject, data: DataFiles, wal: StagedWal) -> None:
        self.subject = subject
        self.data = data
        self.wal = wal
        self.programs: Programs = subject.programs or find_programs(subject.facts.major)
        self.files = _by_fork(listing(data))

    def run(self) -> Iterator[Outcome]:
        suspects: list[Deviation] = []
        expected = Expectations(_hints_are_logged(self.subject))
        wal = self.wal
        for reference in walrefs.block_references(
            self.programs, wal.folder, wal.timeline, wal.start, wal.end, wal.segment_bytes
        ):
            if expected.count >= _MOST_BLOCKS:
                # A block may be touched again later, so its last record is not known yet.
                suspects += self._compare(expected, final=False)
                expected.clear()
            expected.add(reference)
        wal.require_unchanged()
        suspects += self._compare(expected, final=True)
        yield from self._confirmed(suspects)

    def _compare(self, expected: Expectations, *, final: bool) -> list[Deviation]:
        found: list[Deviation] = []
        for fork, blocks in sorted(expected.blocks.items()):
            segments = self.files.get(fork)
            if segments is None:  # dropped since, or lost: segment_files compares with pg_class
                continue
            pace(self.subject)
            pages = list(_pages(self.data, segments, sorted(blocks), self.subject.facts.checksums))
            now = _now(self.subject)
            until = self.wal.end if final else Lsn(0)
            for page in pages:
                deviation = judge(fork, page.block, blocks[page.block], page.lsn, page.missing, until, now)
                if deviation is not None:
                    found.append(deviation)
        return found

    def _confirmed(self, suspects: list[Deviation]) -> Iterator[Outcome]:
        """A truncated or dropped table explains missing and zero pages, also one of a moment ago."""
        if not suspects:
            return
        open_ones = [s for s in suspects if s.may_be_explained]
        certain = [s for s in suspects if not s.may_be_explained]
        if open_ones:
            now = _now(self.subject)
            reach = LOOK_BACK_BYTES + (now - self.wal.start)
            with staged_wal(self.subject, now, reach, since=self.wal.start) as wal:
                if wal is None or wal.end < now or wal.start > self.wal.start:
                    yield NotChecked(
                        LostWrites.name,
                        f"{len(open_ones)} pages are missing or zero; whether their tables were truncated"
                        f" cannot be told until the WAL up to {now} is archived",
                    )
                    open_ones = []
                else:
                    open_ones = self._unexplained(open_ones, wal)
        yield from self._findings([*certain, *open_ones])

    def _unexplained(self, suspects: list[Deviation], wal: StagedWal) -> list[Deviation]:
        events = list(
            walrefs.relation_events(
                self.programs, wal.folder, wal.timeline, wal.start, wal.end, wal.segment_bytes
            )
        )
        wal.require_unchanged()
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


def _pages(
    data: DataFiles, segments: dict[int, RelationFile], blocks: list[int], checksums: bool
) -> Iterator[_Page]:
    """The pages of these blocks (sorted), neighbours read together; page_checksums names the unreadable."""
    run: list[int] = []
    for block in blocks:
        together = (
            run
            and block - run[-1] <= _RUN_GAP
            and block - run[0] < _RUN_BLOCKS
            and block // SEGMENT_PAGES == run[0] // SEGMENT_PAGES
        )
        if run and not together:
            yield from _run(data, segments, run, checksums)
            run = []
        run.append(block)
    if run:
        yield from _run(data, segments, run, checksums)


def _run(
    data: DataFiles, segments: dict[int, RelationFile], run: list[int], checksums: bool
) -> Iterator[_Page]:
    # A segment may have come since the listing: its name follows from the first one's.
    segment, first = divmod(run[0], SEGMENT_PAGES)
    some = segments[min(segments)]
    suffix = "" if some.fork == "main" else f"_{some.fork}"
    path = f"{some.relation_path}{suffix}" + (f".{segment}" if segment else "")
    image = data.read(path, first * PAGE_BYTES, (run[-1] - run[0] + 1) * PAGE_BYTES)
    whole = memoryview(image)[: len(image) - len(image) % PAGE_BYTES]
    bad = {block for block, _ in bad_pages(whole, run[0], checksums)}
    words = np.frombuffer(whole, "<u4").reshape(-1, PAGE_BYTES // 4)
    used: NDArray[np.bool_] = np.any(words, axis=1)
    for block in run:
        at = block - run[0]
        if at >= len(words):
            yield _Page(block, None, True)
        elif block not in bad:
            lsn = Lsn(int(words[at, 0]) << 32 | int(words[at, 1])) if used[at] else None
            yield _Page(block, lsn, False)


CHECK = LostWrites()
