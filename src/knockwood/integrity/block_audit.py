"""The page-LSN audit of one stretch of WAL: every block that it touched, as it is on disk and in its own images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knockwood.errors import HostError
from knockwood.integrity.budget import pace
from knockwood.integrity.check import Subject
from knockwood.integrity.last_changes import LastChanges
from knockwood.integrity.mended import PREFIX, Mended, mended
from knockwood.integrity.page_audit import (
    MANAGERS,
    Deviation,
    Expectation,
    Expectations,
    Expected,
    Touch,
    explained,
    judge,
    lacks,
    of_old_page,
    touch_of,
)
from knockwood.integrity.relation_files import DataFiles, RelationFile, listing
from knockwood.integrity.staged_wal import StagedWal, with_wal
from knockwood.model import Lsn
from knockwood.postgres import walrefs
from knockwood.postgres.binaries import Programs
from knockwood.postgres.connection import Connection, translated
from knockwood.postgres.pages import PAGE_BYTES, SEGMENT_PAGES, bad_pages
from knockwood.postgres.walimages import PageImage, WalImages, first_images
from knockwood.postgres.walmessages import messages
from knockwood.postgres.walreader import Reader
from knockwood.postgres.walrefs import Fork, RelationEvent

LOOK_BACK_BYTES: Final = 1 << 30
"""WAL before the last checkpoint that is answered for."""

_MOST_BLOCKS: Final = 1_000_000
"""Blocks remembered at once (about 100 MB of memory while they are sorted)."""

_BATCH: Final = 4096


class _Told(NamedTuple):
    """What WAL says of files, of starts of the server and of repairs; `complete`: up to this moment."""

    events: list[RelationEvent]
    starts: list[Lsn]
    answers: frozenset[Mended]
    complete: bool


def text(connection: Connection, query: str) -> str:
    """The one value of a query that has one."""
    with translated():
        row = connection.execute(query).fetchone()
    assert row is not None
    return str(row[0])


def _now(connection: Connection) -> Lsn:
    """The end of the WAL that is on disk: no page there is younger, no truncation was made without it."""
    return Lsn.parse(
        text(
            connection,
            "select case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn()"
            " else pg_catalog.pg_current_wal_flush_lsn() end::text",
        )
    )


class BlockAudit:
    """What one stretch of WAL, up to the redo position of a checkpoint or before, says of blocks and their disk."""

    def __init__(
        self,
        subject: Subject,
        data: DataFiles,
        connection: Connection,
        wal: StagedWal,
        changes: LastChanges,
    ) -> None:
        self.subject = subject
        self.data = data
        self.connection = connection
        self.wal = wal
        self._changes = changes
        """What other WAL says; this one's is added."""
        self.programs: Programs = subject.server_programs
        self.files = _by_fork(listing(data))
        self.unknown: list[str] = []
        """What could not be told, after `deviations`."""
        self.once_old: set[tuple[Fork, int]] = set()
        """Blocks of which the WAL has an image of an old page, but that were mended since; after `deviations`."""
        self._later: dict[Fork, list[Expected]] = {}
        """Blocks of tables that were changed since, with the last record before."""
        self._images = WalImages(wal.folder, wal.timeline, wal.segment_bytes)

    def deviations(self) -> list[Deviation]:
        """Where the disk, or an image in the WAL, lacks a change that the WAL has; what is explained is left out."""
        expected = Expectations()
        wal = self.wal
        logged = (
            self.subject.facts.checksums
            or text(self.connection, "select pg_catalog.current_setting('wal_log_hints')") == "on"
        )
        suspects: list[Deviation] = []
        with self._images:
            for stretch in walrefs.block_references(
                self.programs, wal.folder, wal.timeline, wal.start, wal.end, wal.segment_bytes,
                touch=lambda kind, fork: touch_of(kind, fork, logged), touch_managers=MANAGERS,
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
        return self._confirmed(suspects)

    def file(self, deviation: Deviation) -> RelationFile:
        """The file that holds the block, or would."""
        segments = self.files[deviation.fork]
        number = deviation.block // SEGMENT_PAGES
        return segments.get(number) or segments[max(segments)]

    def _compare(self, expected: Expectations, *, final: bool) -> list[Deviation]:
        found = list(self._images_of_old_pages(expected))
        until = self.wal.end if final else Lsn(0)
        for fork, blocks in expected.by_fork():
            segments = self.files.get(fork)
            self._changes.add(fork, blocks.blocks, blocks.sure)
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
                self._later.setdefault(fork, []).append(batch.only(lsns >= until.value))
            now = _now(self.connection)
            for at in batch.doubtful(lsns, until, now):
                block, last = int(batch.blocks[at]), batch[at]
                # A page may be written while it is read: what counts is what a second look shows.
                image = self._page(stem, block)
                if bad_pages(image, block, self.subject.facts.checksums):
                    continue  # page_checksums names it
                lsn = _lsn_of(image) if any(image) else None
                now = _now(self.connection)
                missing = len(image) < PAGE_BYTES
                deviation = judge(fork, block, last, lsn, missing, until, now, self._hinted(last))
                if deviation is not None:
                    yield deviation

    # --- images in the WAL ------------------------------------------------------------------------

    def _hinted(self, last: Expectation) -> Lsn | None:
        """The page LSN inside the image of a record for hint bits; None for other records."""
        if last.touch is not Touch.HINT:
            return None
        return self._images.image_lsn(Lsn(last.start), last.image)

    def _images_of_old_pages(self, expected: Expectations) -> Iterator[Deviation]:
        """Images that lack the change before them: page and WAL agree again from there on. The first of each block."""
        named: set[tuple[Fork, int]] = set()
        for fork, block, lsn, number, before in expected.images():
            if fork not in self.files or (fork, block) in named:
                continue
            start = before or self._changes.before(fork, block, lsn)
            had = self._images.image_lsn(Lsn(lsn), number) if start else None
            if had is not None and of_old_page(had, start):
                named.add((fork, block))
                yield Deviation(fork, block, "stale", Lsn(start), had, Lsn(lsn))

    def _written_from_old_images(self) -> list[Deviation]:
        """Pages that lack a change although their LSN is new: one more change was made to an old page.

        After a checkpoint the first change logs the whole page, and in that image is the LSN that it had. WAL that is
        not there (not archived yet) is passed over: such a page is then as good as one changed since.
        """
        if not any(len(part.blocks) for parts in self._later.values() for part in parts):
            return []
        now = _now(self.connection)
        reach = now - self.wal.end + 2 * self.wal.segment_bytes
        return with_wal(self.subject, now, reach, self._first_images, since=self.wal.end)

    def _first_images(self, wal: StagedWal | None) -> list[Deviation]:
        if wal is None or wal.start > self.wal.end or wal.end <= self.wal.end:
            return []
        pace(self.subject)
        reader = Reader(self.programs, wal.folder, wal.timeline, wal.segment_bytes, None)
        images: dict[Fork, dict[int, PageImage]] = {}
        for (fork, block), image in first_images(reader, self.wal.end, wal.end).items():
            images.setdefault(fork, {})[block] = image
        found: list[Deviation] = []
        with self._images, WalImages(wal.folder, wal.timeline, wal.segment_bytes) as raw:
            for fork, parts in self._later.items():
                mine = images.get(fork, {})
                for part in parts:
                    for at in np.flatnonzero(np.isin(part.blocks, list(mine))):
                        block, last = int(part.blocks[at]), part[int(at)]
                        had = None
                        with suppress(HostError):  # the end of the record is not there yet
                            had = raw.image_lsn(*mine[block])
                        # 0 and 1 are pages made anew.
                        if had is not None and had.value > 1 and lacks(had, last, self._hinted(last)):
                            found.append(_of_image(fork, block, last, had, mine[block].lsn))
        return found

    # --- files ------------------------------------------------------------------------------------

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

    # --- what explains it -------------------------------------------------------------------------

    def _confirmed(self, suspects: list[Deviation]) -> list[Deviation]:
        """Without those that something explains that happened since, also a moment ago.

        A truncated or dropped table explains missing and zero pages, and an image of an old page; so does a repair.
        """
        if all(suspect.certain for suspect in suspects):
            return suspects
        now = _now(self.connection)
        reach = LOOK_BACK_BYTES + (now - self.wal.start)
        told = with_wal(self.subject, now, reach, partial(self._told, now), since=self.wal.start)
        left = [suspect for suspect in suspects if not self._explained(suspect, told)]
        if not told.complete:
            # What was damaged once is said until it is known to be mended; what may be no damage is not.
            doubtful = [s for s in left if s.kind in ("zeroed", "missing") or s.if_hints_were_logged]
            if doubtful:
                self.unknown.append(
                    f"{len(doubtful)} pages are missing, zero or old; whether their tables were truncated, or"
                    f" checksums switched on, cannot be told until the WAL up to {now} is archived"
                )
            left = [suspect for suspect in left if suspect not in doubtful]
        on_disk = {(suspect.fork, suspect.block) for suspect in left if suspect.image is None}
        return [each for each in left if each.image is None or (each.fork, each.block) not in on_disk]

    def _told(self, now: Lsn, wal: StagedWal | None) -> _Told:
        whole = wal is not None and wal.start <= self.wal.start
        if wal is None or not whole:
            wal = self.wal
        place = (self.programs, wal.folder, wal.timeline, wal.start, wal.end)
        events = list(walrefs.relation_events(*place, wal.segment_bytes))
        starts = list(walrefs.server_starts(*place, wal.segment_bytes))
        said = messages(*place, PREFIX, wal.segment_bytes)
        answers = mended(message.payload for message in said)
        return _Told(events, starts, answers, whole and wal.end >= now)

    def _explained(self, suspect: Deviation, told: _Told) -> bool:
        if suspect.if_hints_were_logged and any(start > suspect.expected for start in told.starts):
            return True  # they may have been switched on since
        if suspect.kind == "stale" and suspect.image is None:
            return False
        path = self.file(suspect).relation_path
        if not self.data.exists(path):  # its whole database was dropped: no relation is named for that
            return True
        if suspect.image is not None and Mended(path, suspect.block, suspect.image) in told.answers:
            self.once_old.add((suspect.fork, suspect.block))
            return True
        return explained(suspect, path, told.events)


def _of_image(fork: Fork, block: int, before: Expectation, had: Lsn, image: Lsn) -> Deviation:
    doubt = before.touch is Touch.VISIBLE and had.value > before.sure
    return Deviation(fork, block, "stale", Lsn(before.start), had, image, if_hints_were_logged=doubt)


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
