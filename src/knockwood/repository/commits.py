"""Commits of the archive: the last before a position, the first after a time, that of a transaction.

What earlier runs proved is taken from the repository's state; segments not read yet are read (and
checked, record by record) when a question needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

from knockwood.errors import ObjectDamagedError, ObjectMissingError, WrongSystemError
from knockwood.model.proof import Commit
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.postgres.waldump import commit_of, walk
from knockwood.repository.inventory import ArchiveInventory, Partial, segment_object
from knockwood.repository.proved import Proved, State
from knockwood.repository.repository import Repository
from knockwood.repository.route import Break, Route, SegmentFacts, WalFacts
from knockwood.repository.storage import ObjectInfo
from knockwood.repository.walk import CHUNK_BYTES, Kept, Piece, fetch, runs, walk_run

Progress = Callable[[int, int], None]
"""Called with bytes of WAL read so far and to read in all."""


class CommitLookup(Protocol):
    """What the choice of a target asks of an archive. Positions are record starts; ranges half open."""

    def read(self, route: Route, start: Lsn, end: Lsn) -> WalFacts:
        """Everything known once the files that hold the range were read."""
        ...

    def last(self, route: Route, start: Lsn, end: Lsn) -> Commit | None:
        """The last commit at or after `start` and before `end`."""
        ...

    def first_after(self, route: Route, moment: datetime, start: Lsn, end: Lsn) -> Commit | None:
        """The first commit, in order of the WAL, whose time is after `moment`."""
        ...

    def of(self, route: Route, xid: int, start: Lsn, end: Lsn) -> Commit | None:
        """The commit of a transaction (or of the one its subtransaction belonged to)."""
        ...

    def count(self, route: Route, start: Lsn, end: Lsn) -> int:
        """How many commits are in a range."""
        ...


class ArchiveReader:
    """Answers from a repository; implements CommitLookup. `folder` is a private temporary one.

    What is read goes to `keep` as far as that has room. With `unread` a range that is asked for with `read` is taken
    for whole; what holds the commits in question is read all the same.
    """

    def __init__(
        self,
        repository: Repository,
        inventory: ArchiveInventory,
        listing: Mapping[str, ObjectInfo],
        programs: Programs,
        folder: Path,
        state: State | None = None,
        progress: Progress | None = None,
        keep: Kept | None = None,
        *,
        unread: bool = False,
    ) -> None:
        self.inventory = inventory
        self.segments: dict[WalSegment, SegmentFacts] = {}
        self.breaks: list[Break] = []
        self.ends: dict[Timeline, Lsn] = {}
        self.bytes_read = 0
        self.vanished = False
        self._repository = repository
        self._listing = listing
        self._programs = programs
        self._folder = folder
        self._progress = progress
        self._keep = keep
        self._unread = unread
        self._read: set[WalSegment] = set()
        self._scanned: dict[tuple[Timeline, int], tuple[Commit, ...]] = {}
        for entry in (state.current(listing).objects if state else {}).values():
            self._believe(entry)

    def _believe(self, entry: Proved) -> None:
        if entry.facts is None:
            return
        segment = entry.facts.segment
        piece = self.piece(segment, self.inventory.source(segment))
        if piece is not None and piece.object == entry.name:
            self.segments[segment] = entry.facts
            self._read.add(segment)
            # Where WAL has come since, it does not end there any more, be it read or not.
            last = self.inventory.source(segment.next()) is None
            if last and entry.end is not None and entry.end > self.ends.get(segment.timeline, Lsn(0)):
                self.ends[segment.timeline] = entry.end

    def facts(self) -> WalFacts:
        return WalFacts(dict(self.segments), tuple(self.breaks), dict(self.ends))

    def proved(self, at: datetime) -> Iterator[Proved]:
        """The segments that were read (now, or believed) and hold no damage, as facts to remember."""
        bad: set[WalSegment] = set()
        for damage in self.breaks:
            size = damage.segment.bytes
            first = damage.at.value // size
            last = max(first, (damage.until.value - 1) // size)
            bad.update(WalSegment(damage.timeline, number, size) for number in range(first, last + 1))
            bad.add(damage.segment)
        for segment in self._read - bad:
            piece = self.piece(segment, self.inventory.source(segment))
            facts = self.segments.get(segment)
            if piece is not None and facts is not None:
                end = self.ends.get(segment.timeline)
                end = end if end is not None and segment.start <= end <= segment.end else None
                yield Proved.of(self._listing[piece.object], at, facts, end)

    def piece(self, segment: WalSegment, source: str | Partial | None) -> Piece | None:
        """The stored object of a segment as the inventory knows it."""
        if source is None:
            return None
        name = source.name if isinstance(source, Partial) else segment_object(segment)
        end = source.end if isinstance(source, Partial) else None
        for suffix in (".zst", ".zst.age"):
            if name + suffix in self._listing:
                return Piece(segment, name + suffix, end)
        return None

    def read(self, route: Route, start: Lsn, end: Lsn) -> WalFacts:
        if not self._unread:
            self._read_range(route, start, end)
        return self.facts()

    def _read_range(self, route: Route, start: Lsn, end: Lsn) -> None:
        self.read_segments([segment for segment, _ in route.pieces(start, end)])

    def read_segments(self, wanted: Sequence[WalSegment]) -> None:
        """Walk the segments that were not read yet."""
        todo = [
            piece
            for segment in sorted(wanted)
            if segment not in self._read
            and (piece := self.piece(segment, self.inventory.source(segment))) is not None
        ]
        total = sum(piece.segment.bytes for piece in todo)
        done = 0
        for run in runs(todo):
            self._walk(run)
            done += sum(piece.segment.bytes for piece in run)
            if self._progress is not None:
                self._progress(done, total)

    def _walk(self, run: Sequence[Piece]) -> None:
        before = self._before(run[0])
        found = walk_run(self._repository, self._programs, run, before, self._folder, self._keep)
        self.bytes_read += found.bytes
        self.segments.update(found.facts)
        known = {(b.timeline, b.at, b.segment) for b in self.breaks}
        self.breaks.extend(b for b in found.breaks if (b.timeline, b.at, b.segment) not in known)
        self._read.update(piece.segment for piece in run)
        last = run[-1].segment
        if found.end is not None and last.start <= found.end:
            self.ends[last.timeline] = max(found.end, self.ends.get(last.timeline, Lsn(0)))

    def _before(self, first: Piece) -> Piece | None:
        if first.segment.number == 0:
            return None
        place = Route(self.inventory, first.segment.timeline).piece(first.segment.number - 1)
        if place is None or place[1] is not None or any(b.segment == place[0] for b in self.breaks):
            return None
        return self.piece(place[0], "segment")

    # --- questions ---------------------------------------------------------------------------------

    def last(self, route: Route, start: Lsn, end: Lsn) -> Commit | None:
        for number in _numbers(route, start, end, backwards=True):
            facts = self._facts(route, number)
            if facts is None or facts.first is None or facts.last is None or facts.first.lsn >= end:
                continue
            if facts.last.lsn < end:
                return facts.last if facts.last.lsn >= start else None
            found = [c for c in self.commits_in(route, number) if start <= c.lsn < end]
            if found:
                return found[-1]
        return None

    def first_after(self, route: Route, moment: datetime, start: Lsn, end: Lsn) -> Commit | None:
        for number in _numbers(route, start, end):
            facts = self._facts(route, number, ahead=end)
            if facts is None or facts.latest is None or facts.latest <= moment:
                continue
            for commit in self.commits_in(route, number):
                if start <= commit.lsn < end and commit.time > moment:
                    return commit
        return None

    def count(self, route: Route, start: Lsn, end: Lsn) -> int:
        total = 0
        for number in _numbers(route, start, end):
            facts = self._facts(route, number, ahead=end)
            if facts is None or facts.first is None or facts.last is None:
                continue
            if start <= facts.first.lsn and facts.last.lsn < end:
                total += facts.commits
            elif facts.last.lsn >= start and facts.first.lsn < end:
                total += sum(start <= c.lsn < end for c in self.commits_in(route, number))
        return total

    def of(self, route: Route, xid: int, start: Lsn, end: Lsn) -> Commit | None:
        size = max(1, CHUNK_BYTES // route.segment_bytes)
        numbers = list(_numbers(route, start, end))
        for begin in range(0, len(numbers), size):
            chunk = numbers[begin : begin + size]
            for first, last in _spans(self._present(route, [*chunk, chunk[-1] + 1])):
                low, high = max(start, _at(first, route)), _at(last + 1, route)
                with self._files(route, range(first, last + 1)):
                    commit = commit_of(
                        self._programs, self._folder, route.timeline, xid, low, high, route.segment_bytes
                    )
                if commit is not None and start <= commit.lsn < end:
                    return commit
        return None

    def commits_in(self, route: Route, number: int) -> tuple[Commit, ...]:
        """The commits whose records begin in a segment, in order, as far as its WAL is whole."""
        key = (route.timeline, number)
        if key not in self._scanned:
            spans = list(_spans(self._present(route, [number, number + 1])))
            last = spans[0][1] if spans and spans[0][0] == number else None
            found: tuple[Commit, ...] = ()
            if last is not None:
                with self._files(route, range(number, last + 1)):
                    low, high = _at(number, route), _at(last + 1, route)
                    found = walk(
                        self._programs, self._folder, route.timeline, low, high, route.segment_bytes
                    ).commits
            self._scanned[key] = tuple(c for c in found if c.lsn < _at(number + 1, route))
        return self._scanned[key]

    def _facts(self, route: Route, number: int, ahead: Lsn | None = None) -> SegmentFacts | None:
        place = route.piece(number)
        if place is None:
            return None
        if place[0] not in self._read:
            # Read on in chunks, not segment by segment: a walk has a price of its own.
            until = (
                min(_at(number, route) + CHUNK_BYTES, ahead) if ahead is not None else _at(number + 1, route)
            )
            self._read_range(route, _at(number, route), max(until, _at(number + 1, route)))
        return self.segments.get(place[0])

    def _present(self, route: Route, numbers: Sequence[int]) -> list[int]:
        """Those that can be fetched; the files are fetched anew by `_files`."""
        bad = {b.segment for b in self.breaks if b.resumes is None}
        places = {number: route.piece(number) for number in numbers}
        return [n for n, place in places.items() if place is not None and place[0] not in bad]

    def _files(self, route: Route, numbers: Sequence[int]) -> _Fetched:
        return _Fetched(self, route, numbers)

    def fetch_into(self, route: Route, number: int) -> Path | None:
        """Fetch a segment under the name it would have on the route's timeline; None if it cannot be."""
        place = route.piece(number)
        piece = self.piece(place[0], place[1] or "segment") if place is not None else None
        if piece is None:
            return None
        path = self._folder / WalSegment(route.timeline, number, route.segment_bytes).name
        try:
            fetch(self._repository, piece, path)
        except (ObjectDamagedError, ObjectMissingError, WrongSystemError) as error:
            self.vanished = self.vanished or isinstance(error, ObjectMissingError)
            path.unlink(missing_ok=True)
            return None
        return path


class _Fetched:
    """Files of a route while a question is asked of them."""

    def __init__(self, reader: ArchiveReader, route: Route, numbers: Sequence[int]) -> None:
        self._reader = reader
        self._route = route
        self._numbers = numbers
        self._paths: list[Path] = []

    def __enter__(self) -> None:
        for number in self._numbers:
            path = self._reader.fetch_into(self._route, number)
            if path is not None:
                self._paths.append(path)

    def __exit__(self, *_: object) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)


def _at(number: int, route: Route) -> Lsn:
    return Lsn(number * route.segment_bytes)


def _numbers(route: Route, start: Lsn, end: Lsn, *, backwards: bool = False) -> Iterator[int]:
    if end <= start:
        return
    first, last = start.value // route.segment_bytes, (end.value - 1) // route.segment_bytes
    yield from range(last, first - 1, -1) if backwards else range(first, last + 1)


def _spans(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each unbroken sequence."""
    begin: int | None = None
    previous: int | None = None
    for number in numbers:
        if begin is None or previous is None or number != previous + 1:
            if begin is not None and previous is not None:
                yield begin, previous
            begin = number
        previous = number
    if begin is not None and previous is not None:
        yield begin, previous
