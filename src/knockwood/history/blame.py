"""Who wrote a row, version by version, and who deleted which rows: from the WAL's record of places.

Pure but for `read_log`, which decodes the WAL.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import itemgetter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from knockwood.history.chains import NOWHERE, Chains, Place
from knockwood.history.touched import FileId, TouchedFile, touched
from knockwood.history.transaction import Transaction
from knockwood.model.wal import Lsn
from knockwood.postgres.binaries import Programs
from knockwood.repository.repository import Repository

EVENT_LIMIT: Final = 5_000_000
"""Changes that are held in memory, 40 bytes each."""

_BELOW_THREE: Final = 3


class Log(Chains):
    """Every change of one relation's file in order of the WAL: where a row was and where it is then."""

    __slots__ = ("_places", "_writers", "lsns", "news", "olds", "somewhere", "writers")

    def __init__(self) -> None:
        super().__init__()
        self.olds = array("q")
        self.news = array("q")
        self.lsns = array("q")
        self.writers = array("q")
        self.somewhere: list[tuple[int, int, int]] = []
        self._places: _Found | None = None
        self._writers: _Found | None = None

    def __len__(self) -> int:
        return len(self.lsns)

    def insert(self, new: Place, lsn: int = 0, xid: int = 0) -> None:
        self._note(NOWHERE, new, lsn, xid)

    def insert_somewhere(self, block: int, lsn: int, xid: int) -> None:
        self.somewhere.append((lsn, xid, block))

    def update(self, old: Place, new: Place, lsn: int = 0, xid: int = 0) -> None:
        self._note(old, new, lsn, xid)

    def delete(self, old: Place, lsn: int = 0, xid: int = 0, *, moved: bool = False) -> None:
        # A move to another partition is kept as a negative writer: the row goes on elsewhere.
        self._note(old, NOWHERE, lsn, -xid if moved else xid)

    def put(self, where: Place, below: int) -> Iterator[int]:
        """The changes before the one numbered `below` that put a row there, the newest first."""
        if self._places is None or len(self._places) != len(self):
            self._places = _Found(np.array(self.news, np.int64))
        return self._places.before(where, below)

    def made_by(self, writer: int, lsn: int) -> int | None:
        """The last change that a transaction made before a position."""
        if self._writers is None or len(self._writers) != len(self):
            self._writers = _Found(np.abs(np.array(self.writers, np.int64)))
        return next(self._writers.before(writer, bisect_left(self.lsns, lsn)), None)

    def _note(self, old: Place, new: Place, lsn: int, xid: int) -> None:
        self.olds.append(old)
        self.news.append(new)
        self.lsns.append(lsn)
        self.writers.append(xid)


