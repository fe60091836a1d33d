"""Transactions put together from the parts that the index has of them, segment by segment, in order."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from knockwood.history.carried import Carried
from knockwood.history.effects import changes_catalogs, relations_of
from knockwood.history.store import Head, OpenTransaction, Transactions, bytes_of, labels_of
from knockwood.history.summary import INPLACE, KIND_BITS, TAKEN_BACK
from knockwood.history.transaction import Transaction
from knockwood.model.wal import Lsn, TimelineHistory
from knockwood.postgres.walendings import Ending, File, microseconds, moment

_NOTHING = Ending()

_MANY = 500
"""From so many transactions of a segment on it pays to turn its columns into lists."""


@dataclass(slots=True)
class _Sum:
    """What is known of one transaction so far."""

    first: int
    bytes: int = 0
    counts: dict[File, list[int]] = field(default_factory=dict)
    created: list[File] = field(default_factory=list)
    gid: str | None = None
    label: str | None = None

    def count(self, file: File, kind: int, number: int) -> None:
        self.counts.setdefault(file, [0] * 6)[kind] += number


@dataclass(frozen=True, slots=True)
class Asked:
    """Which transactions: commit records that start from `since` on and before `until`, commit times from
    `after` on up to and including `before` (times tie and are not in LSN order).

    `filenodes` holds relation file numbers, or pairs of database and number: those that changed one of
    them. `xids` holds such that the transaction had one of, also as a subtransaction.
    """

    since: Lsn | None = None
    until: Lsn | None = None
    after: datetime | None = None
    before: datetime | None = None
    filenodes: Container[object] | None = None
    xids: frozenset[int] | None = None


class Assembler:
    """Takes segments one by one; what earlier ones hold of their transactions is looked up in `carried`."""

    def __init__(self, history: TimelineHistory, asked: Asked, carried: Carried) -> None:
        self._history = history
        self._since = asked.since.value if asked.since is not None else 0
        self._until = asked.until.value if asked.until is not None else None
        self._after = microseconds(asked.after) if asked.after is not None else None
        self._before = microseconds(asked.before) if asked.before is not None else None
        self._filenodes = asked.filenodes
        self._xids = np.array(sorted(asked.xids), np.int64) if asked.xids is not None else None
        self._carried = carried

    # --- which segments ----------------------------------------------------------------------------

    def beyond(self, head: Head) -> bool:
        """Whether this segment, and so all after it, begins after what is asked for."""
        return self._until is not None and head.start >= self._until

    def before(self, head: Head) -> bool:
        """Whether this segment, and so all before it, ends before what is asked for."""
        return head.end <= self._since

    def needs(self, position: int, head: Head) -> bool:
        """Whether a segment may hold a commit that is asked for."""
        if head.commits == 0 or head.xids is None or self.before(head):
            return False
        if self._xids is not None:
            low, high = np.searchsorted(self._xids, (head.xids[0], head.xids[1] + 1))
            if low == high:
                return False
        if head.times is not None and not self._in_time(*head.times):
            return False
        if self._filenodes is None:
            return True
        return any(map(self._wanted, head.changed)) or any(
            True for _ in self._carried.ending(position, head, self._touches)
        )

    def most(self, position: int, head: Head) -> int:
        """No transaction committed in a segment has more bytes of WAL."""
        carried = self._carried
        return head.most + sum(carried.bytes(position, xid) for xid in carried.ending(position, head))

    def _in_time(self, first: int, last: int) -> bool:
        return (self._after is None or last >= self._after) and (
            self._before is None or first <= self._before
        )

    def _wanted(self, file: File) -> bool:
        asked = self._filenodes
        return asked is None or file[2] in asked or (file[1], file[2]) in asked

    # --- segments ----------------------------------------------------------------------------------

    def read(
        self,
        position: int,
        head: Head,
        found: Transactions,
        *,
        last: int | None = None,
        largest: int | None = None,
    ) -> Iterator[Transaction]:
        """The transactions of a segment that are asked for, in order; only the `last`, or the `largest`."""
        rows, most = self._candidates(position, head, found), None
        if last is not None:
            rows, most = rows[::-1], last
        elif largest is not None:
            sizes = self._sizes(position, head, found.columns)[rows]
            rows, most = rows[np.argsort(-sizes, kind="stable")], largest
        segment = _Segment(head, found, many=min(len(rows), most or len(rows)) > _MANY)
        made = (self._made(segment, row, position) for row in rows.tolist())
        # Not before each was looked at: what is left out may make room for one that comes after it.
        chosen = islice(filter(self._fits, made), most)
        yield from chosen if most is None else sorted(chosen, key=lambda one: one.commit_lsn)

    def _fits(self, made: Transaction) -> bool:
        return self._filenodes is None or any(
            self._wanted((one.tablespace, one.database, one.filenode)) for one in made.relations
        )

    def _candidates(self, position: int, head: Head, found: Transactions) -> NDArray[np.int64]:
        """The rows of commits that may be asked for; what files they changed is looked at closely later."""
        columns = found.columns
        at = columns["end_at"] + head.segment.start.value
        mask = (columns["end_commit"] == 1) & (at >= self._since)
        if self._until is not None:
            mask &= at < self._until
        if self._after is not None:
            mask &= columns["end_time"] >= self._after
        if self._before is not None:
            mask &= columns["end_time"] <= self._before
        if self._xids is not None:
            mask &= _marked(columns, self._xids)
        if self._filenodes is not None:
            relations = [row for row, file in enumerate(head.relations) if self._wanted(file)]
            kinds = columns["change_what"] & ((1 << KIND_BITS) - 1)
            wanted = np.isin(columns["change_what"] >> KIND_BITS, relations)
            wanted &= (kinds != INPLACE) & (kinds != TAKEN_BACK)
            xids = [
                *(xid for xid, file in found.created if self._wanted(file)),
                *self._carried.ending(position, head, self._touches),
            ]
            fits = _marked(columns, np.concatenate((columns["change_xid"][wanted], np.array(xids, np.int64))))
            dropped = [row for row, one in found.details.items() if any(map(self._wanted, one.dropped))]
            fits[dropped] = True
            mask &= fits
        return np.flatnonzero(mask)

    def _touches(self, part: OpenTransaction) -> bool:
        return any(map(self._wanted, (*(change[0] for change in part.changes), *part.created)))

    def _sizes(
        self, position: int, head: Head, columns: Mapping[str, NDArray[np.int64]]
    ) -> NDArray[np.int64]:
        """The bytes of WAL of each ending, with what earlier segments hold."""
        sums = bytes_of(columns)
        for xid in self._carried.ending(position, head):
            sums[_rows_of(columns, np.array([xid]))] += self._carried.bytes(position, xid)
        return sums

    def _made(self, segment: _Segment, row: int, position: int) -> Transaction:
        xids = segment.xids(row)
        at = segment.base + int(segment.at[row])
        total = _Sum(at)
        for base, part in (each for xid in xids for each in self._carried.of(position, xid)):
            total.first = min(total.first, base + part.first)
            total.bytes += part.bytes
            total.created += part.created
            total.gid = part.gid or total.gid
            total.label = part.label or total.label
            for file, kind, number in part.changes:
                total.count(file, kind, number)
        for xid in xids:
            segment.add(xid, total)
        detail = segment.details.get(row, _NOTHING)
        return Transaction(
            xid=xids[0],
            timeline=self._history.timeline_at(Lsn(at)),
            first_lsn=Lsn(total.first),
            commit_lsn=Lsn(at),
            end_lsn=Lsn(segment.base + int(segment.ends[row])),
            commit_time=moment(int(segment.times[row])),
            subxids=tuple(xids[1:]),
            wal_bytes=total.bytes,
            relations=relations_of(total.counts, total.created, detail),
            catalog_changes=changes_catalogs(total.counts, detail),
            gid=detail.gid or total.gid,
            label=total.label,
            complete=self._carried.complete(position, xids[0]),
        )


def _marked(columns: Mapping[str, NDArray[np.int64]], xids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which endings are of transactions that have one of the xids."""
    mask = np.isin(columns["end_xid"], xids)
    mask[columns["sub_row"][np.isin(columns["sub_xid"], xids)]] = True
    return mask


