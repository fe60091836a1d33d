"""What became of tuples, net: versions in between are left out, old and new are matched by what was updated.

Pure. A tuple's place is one number, `block << 16 | offset`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

NOWHERE: Final = -1

Place = int
ChainId = tuple[int, int]
"""A chain by its file's number in some order and its own number in that file."""


def place(block: int, offset: int) -> Place:
    return block << 16 | offset


def parse_place(text: str) -> Place:
    """Read a ctid, `(3,17)`."""
    block, offset = text[1:-1].split(",")
    return int(block) << 16 | int(offset)


def ctid(value: Place) -> str:
    return f"({value >> 16},{value & 0xFFFF})"


class Net(NamedTuple):
    """One row's net change: it lay at `origin` before (None: not there), and lies at `head` after."""

    number: int
    origin: Place | None
    head: Place | None


class Move(NamedTuple):
    """A row left a partition for another: a delete of `chain` by `xid` at `lsn`, marked so in the WAL."""

    lsn: int
    xid: int
    chain: int


class Chains:
    """The version chains of one relation's file, fed with its changes in order of the WAL.

    Places may be used again in between (by VACUUM and a later insert): a chain ends with its delete, and
    one that begins at the same place later is another. 24 bytes and a dictionary entry per row.
    """

    __slots__ = ("_at", "_heads", "_lsns", "_origins", "_xids", "moves")

    def __init__(self) -> None:
        self._at: dict[Place, int] = {}
        self._origins = array("q")
        self._heads = array("q")
        self._lsns = array("q")
        self._xids = array("L")
        self.moves: list[Move] = []

    def __len__(self) -> int:
        return len(self._origins)

    def insert(self, new: Place, lsn: int = 0, xid: int = 0) -> None:
        self._at[new] = self._begin(NOWHERE, new, lsn, xid)

    def insert_somewhere(self, block: int, lsn: int, xid: int) -> None:
        """Rows were put into a block at offsets that are not known: of no use for chains."""

    def update(self, old: Place, new: Place, lsn: int = 0, xid: int = 0) -> None:
        number = self._at.pop(old, None)
        if number is None:
            number = self._begin(old, new, 0, 0)
        self._heads[number] = new
        self._at[new] = number

    def delete(self, old: Place, lsn: int = 0, xid: int = 0, *, moved: bool = False) -> None:
        number = self._at.pop(old, None)
        if number is None:
            number = self._begin(old, NOWHERE, 0, 0)
        self._heads[number] = NOWHERE
        if moved:
            self.moves.append(Move(lsn, xid, number))

    def clear(self) -> None:
        """The file was emptied in place, by the transaction that made it."""
        self.__init__()  # type: ignore[misc]

    def _begin(self, origin: Place, head: Place, lsn: int, xid: int) -> int:
        self._origins.append(origin)
        self._heads.append(head)
        self._lsns.append(lsn)
        self._xids.append(xid)
        return len(self._origins) - 1

    def net(self) -> Iterator[Net]:
        """The rows that differ before and after, in the order they were first touched."""
        for number, (origin, head) in enumerate(zip(self._origins, self._heads, strict=True)):
            if origin != NOWHERE or head != NOWHERE:
                yield Net(number, _or_none(origin), _or_none(head))

    def ends_at(self, where: Place) -> bool:
        """Whether a chain known so far has its newest version there."""
        return where in self._at

    def arrivals(self) -> Iterator[tuple[int, int, int]]:
        """LSN, xid and number of every chain that began with an insert."""
        for number, origin in enumerate(self._origins):
            if origin == NOWHERE:
                yield self._lsns[number], self._xids[number], number


def _or_none(value: int) -> Place | None:
    return None if value == NOWHERE else value


def follow_moves(family: Mapping[int, Chains]) -> dict[ChainId, ChainId]:
    """For the partitions of one table, by some number: where each chain that left went on in the end.

    PostgreSQL deletes the row from one partition and inserts it into the other with nothing of its own in
    between (ExecCrossPartitionUpdate): the first later insert of the same xid into another partition is it.
    """
    arrivals: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for file, chains in family.items():
        for lsn, xid, number in chains.arrivals():
            arrivals[xid].append((lsn, file, number))
    for found in arrivals.values():
        found.sort()
    step: dict[ChainId, ChainId] = {}
    taken: set[ChainId] = set()
    for move, file in sorted((move, file) for file, chains in family.items() for move in chains.moves):
        target = _arrival(arrivals.get(move.xid, []), move.lsn, file, taken)
        if target is not None:
            taken.add(target)
            step[file, move.chain] = target
    return {start: _last(step, start) for start in step if start not in taken}


def _arrival(
    found: list[tuple[int, int, int]], after: int, leaving: int, taken: set[ChainId]
) -> ChainId | None:
    for lsn, file, number in _from(found, bisect_right(found, (after, 1 << 62, 0))):
        if lsn > after and file != leaving and (file, number) not in taken:
            return file, number
    return None


def _from(found: list[tuple[int, int, int]], begin: int) -> Iterable[tuple[int, int, int]]:
    return (found[index] for index in range(begin, len(found)))


def _last(step: Mapping[ChainId, ChainId], start: ChainId) -> ChainId:
    while start in step:
        start = step[start]
    return start