class _Found:
    """The rows of each value of a column, put in order once: a row's life is followed change by change."""

    __slots__ = ("_order", "_values")

    def __init__(self, column: NDArray[np.int64]) -> None:
        self._order = np.argsort(column, kind="stable")
        self._values = column[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def before(self, value: int, below: int) -> Iterator[int]:
        """Rows of the value that are less than `below`, from the last one back."""
        low, high = np.searchsorted(self._values, (value, value + 1))
        rows = self._order[low:high]
        for row in reversed(rows[: np.searchsorted(rows, below)]):
            yield int(row)


Logs = Mapping[FileId, Log]


@dataclass(frozen=True, slots=True)
class Written:
    """One version of a row: the transaction that wrote it (None: not known) and how."""

    kind: str
    transaction: Transaction | None


@dataclass(frozen=True, slots=True)
class Deleted:
    """A row that is gone: its last visible version lay at `place` of `file` from just after the commit at
    `since` (0/0: from before the WAL that was read) until just before `by` committed.
    """

    file: FileId
    place: Place
    since: Lsn
    by: Transaction


def read_log(
    repository: Repository,
    programs: Programs,
    transactions: Sequence[Transaction],
    files: Collection[FileId],
    *,
    limit: int = EVENT_LIMIT,
) -> tuple[Logs, frozenset[FileId]]:
    """What the transactions did to some files, change by change, and those of the files that they dropped.

    Raises RefusedError above `limit` changes and what `touched` raises.
    """
    wanted = frozenset(files)
    found = touched(
        repository,
        programs,
        transactions,
        limit=limit,
        only=wanted.__contains__,
        new_file=lambda: TouchedFile(Log()),
    )
    logs = {file: each.chains for file, each in found.files.items() if isinstance(each.chains, Log)}
    return logs, frozenset(found.dropped & wanted)


def owners_of(transactions: Sequence[Transaction]) -> dict[int, Transaction]:
    """The transaction that each xid, also of a subtransaction, was committed with; the newest."""
    return {xid: each for each in transactions for xid in each.xids}


def versions(
    logs: Logs, owners: Mapping[int, Transaction], file: FileId, where: Place, xmin: int
) -> Iterator[Written]:
    """The versions of the row that lies at a place with a raw xmin, the newest first, as far as the log
    goes back. The last one is of kind `insert` where the whole life of the row is in the log.
    """
    log = logs.get(file)
    if log is None:
        return
    index = _written_at(log, len(log), where, xmin)
    below = 1 << 62
    while True:
        if index < 0:
            yield from _somewhere(log, owners, where >> 16, below, xmin if below == 1 << 62 else None)
            return
        writer, below, origin = log.writers[index], log.lsns[index], log.olds[index]
        transaction = owners.get(writer)
        if origin != NOWHERE:
            yield Written("update", transaction)
            where = origin
            index = _written_at(log, index, where)
            continue
        left = _left(logs, file, writer, below)
        yield Written("move" if left is not None else "insert", transaction)
        if left is None:
            return
        file, moved = left
        log = logs[file]
        where, below = log.olds[moved], log.lsns[moved]
        index = _written_at(log, moved, where)


def _written_at(log: Log, below: int, where: Place, xmin: int | None = None) -> int:
    """The last change before `below` that put a row there (by `xmin`, if given); less than zero for none."""
    return next((index for index in log.put(where, below) if xmin in (None, log.writers[index])), -1)


def _somewhere(
    log: Log, owners: Mapping[int, Transaction], block: int, below: int, xmin: int | None
) -> Iterator[Written]:
    """Rows that COPY put into the block at unknown offsets: whose this is is known if only one did."""
    writers = {xid for lsn, xid, at in log.somewhere if at == block and lsn < below}
    if xmin is not None:
        writers &= {xmin}
    if writers:
        yield Written("insert", owners.get(writers.pop()) if len(writers) == 1 else None)


def _left(logs: Logs, into: FileId, writer: int, lsn: int) -> tuple[FileId, int] | None:
    """The move out of another partition that an insert of `writer` at `lsn` completes, if it is one.

    The delete is the writer's last change before the insert in any of the partitions.
    """
    best: tuple[int, FileId, int] | None = None
    for file, log in logs.items():
        index = log.made_by(writer, lsn)
        if index is not None and (best is None or log.lsns[index] > best[0]):
            best = log.lsns[index], file, index
    if best is None or best[1] == into or logs[best[1]].writers[best[2]] != -writer:
        return None
    return best[1], best[2]


Seen = tuple[FileId, Place, Lsn]
"""Where a version could be seen, and from which commit on."""


def deletions(logs: Logs, owners: Mapping[int, Transaction]) -> Iterator[Deleted]:
    """The rows that were deleted for good, with the time during which their last version could be seen.

    A row that moved to another partition is followed there.
    """
    # Per place: the commit that wrote what lies there, and the version that could be seen before it.
    at: dict[tuple[FileId, Place], tuple[Lsn, Seen | None]] = {}
    moving: dict[int, tuple[FileId, Seen | None]] = {}
    for file, old, new, writer in _in_order(logs):
        by = owners[abs(writer)]
        before: Seen | None = None
        if old != NOWHERE:
            commit, earlier = at.pop((file, old), (Lsn(0), None))
            before = earlier if commit == by.commit_lsn else (file, old, commit)
        elif writer in moving and moving[writer][0] != file:
            _, before = moving.pop(writer)
        if new != NOWHERE:
            at[file, new] = by.commit_lsn, before
        elif writer < 0:
            moving[-writer] = file, before
        elif before is not None:
            yield Deleted(*before, by)


def _in_order(logs: Logs) -> Iterator[tuple[FileId, Place, Place, int]]:
    """The changes of all files in order of the WAL."""
    streams = (
        zip(log.lsns, repeat(file), log.olds, log.news, log.writers, strict=False)
        for file, log in logs.items()
    )
    for _, file, old, new, writer in heapq.merge(*streams, key=itemgetter(0)):
        yield file, old, new, writer


def stops_for(rows: Sequence[Deleted]) -> list[tuple[Transaction, list[Deleted]]]:
    """The fewest points at which every deleted row can be seen: just before the commit of a transaction.

    Stabbing intervals greedily by their right end is optimal. In order of the commits.
    """
    waiting = sorted(rows, key=lambda row: (row.by.commit_lsn, row.since))
    stops: list[tuple[Transaction, list[Deleted]]] = []
    for row in waiting:
        if stops and row.since < stops[-1][0].commit_lsn <= row.by.commit_lsn:
            stops[-1][1].append(row)
        else:
            stops.append((row.by, [row]))
    return stops


def times_used(xid: int, next_full_xid: int) -> int:
    """How often an xid's number was given out, when the next one (64 bits, with its epoch) is known."""
    if xid < _BELOW_THREE:
        return 0
    return (next_full_xid >> 32) + (1 if xid < next_full_xid & 0xFFFF_FFFF else 0)