def _rows_of(columns: Mapping[str, NDArray[np.int64]], xids: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.flatnonzero(_marked(columns, xids))


class _Segment:
    """The columns of one segment: as Python's lists where `many` rows are asked for one by one."""

    def __init__(self, head: Head, found: Transactions, *, many: bool) -> None:
        columns = found.columns

        def ready(name: str) -> Sequence[int]:
            column = columns[name]
            return column.tolist() if many else column  # type: ignore[return-value]

        ranges = _Ranges if many else _Searched
        self.base = head.segment.start.value
        self.relations = head.relations
        self.details = found.details
        self.at = ready("end_at")
        self.ends = ready("end_end")
        self.times = ready("end_time")
        self._top = ready("end_xid")
        self._subs = ready("sub_xid")
        self._sub_rows = _Searched(columns["sub_row"])
        self._no_subs = not len(columns["sub_row"])
        self._rows = ranges(columns["xact_xid"])
        self._first = ready("xact_first")
        self._bytes = ready("xact_bytes")
        self._change_rows = ranges(columns["change_xid"])
        self._what = ready("change_what")
        self._number = ready("change_count")
        self._labels = labels_of(head.messages)
        self._prepared = found.prepared
        self._created: dict[int, list[File]] = {}
        for xid, file in found.created:
            self._created.setdefault(xid, []).append(file)

    def xids(self, row: int) -> list[int]:
        """The xids that end with a row: the top-level one, then its subtransactions."""
        top = int(self._top[row])
        return [top] if self._no_subs else [top, *(int(self._subs[n]) for n in self._sub_rows.of(row))]

    def add(self, xid: int, total: _Sum) -> None:
        """Add what the segment holds of an xid."""
        for row in self._rows.of(xid):
            total.first = min(total.first, self.base + int(self._first[row]))
            total.bytes += int(self._bytes[row])
        for row in self._change_rows.of(xid):
            what, number = int(self._what[row]), int(self._number[row])
            total.count(self.relations[what >> KIND_BITS], what & ((1 << KIND_BITS) - 1), number)
        total.created += self._created.get(xid, ())
        total.gid = self._prepared.get(xid) or total.gid
        total.label = self._labels.get(xid) or total.label


class _Ranges:
    """The rows of each value in a sorted column."""

    def __init__(self, column: NDArray[np.int64]) -> None:
        border = np.flatnonzero(np.diff(column, prepend=-1))
        after = np.append(border[1:], len(column)) if len(border) else border
        self._rows = dict(
            zip(column[border].tolist(), zip(border.tolist(), after.tolist(), strict=True), strict=True)
        )

    def of(self, value: int) -> range:
        return range(*self._rows.get(value, (0, 0)))


class _Searched:
    """The same for few questions: nothing is prepared."""

    def __init__(self, column: NDArray[np.int64]) -> None:
        self._column = column

    def of(self, value: int) -> range:
        low, high = np.searchsorted(self._column, (value, value + 1))
        return range(int(low), int(high))
