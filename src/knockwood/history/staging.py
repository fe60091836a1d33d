"""WAL out of the archive as files in a private folder, a stretch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from knockwood.errors import ObjectMissingError
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.repository.archive import WalArchive
from knockwood.repository.inventory import ArchiveInventory, Partial, segment_object
from knockwood.repository.repository import Repository
from knockwood.repository.route import Route
from knockwood.repository.walk import CHUNK_BYTES, Piece, fetch, workplace

_FETCHERS = 3


@dataclass(frozen=True, slots=True)
class Stretch:
    """WAL in `folder`, to be read from `start` to `until`; of it the records that begin before `end` count.

    Those that begin at `end` or later come again with the next stretch.
    """

    folder: Path
    timeline: Timeline
    start: Lsn
    end: Lsn
    until: Lsn
    segment_bytes: int


def timeline_holding(inventory: ArchiveInventory, timeline: Timeline, lsn: Lsn) -> Timeline:
    """The newest timeline whose ancestry holds a position of `timeline`.

    The last segment before a failover is often whole in the new timeline's copy of it only.
    """
    known = sorted({*inventory.timelines, *inventory.histories}, reverse=True)
    return next((each for each in known if Route(inventory, each).holds(timeline, lsn)), timeline)


class StagedArchive:
    """The archive as it is listed now, along an ancestry that holds a position of a timeline."""

    def __init__(self, repository: Repository, timeline: Timeline, holding: Lsn) -> None:
        archive = WalArchive(repository)
        self._listing = archive.listing()
        self._repository = repository
        inventory = archive.inventory_of(self._listing)
        self.route = Route(inventory, timeline_holding(inventory, timeline, holding))
        self.segment_bytes = repository.header.segment_bytes

    def stretches(self, start: Lsn, end: Lsn, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Stretch]:
        """The WAL of a range, `chunk_bytes` at a time; each stretch's files are gone when the next is asked for.

        A record that begins in one segment and ends in the next is read whole: a stretch has one segment
        more than it counts. Raises ObjectMissingError, ObjectDamagedError and what storage raises.
        """
        size = self.segment_bytes
        count = max(1, chunk_bytes // size)
        position = start
        while position < end:
            border = min(Lsn((position.value // size + count) * size), end)
            until = min(border + size, end)
            with self._files(position, until) as folder:
                yield Stretch(folder, self.route.timeline, position, border, until, size)
            position = border

    def unbroken_from(self, lsn: Lsn) -> Lsn:
        """Where the WAL begins that leads up to a position without a missing file."""
        number = lsn.value // self.segment_bytes
        while number > 0 and self.route.piece(number - 1) is not None:
            number -= 1
        return min(Lsn(number * self.segment_bytes), lsn)

    @contextmanager
    def _files(self, start: Lsn, end: Lsn) -> Iterator[Path]:
        size = self.segment_bytes
        numbers = range(start.value // size, (end.value - 1) // size + 1)
        with workplace() as folder, ThreadPoolExecutor(_FETCHERS, thread_name_prefix="stage-wal") as pool:
            list(pool.map(lambda number: self._fetch(number, folder), numbers))
            yield folder

    def _fetch(self, number: int, folder: Path) -> None:
        # A parent's segment too gets this timeline's name: pg_waldump follows one timeline.
        own = WalSegment(self.route.timeline, number, self.segment_bytes)
        place = self.route.piece(number)
        piece = self._piece(*place) if place is not None else None
        if piece is None:
            raise ObjectMissingError(
                f"WAL segment {own} is not in the archive",
                where=self._repository.storage.url,
                hint="`knockwood verify` lists what the archive holds",
            )
        fetch(self._repository, piece, folder / own.name)

    def _piece(self, segment: WalSegment, partial: Partial | None) -> Piece | None:
        name = partial.name if partial is not None else segment_object(segment)
        for suffix in (".zst", ".zst.age"):
            if name + suffix in self._listing:
                return Piece(segment, name + suffix, partial.end if partial is not None else None)
        return None
