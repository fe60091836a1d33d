"""The states that a stretch of the archive went through: one per commit, found again by number or position.

Memory does not grow with the archive: what is kept is a count per segment, and the commits of the few
segments that were asked for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from knockwood.errors import StorageUnavailableError
from knockwood.model.proof import Commit
from knockwood.model.wal import Lsn, Timeline
from knockwood.postgres.binaries import Programs
from knockwood.repository import proved
from knockwood.repository.archive import WalArchive
from knockwood.repository.commits import ArchiveReader
from knockwood.repository.repository import Repository
from knockwood.repository.route import Route
from knockwood.repository.walk import workplace

_ATTEMPTS: Final = 10


class States:
    """State 0 lies at `low`, state i after the i-th commit whose record starts in [low, high)."""

    def __init__(self, reader: ArchiveReader, route: Route, low: Lsn, high: Lsn) -> None:
        self._reader, self._route, self._low, self._high = reader, route, low, high
        self._numbers: list[int] = []
        self._before: list[int] = []
        self.last = 0
        reader.read(route, low, high)
        size = route.segment_bytes
        first, final = low.value // size, max(high.value - 1, low.value) // size
        for number in range(first, final + 1):
            place = route.piece(number)
            if place is None:
                continue
            facts = reader.segments.get(place[0])
            # The last ones are read now: a partial segment may be replaced by a longer one meanwhile.
            whole = first < number < final - 1 and place[1] is None
            count = (facts.commits if facts else 0) if whole else len(self._commits(number))
            if count:
                self._numbers.append(number)
                self._before.append(self.last)
                self.last += count

    def commit(self, index: int) -> Commit:
        """The commit that made state `index` (from 1 on)."""
        if not 1 <= index <= self.last:
            raise IndexError(index)
        place = bisect_left(self._before, index) - 1
        commits = self._commits(self._numbers[place])
        if len(commits) != self._count(place):
            raise StorageUnavailableError("the archive changed while it was read", hint="ask again")
        return commits[index - self._before[place] - 1]

    def position(self, index: int) -> int:
        """About where the state lies in the WAL, in bytes; reads nothing."""
        if index <= 0 or not self._numbers:
            return self._low.value
        place = bisect_left(self._before, index) - 1
        part = (index - self._before[place]) / self._count(place)
        size = self._route.segment_bytes
        return min(max(int((self._numbers[place] + part) * size), self._low.value), self._high.value)

    def index_at(self, lsn: Lsn) -> int:
        """The state that holds exactly the commits whose records start before `lsn`."""
        number = lsn.value // self._route.segment_bytes
        place = bisect_right(self._numbers, number) - 1
        if place < 0:
            return 0
        if self._numbers[place] < number:
            return self._before[place] + self._count(place)
        return self._before[place] + sum(commit.lsn < lsn for commit in self._commits(number))

    def _count(self, place: int) -> int:
        following = self._before[place + 1] if place + 1 < len(self._before) else self.last
        return following - self._before[place]

    def _commits(self, number: int) -> list[Commit]:
        found = self._reader.commits_in(self._route, number)
        return [commit for commit in found if self._low <= commit.lsn < self._high]


@contextmanager
def open_states(
    repository: Repository,
    timeline: Timeline,
    low: Lsn,
    high: Lsn,
    programs: Programs,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[States]:
    """The states of a stretch of whole WAL, as long as the block runs.

    Raises StorageUnavailableError where the archive changes faster than it can be read.
    """
    with workplace() as folder:
        for _ in range(_ATTEMPTS):
            archive = WalArchive(repository)
            listing = archive.listing()
            inventory = archive.inventory_of(listing)
            known = proved.load(repository, repository.storage.list(proved.FOLDER))
            reader = ArchiveReader(repository, inventory, listing, programs, folder, known, progress)
            states = States(reader, Route(inventory, timeline), low, high)
            if not reader.vanished:
                break
        else:
            raise StorageUnavailableError(
                "the archive changed faster than it could be read",
                where=repository.storage.url,
                hint="try again; is the storage very slow?",
            )
        yield states
