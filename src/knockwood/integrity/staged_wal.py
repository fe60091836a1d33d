"""A stretch of WAL as files in one folder: from the server's own pg_wal, else from the archive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from knockwood.errors import HostError, KnockwoodError, ProgramFailedError
from knockwood.host import files
from knockwood.integrity.check import Subject
from knockwood.model import Lsn, Timeline, WalSegment
from knockwood.postgres.waldump import first_record
from knockwood.repository.archive import WalArchive
from knockwood.repository.inventory import ArchiveInventory, Partial
from knockwood.repository.walk import workplace

T = TypeVar("T")

WINDOW_BYTES: Final = 512 << 20
"""So much of a long stretch lies in the temporary folder at once."""

_FETCHING: Final = 4
"""Segments that are brought from the archive at once."""


class WalRecycledError(HostError):
    """The server gave a segment file another place in its WAL while it was read."""


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
        """Raise WalRecycledError if the server recycled one of its files since: what was read is worth nothing."""
        for path, inode in self._linked.items():
            try:
                same = path.stat().st_ino == inode
            except FileNotFoundError:
                same = False
            if not same:
                raise WalRecycledError(
                    "the server recycled WAL while it was read",
                    where=path.name,
                    hint="raise wal_keep_size, or give the check a repository to read WAL from",
                )


def with_wal(
    subject: Subject,
    until: Lsn,
    at_most_bytes: int,
    read: Callable[[StagedWal | None], T],
    since: Lsn | None = None,
) -> T:
    """What `read` makes of `staged_wal`, asked once more of the archive's WAL if the server recycled its own
    meanwhile. Raises WalRecycledError where the archive does not have it."""
    try:
        return _read(subject, until, at_most_bytes, read, since, archived_first=False)
    except WalRecycledError:
        if subject.repository is None:
            raise
    return _read(subject, until, at_most_bytes, read, since, archived_first=True)


def _read(
    subject: Subject,
    until: Lsn,
    at_most_bytes: int,
    read: Callable[[StagedWal | None], T],
    since: Lsn | None,
    *,
    archived_first: bool,
) -> T:
    with staged_wal(subject, until, at_most_bytes, since, archived_first=archived_first) as wal:
        try:
            found = read(wal)
        except KnockwoodError:
            if wal is not None:
                wal.require_unchanged()  # that would be why
            raise
        if wal is not None:
            wal.require_unchanged()
        return found


def in_windows(
    subject: Subject,
    since: Lsn,
    until: Lsn,
    read: Callable[[StagedWal], T],
    window_bytes: int = WINDOW_BYTES,
) -> Iterator[T]:
    """What `read` makes of the WAL in [since, until), window after window, so that only one lies on disk at a time.

    A window begins before the end of the one before, so that every record is whole in one of them; some are in two.
    `read` may be given the same window twice. Raises ProgramFailedError where some of the WAL is not there, and
    what `read` raises.
    """
    size = subject.facts.segment_bytes
    programs = subject.server_programs
    start = end = since
    while end < until:
        end = min(Lsn((end.value + max(window_bytes, size)) // size * size), until)

        def window(wal: StagedWal | None, start: Lsn = start, end: Lsn = end) -> tuple[T, Lsn]:
            if wal is None or wal.start > start or wal.end < end:
                have = f"{wal.start} to {wal.end} only" if wal else "nothing"
                raise ProgramFailedError(f"of the WAL from {start} to {end} there is {have}")
            found = read(wal)
            # No record that begins before `end` and goes on after it begins before this one.
            resume = end
            while end < until and resume > start:
                resume = max(Lsn((resume.value - 1) // size * size), start)
                if first_record(programs, wal.folder, wal.timeline, resume, end, size) is not None:
                    break
            return found, resume

        found, start = with_wal(subject, end, end - start + 2 * size, window, since=start)
        yield found


@contextmanager
def staged_wal(
    subject: Subject,
    until: Lsn,
    at_most_bytes: int,
    since: Lsn | None = None,
    *,
    archived_first: bool = False,
) -> Iterator[StagedWal | None]:
    """The WAL that ends at `until` (or as near before it as there is any), contiguous, on the server's
    present timeline, at most `at_most_bytes` and not from before `since`; None if there is none.

    Nothing of the server is copied: its segments are linked to, so call `require_unchanged` after reading. With
    `archived_first` that is done only where the archive has none.
    """
    size = subject.facts.segment_bytes
    with workplace() as folder:
        stage = _Stage(subject, folder, size, archived_first)
        numbers, end = stage.gather(until, max(at_most_bytes // size, 1), since)
        if not numbers:
            yield None
            return
        stage.bring()
        start = max(Lsn(min(numbers) * size), since or Lsn(0))
        yield StagedWal(stage.folder, subject.facts.timeline, start, end, size, stage.linked)


class _Stage:
    def __init__(self, subject: Subject, folder: Path, size: int, archived_first: bool) -> None:
        self.subject = subject
        self.archived_first = archived_first
        self.folder = folder
        self.size = size
        self.linked: dict[Path, int] = {}
        self._archive = WalArchive(subject.repository) if subject.repository else None
        self._inventory: ArchiveInventory | None = None
        self._wanted: list[Callable[[], None]] = []

    def gather(self, until: Lsn, count: int, since: Lsn | None) -> tuple[list[int], Lsn]:
        """The numbers of the segments that `bring` puts into the folder, and where their WAL ends."""
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

    def bring(self) -> None:
        """Fetch what the archive has of them, several at once."""
        with ThreadPoolExecutor(_FETCHING, thread_name_prefix="wal") as pool:
            jobs = [pool.submit(fetch) for fetch in self._wanted]
            try:
                for job in jobs:
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _put(self, segment: WalSegment) -> Lsn | None:
        target = self.folder / segment.name
        end = self._fetch(segment, target, whole=True) if self.archived_first else None
        return end or self._link(segment, target) or self._fetch(segment, target)

    def _link(self, segment: WalSegment, target: Path) -> Lsn | None:
        """The server's own file."""
        if self.subject.data_directory is None:
            return None
        source = self.subject.data_directory / "pg_wal" / segment.name
        with files.translated(source):
            try:
                self.linked[source] = source.stat().st_ino
            except FileNotFoundError:
                return None
            target.symlink_to(source)
        return segment.end

    def _fetch(self, segment: WalSegment, target: Path, *, whole: bool = False) -> Lsn | None:
        """The archive's file, if it is there (`whole`: and no partial one); where its WAL ends."""
        if self._archive is None:
            return None
        if self._inventory is None:
            self._inventory = self._archive.inventory()
        place = self._inventory.source(segment)
        # Nobody needs them after a crash.
        if place == "segment":
            self._wanted.append(partial(self._archive.fetch, segment, target, durable=False))
            return segment.end
        if isinstance(place, Partial) and not whole:
            self._wanted.append(partial(self._archive.fetch_partial, place.name, target, durable=False))
            return place.end
        return None
