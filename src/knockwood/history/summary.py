"""What the index holds of one segment, made from its decoded records."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knockwood.errors import ObjectDamagedError
from knockwood.history.columns import Column
from knockwood.postgres import walendings as endings
from knockwood.postgres import walrecords
from knockwood.postgres.walendings import Ending, File
from knockwood.postgres.walpages import Bytes, Ints, SegmentRecords
from knockwood.postgres.walrecords import Records, References, decode

# What happened to tuples. A speculative insertion that lost its race is taken back.
# Images are pages written whole: by a rewrite, an index build, or the first change after a checkpoint.
INSERTED, UPDATED, DELETED, INPLACE, TAKEN_BACK, IMAGE = 0, 1, 2, 3, 4, 5
KIND_BITS = 3

# Heap opcodes (heapam_xlog.h).
_OPERATION = 0x70
_INSERT, _DELETE, _UPDATE, _HOT_UPDATE, _INPLACE = 0x00, 0x10, 0x20, 0x40, 0x70
_MULTI_INSERT = 0x50
_FULL_PAGE = 0xB0
_DELETE_IS_SUPER = 1 << 3

_KINDS = np.full(8, -1, np.int64)
_KINDS[[_INSERT >> 4, _DELETE >> 4, _UPDATE >> 4, _HOT_UPDATE >> 4, _INPLACE >> 4]] = (
    INSERTED,
    DELETED,
    UPDATED,
    UPDATED,
    INPLACE,
)

_MESSAGE_HEAD = struct.Struct("<IB3xQQ")
_PREFIX = "knockwood"
_MOST_TEXT = 2000

TRANSACTION_DELTAS = frozenset({"xact_xid", "change_xid", "end_at", "end_time"})
BLOCK_DELTAS = frozenset({"at"})


@dataclass(frozen=True, slots=True)
class SegmentSummary:
    """A segment's part of the index.

    `transactions` and `blocks` are columns; positions (`*_at`, `*_end`, `xact_first`) are bytes from the
    segment's start, negative for a record that began before it.

    transactions: per xid `xact_xid`, `xact_first`, `xact_bytes`; per xid, relation and kind
    `change_xid`, `change_what` (row of `relations` << 3 | kind), `change_count`; per commit or abort
    `end_at`, `end_end`, `end_xid`, `end_time`, `end_commit` (1 commit, 0 abort); their subtransactions
    `sub_row` (a row of the endings), `sub_xid`.

    blocks: per record of a heap, and per page image on its own, and block: `relation` (a row of
    `relations`), `block`, `at`, `xid`, `kind` (see KIND_NAMES).

    `next_xid` is from the first record that lists running transactions: those from it on began after it.
    """

    start: int
    end: int
    major: int | None
    records: int
    relations: tuple[File, ...]
    transactions: Mapping[str, Column]
    blocks: Mapping[str, Column]
    details: Mapping[int, Ending] = field(default_factory=dict)
    prepared: Mapping[int, str] = field(default_factory=dict)
    created: tuple[tuple[int, File], ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    next_xid: int | None = None
    broken: str | None = None
    zeroes: bool = False


def summarize(found: SegmentRecords, base: int) -> SegmentSummary:
    """The index of a segment that starts at `base`. What cannot be decoded ends it (`broken`)."""
    maker = _Maker(base, found.major or 0)
    broken, end = found.broken, found.end
    for stretch in found.stretches:
        rows = decode(stretch)
        if rows.bad is not None:
            broken, end = "a record contradicts itself", int(rows.lsn[rows.bad])
            rows = _first(rows, rows.bad)
        try:
            maker.add(rows)
        except ObjectDamagedError as error:
            broken, end = error.what, int(rows.lsn[0]) if len(rows) else found.start
        if broken is not None and broken != found.broken:
            break
    return maker.done(found.start, end, found.major, broken, found.zeroes)


class _Maker:
    def __init__(self, base: int, major: int) -> None:
        self._base = base
        self._major = major
        self._count = 0
        self._relations = _Numbered()
        self._xacts: list[tuple[Ints, Ints, Ints]] = []
        self._changes: list[tuple[Ints, Ints, Ints]] = []
        self._ends: list[dict[str, Any]] = []
        self._subs: list[tuple[int, int]] = []
        self._blocks: list[dict[str, NDArray[Any]]] = []
        self._details: dict[int, Ending] = {}
        self._prepared: dict[int, str] = {}
        self._created: list[tuple[int, File]] = []
        self._messages: list[dict[str, Any]] = []
        self._end_rows = 0
        self._next_xid: int | None = None

    def add(self, rows: Records) -> None:
        if not len(rows):
            return
        self._count += len(rows)
        at = rows.lsn - self._base
        self._sums(rows, at)
        references = rows.references
        numbers = self._relations.of(references)
        self._changes_of(rows, references, numbers)
        self._blocks_of(rows, references, numbers, at)
        self._endings(rows, at)
        self._storage(rows)
        self._marks(rows, at)
        self._running(rows)

    # --- in bulk ------------------------------------------------------------------------------------

    def _sums(self, rows: Records, at: Ints) -> None:
        """Per xid: its first record and the bytes of its records."""
        chosen = np.flatnonzero(rows.xid)
        xid = rows.xid.take(chosen).astype(np.int64)
        size = rows.length.take(chosen)
        if not len(xid):
            return
        low, high = int(xid.min()), int(xid.max())
        if high - low > 8 * len(xid) + 65536:
            # Far apart: an old transaction beside new ones, or the numbers went round.
            known, xid = np.unique(xid, return_inverse=True)
            low, high = 0, len(known) - 1
        else:
            known = np.arange(low, high + 1)
            xid = xid - low
        sums = np.bincount(xid, weights=size, minlength=len(known)).astype(np.int64)
        begin = np.zeros(len(known), np.int64)
        # Backwards, so that what is written last is the first record's.
        begin[xid[::-1]] = at.take(chosen)[::-1]
        there = np.flatnonzero(sums)
        self._xacts.append((known[there], begin[there], sums[there]))

    def _changes_of(self, rows: Records, references: References, numbers: Ints) -> None:
        """Tuples inserted, updated and deleted, per xid and relation."""
        relation = np.full(len(rows), -1, np.int64)
        # Each record's first reference: an update's new page, of the same relation as its old one.
        relation[references.record[::-1]] = numbers[::-1]
        heap = np.flatnonzero((rows.manager == walrecords.HEAP) & (relation >= 0))
        info = rows.info.take(heap)
        kind = _KINDS.take((info & np.uint8(_OPERATION)) >> np.uint8(4))
        deleted = np.flatnonzero(kind == DELETED)
        flags = rows.buffer[np.minimum(rows.main.take(heap[deleted]) + 7, len(rows.buffer) - 1)]
        kind[deleted[(flags & _DELETE_IS_SUPER) != 0]] = TAKEN_BACK
        known = np.flatnonzero(kind >= 0)
        heap, kind = heap.take(known), kind.take(known)
        key = _key(rows.xid.take(heap), relation.take(heap), kind)
        key.sort()
        border = np.flatnonzero(np.diff(key, prepend=-1))
        self._note(key.take(border), np.diff(border, append=len(key)))
        many = (
            (rows.manager == walrecords.HEAP2) & ((rows.info & _OPERATION) == _MULTI_INSERT) & (relation >= 0)
        )
        chosen = np.flatnonzero(many)
        if len(chosen):
            place = rows.main.take(chosen) + 2
            tuples: Ints = rows.buffer[place].astype(np.int64) | rows.buffer[place + 1].astype(np.int64) << 8
            inserted = np.full(len(chosen), INSERTED, np.int64)
            # COPY writes a record per page: one sum is kept, not thousands of parts.
            keys, each = np.unique(
                _key(rows.xid.take(chosen), relation.take(chosen), inserted), return_inverse=True
            )
            self._note(keys, np.bincount(each, weights=tuples).astype(np.int64))

        whole = (rows.manager == walrecords.XLOG) & ((rows.info & 0xF0) == _FULL_PAGE) & (rows.xid != 0)
        chosen = np.flatnonzero(whole & (relation >= 0))
        if len(chosen):
            image = np.full(len(chosen), IMAGE, np.int64)
            keys, counts = np.unique(
                _key(rows.xid.take(chosen), relation.take(chosen), image), return_counts=True
            )
            self._note(keys, counts)

    def _note(self, key: Ints, count: Ints) -> None:
        self._changes.append((key >> 31, key & 0x7FFF_FFFF, count))

    def _blocks_of(self, rows: Records, references: References, numbers: Ints, at: Ints) -> None:
        manager = rows.manager.take(references.record)
        info = rows.info.take(references.record)
        heap = (manager == walrecords.HEAP) | (manager == walrecords.HEAP2)
        chosen = np.flatnonzero((heap | (manager == walrecords.XLOG)) & (references.fork == 0))
        record = references.record.take(chosen)
        kind = block_kind(manager.take(chosen), info.take(chosen))
        # In the order of the WAL: second references were read after all first ones.
        order = np.argsort(record, kind="stable")
        chosen, record = chosen.take(order), record.take(order)
        self._blocks.append(
            {
                "relation": numbers.take(chosen),
                "block": references.block.take(chosen),
                "at": at.take(record),
                "xid": rows.xid.take(record),
                "kind": kind.take(order),
            }
        )

    # --- one by one ---------------------------------------------------------------------------------

    def _endings(self, rows: Records, at: Ints) -> None:
        chosen = np.flatnonzero(rows.manager == walrecords.XACT)
        operation = rows.info.take(chosen) & endings.OPERATION_MASK
        for row in chosen[operation == endings.PREPARE]:
            top, gid = endings.parse_prepare(rows.data(int(row)))
            self._prepared[top] = gid
        commits = (operation == endings.COMMIT) | (operation == endings.COMMIT_PREPARED)
        aborts = (operation == endings.ABORT) | (operation == endings.ABORT_PREPARED)
        ends = np.flatnonzero(commits | aborts)
        chosen, operation = chosen.take(ends), operation.take(ends)
        if not len(chosen):
            return
        if int(rows.main_bytes.take(chosen).min()) < 8:
            raise ObjectDamagedError("a commit or abort record is too short")
        main = rows.main.take(chosen)
        words = np.ndarray((len(rows.buffer) - 7,), "<i8", rows.buffer, strides=(1,))
        xid = rows.xid.take(chosen).astype(np.int64)
        for index in np.flatnonzero(rows.info.take(chosen) & endings.HAS_INFO):
            detail = endings.parse_ending(rows.data(int(chosen[index])), int(operation[index]), self._major)
            number = self._end_rows + int(index)
            if detail.xid is not None:
                xid[index] = detail.xid
            self._subs += [(number, sub) for sub in detail.subxids]
            if detail.dropped or detail.relations or detail.catalogs or detail.gid:
                self._details[number] = detail
        self._end_rows += len(chosen)
        self._ends.append(
            {
                "end_at": at.take(chosen),
                "end_end": rows.end.take(chosen) - self._base,
                "end_xid": xid,
                "end_time": words[main],
                "end_commit": commits.take(ends),
            }
        )

    def _storage(self, rows: Records) -> None:
        chosen = (rows.manager == walrecords.SMGR) & ((rows.info & 0xF0) == 0x10)
        for row in np.flatnonzero(chosen):
            data = rows.data(int(row))
            if len(data) >= 16:
                *file, fork = struct.unpack_from("<3Ii", data)
                if fork == 0:
                    self._created.append((int(rows.xid[row]), (file[0], file[1], file[2])))

    def _marks(self, rows: Records, at: Ints) -> None:
        for row in np.flatnonzero(rows.manager == walrecords.LOGICALMSG):
            data = rows.data(int(row))
            if len(data) < _MESSAGE_HEAD.size:
                continue
            database, transactional, prefix_bytes, text_bytes = _MESSAGE_HEAD.unpack_from(data)
            begin = _MESSAGE_HEAD.size
            prefix = data[begin : begin + prefix_bytes].rstrip(b"\0").decode(errors="replace")
            text = data[begin + prefix_bytes : begin + prefix_bytes + min(text_bytes, _MOST_TEXT)]
            self._messages.append(
                {
                    "at": int(at[row]),
                    "xid": int(rows.xid[row]) if transactional else 0,
                    "database": database,
                    "prefix": prefix,
                    # What others write may be data of theirs: only what is meant for us is kept.
                    "text": text.decode(errors="replace") if prefix.startswith(_PREFIX) else None,
                    "bytes": text_bytes,
                }
            )

    def _running(self, rows: Records) -> None:
        if self._next_xid is not None:
            return
        chosen = np.flatnonzero((rows.manager == walrecords.STANDBY) & ((rows.info & 0xF0) == 0x10))
        for row in chosen[:1]:
            # xl_running_xacts: two counts, a flag, then the next xid.
            self._next_xid = int.from_bytes(rows.data(int(row))[12:16], "little")

    def done(
        self, start: int, end: int, major: int | None, broken: str | None, zeroes: bool
    ) -> SegmentSummary:
        xacts = _joined(self._xacts, 3)
        changes = _joined(self._changes, 3)
        order = np.argsort(changes[0], kind="stable")
        if len(self._xacts) > 1:
            by_xid = np.argsort(xacts[0], kind="stable")
            xacts = [column[by_xid] for column in xacts]
        names = ("end_at", "end_end", "end_xid", "end_time", "end_commit")
        ends = {name: _concatenated([part[name] for part in self._ends]) for name in names}
        transactions = {
            "xact_xid": xacts[0],
            "xact_first": xacts[1],
            "xact_bytes": xacts[2],
            "change_xid": changes[0][order],
            "change_what": changes[1][order],
            "change_count": changes[2][order],
            **ends,
            "sub_row": np.array([row for row, _ in self._subs], np.int64),
            "sub_xid": np.array([xid for _, xid in self._subs], np.int64),
        }
        columns = ("relation", "block", "at", "xid", "kind")
        blocks = {name: _concatenated([part[name] for part in self._blocks]) for name in columns}
        return SegmentSummary(
            start=start, end=end, major=major, records=self._count, relations=self._relations.files,
            transactions=transactions, blocks=blocks, details=self._details, prepared=self._prepared,
            created=tuple(self._created), messages=tuple(self._messages), next_xid=self._next_xid,
            broken=broken, zeroes=zeroes,
        )  # fmt: skip


class _Numbered:
    """Numbers relations in the order of their coming."""

    def __init__(self) -> None:
        self.files: tuple[File, ...] = ()
        self._keys = np.zeros(0, np.uint64)
        self._numbers = np.zeros(0, np.int64)

    def of(self, references: References) -> Ints:
        """The number of each reference's relation."""
        # A hash of the three numbers that is one of a kind for all that any server has.
        key = references.filenode.astype(np.uint64)
        key |= references.database.astype(np.uint64) << np.uint64(32)
        key += references.tablespace.astype(np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15)
        place = np.searchsorted(self._keys, key)
        missing = np.ones(len(key), bool)
        inside = place < len(self._keys)
        missing[inside] = self._keys[place[inside]] != key[inside]
        if missing.any():
            self._learn(references, key, np.flatnonzero(missing))
            place = np.searchsorted(self._keys, key)
        return self._numbers.take(place)

    def _learn(self, references: References, key: NDArray[np.uint64], rows: Ints) -> None:
        fresh, first = np.unique(key[rows], return_index=True)
        rows = rows[first]
        files = zip(
            references.tablespace[rows].tolist(),
            references.database[rows].tolist(),
            references.filenode[rows].tolist(),
            strict=True,
        )
        numbers = np.arange(len(self.files), len(self.files) + len(fresh), dtype=np.int64)
        self.files = (*self.files, *files)
        keys = np.concatenate((self._keys, fresh))
        order = np.argsort(keys)
        self._keys = keys[order]
        self._numbers = np.concatenate((self._numbers, numbers))[order]


