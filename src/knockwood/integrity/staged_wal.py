"""A stretch of WAL as files in one folder: from the server's own pg_wal, else from the archive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from knockwood.errors import HostError
from knockwood.host import files
from knockwood.integrity.check import Subject
from knockwood.model import Lsn, Timeline, WalSegment
from knockwood.repository.archive import WalArchive
from knockwood.repository.inventory import ArchiveInventory, Partial
from knockwood.repository.walk import workplace


@dataclass(frozen=True, slots=True)
class StagedWal:
    """WAL of one timeline from `start` up to `end`, both record borders or inside the first record."""

    folder: Path
    timeline: Timeline
    start: Lsn
    end: Lsn
    segment_bytes: int
    _linked: dict[Path, int] = field(default_factory=dict)

    def require_unchanged(self) -> None:
        """Raise HostError if the server recycled one of its files since: what was read is worth nothing."""
        for path, inode in self._linked.items():
            try:
                same = path.stat().st_ino == inode
            except FileNotFoundError:
                same = False
            if not same:
                raise HostError(
                    "the server recycled WAL while it was read",
                    where=path.name,
                    hint="raise wal_keep_size, or give the check a repository to read WAL from",
                )


@contextmanager
def staged_wal(
    subject: Subject, until: Lsn, at_most_bytes: int, since: Lsn | None = None
) -> Iterator[StagedWal | None]:
    """The WAL that ends at `until` (or as near before it as there is any), contiguous, on the server's
    present timeline, at most `at_most_bytes` and not from before `since`; None if there is none.

    Nothing of the server is copied: its segments are linked to, so call `require_unchanged` after reading.
    """
    size = subject.facts.segment_bytes
    with workplace() as folder:
        stage = _Stage(subject, folder, size)
        numbers, end = stage.gather(until, max(at_most_bytes // size, 1), since)
        if not numbers:
            yield None
            return
        start = max(Lsn(min(numbers) * size), since or Lsn(0))
        yield StagedWal(stage.folder, subject.facts.timeline, start, end, size, stage.linked)


class _Stage:
    def __init__(self, subject: Subject, folder: Path, size: int) -> None:
        self.subject = subject
        self.folder = folder
        self.size = size
        self.linked: dict[Path, int] = {}
        self._archive = WalArchive(subject.repository) if subject.repository else None
        self._inventory: ArchiveInventory | None = None

    def gather(self, until: Lsn, count: int, since: Lsn | None) -> tuple[list[int], Lsn]:
        """The numbers of the segments put into the folder, and where their WAL ends."""
        numbers: list[int] = []
        end = until
        number = (until.value - 1) // self.size
        # The newest WAL may not be archived yet: look down a little for the newest that is.
        lowest = max(number - count, 0)
        while number >= lowest and len(numbers) < count:
            segment = WalSegment(self.subject.facts.timeline, number, self.size)
            reached = self._put(segment)
            if reached is not None and not numbers:
                end = min(until, reached)
            if reached is None and numbers:
                break
            if reached is not None:
                numbers.append(number)
            if since is not None and segment.start <= since:
                break
            number -= 1
        return numbers, end

    def _put(self, segment: WalSegment) -> Lsn | None:
        target = self.folder / segment.name
        if self.subject.data_directory is not None:
            source = self.subject.data_directory / "pg_wal" / segment.name
            with files.translated(source):
                if source.exists():
                    self.linked[source] = source.stat().st_ino
                    target.symlink_to(source)
                    return segment.end
        if self._archive is None:
            return None
        if self._inventory is None:
            self._inventory = self._archive.inventory()
        place = self._inventory.source(segment)
        if place == "segment":
            self._archive.fetch(segment, target)
            return segment.end
        if isinstance(place, Partial):
            self._archive.fetch_partial(place.name, target)
            return place.end
        return None