KIND_NAMES = {
    0: "insert", 1: "delete", 2: "update", 3: "truncate", 4: "hot_update", 5: "confirm", 6: "lock",
    7: "inplace", 8: "rewrite", 9: "prune", 10: "prune", 11: "prune", 12: "visible", 13: "multi_insert",
    14: "lock_updated", 15: "new_cid", 16: "image",
}  # fmt: skip
"""`kind` of the block index: heap opcodes, 8 and more those of heap2, 16 a page image on its own."""


def block_kind(manager: Bytes, info: Bytes) -> Bytes:
    """The kind of a record that touches a block."""
    operation = (info & np.uint8(_OPERATION)) >> np.uint8(4)
    kind = np.where(manager == walrecords.HEAP2, operation + np.uint8(8), operation)
    return np.where(manager == walrecords.XLOG, np.uint8(16), kind).astype(np.uint8)


def _key(xid: NDArray[Any], relation: Ints, kind: Ints) -> Ints:
    return xid.astype(np.int64) << 31 | relation << KIND_BITS | kind


def _first(rows: Records, count: int) -> Records:
    """The first records of a stretch."""
    kept = np.flatnonzero(rows.references.record < count)
    whole = rows.references
    names = [field.name for field in fields(References)]
    references = References(*(getattr(whole, name)[kept] for name in names))
    cut = ("start", "lsn", "end", "length", "xid", "info", "manager", "main", "main_bytes")
    columns: dict[str, Any] = {name: getattr(rows, name)[:count] for name in cut}
    return Records(buffer=rows.buffer, references=references, bad=None, **columns)


def _joined(parts: list[tuple[Ints, Ints, Ints]], width: int) -> list[Ints]:
    return [_concatenated([part[column] for part in parts]) for column in range(width)]


def _concatenated(parts: list[NDArray[Any]]) -> Ints:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
