"""WAL records decoded in bulk: numpy columns, one row per record and one per block reference.

The layout is that of PostgreSQL 15 to 18 (xlogrecord.h): a header of 24 bytes, then one header per block
(`id`, `flags`, `length`; with a page image 5 to 7 bytes more; the relation unless it is that of the block
before; the block number), then that of the main data, which ends the record.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knockwood.postgres.walpages import Bytes, Ints, Stretch

HEADER_BYTES = 24

# Resource managers (rmgrlist.h), the same in all these versions.
XLOG, XACT, SMGR, DBASE, TABLESPACE, STANDBY, HEAP2, HEAP, LOGICALMSG = 0, 1, 2, 4, 5, 8, 9, 10, 21

FORK_MASK, HAS_IMAGE, HAS_DATA, WILL_INIT, SAME_REL = 0x0F, 0x10, 0x20, 0x40, 0x80
_HAS_HOLE, _COMPRESSED = 0x01, 0x1C
_MOST_BLOCK = 32
_SHORT, _LONG, _ORIGIN, _TOP_XID = 255, 254, 253, 252
_MOST_PARTS = _MOST_BLOCK + 4

Words = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class References:
    """Blocks that records touch. `record` is the record's row, `id` the reference's number in it."""

    record: Ints
    id: Bytes
    flags: Bytes
    tablespace: Words
    database: Words
    filenode: Words
    block: Words

    @property
    def fork(self) -> Bytes:
        """0 main, 1 free space map, 2 visibility map, 3 init."""
        return self.flags & np.uint8(FORK_MASK)


@dataclass(frozen=True, slots=True)
class Records:
    """Whole records of a stretch. Positions are in `buffer`; `main` and `main_bytes` are the main data's.

    `bad` is the row of the first record whose inside contradicts itself, None if there is none.
    """

    buffer: Bytes
    start: Ints
    lsn: Ints
    end: Ints
    length: Words
    xid: Words
    info: Bytes
    manager: Bytes
    main: Ints
    main_bytes: Ints
    references: References
    bad: int | None

    def __len__(self) -> int:
        return len(self.start)

    def data(self, row: int) -> bytes:
        """The main data of one record."""
        begin = int(self.main[row])
        return self.buffer[begin : begin + int(self.main_bytes[row])].tobytes()


def decode(stretch: Stretch) -> Records:
    """The records of a stretch in columns."""
    words = stretch.buffer.view("<u4")
    start = stretch.starts
    base = start >> 2
    length = words.take(base)
    third = words.take(base + 4)
    walk = _Walk(stretch.buffer, words, start, start + length)
    walk.run()
    return Records(
        buffer=stretch.buffer,
        start=start,
        lsn=stretch.lsns,
        end=stretch.ends,
        length=length,
        xid=words.take(base + 1),
        info=third.astype(np.uint8),
        manager=(third >> np.uint32(8)).astype(np.uint8),
        main=start + length - walk.main_bytes,
        main_bytes=walk.main_bytes,
        references=walk.references(),
        bad=int(np.argmax(walk.bad)) if walk.bad.any() else None,
    )


@dataclass(slots=True)
class _Active:
    """Records whose headers are not read to their end: rows, where the next header is, where the record
    ends, how many bytes of payload the headers so far announce, and the relation named last.
    """

    rows: Ints
    at: Ints
    end: Ints
    payload: Ints
    relation: Words

    def take(self, chosen: Ints) -> _Active:
        return _Active(
            self.rows.take(chosen),
            self.at.take(chosen),
            self.end.take(chosen),
            self.payload.take(chosen),
            self.relation.take(chosen, axis=1),
        )

    def plus(self, other: _Active) -> _Active:
        if not len(other.rows):
            return self
        return _Active(
            np.concatenate((self.rows, other.rows)),
            np.concatenate((self.at, other.at)),
            np.concatenate((self.end, other.end)),
            np.concatenate((self.payload, other.payload)),
            np.concatenate((self.relation, other.relation), axis=1),
        )


class _Walk:
    """Reads the headers of all records at once: the first of each, then the second of those that have one."""

    def __init__(self, buffer: Bytes, words: Words, start: Ints, end: Ints) -> None:
        self._words = words
        # A word at any byte: numpy reads unaligned ones, at twice the price.
        self._any: Words = np.ndarray((max(len(buffer) - 3, 0),), "<u4", buffer, strides=(1,))
        self._last = len(buffer) - 4
        self._start = start
        self._end = end
        self.main_bytes = np.zeros(len(start), np.int64)
        self.bad = np.zeros(len(start), bool)
        self._parts: list[tuple[Ints, Words, Words, Words]] = []

    def run(self) -> None:
        count = len(self._start)
        active = _Active(
            np.arange(count, dtype=np.int64),
            self._start + HEADER_BYTES,
            self._end,
            np.zeros(count, np.int64),
            np.zeros((3, count), np.uint32),
        )
        # A record may consist of its header alone.
        active = self._unfinished(active)
        for part in range(_MOST_PARTS):
            if not len(active.rows):
                return
            active = self._step(active, aligned=part == 0)
        self.bad[active.rows] = True

    def _word(self, at: Ints, aligned: bool) -> Words:
        if aligned:
            return self._words.take(at >> 2)
        return self._any[np.minimum(at, self._last)]

    def _unfinished(self, active: _Active) -> _Active:
        """Those with headers left: once what is left is the payload announced, there are none."""
        left = active.end - active.at - active.payload
        if (left > 0).all():
            return active
        self.bad[active.rows[left < 0]] = True
        return active.take(np.flatnonzero(left > 0))

    def _step(self, active: _Active, *, aligned: bool) -> _Active:
        """Read one header of each; those that have more."""
        head = self._word(active.at, aligned)
        is_block = (head & np.uint32(0xFF)) <= _MOST_BLOCK
        others = np.flatnonzero(~is_block)
        if not len(others):
            return self._blocks(active, head, aligned)
        rest = self._others(active.take(others), head.take(others))
        if len(others) == len(head):
            return rest
        chosen = np.flatnonzero(is_block)
        return self._blocks(active.take(chosen), head.take(chosen), aligned).plus(rest)

    def _others(self, active: _Active, head: Words) -> _Active:
        """Headers of no block: main data ends them; an origin or a top-level xid does not."""
        kind = head & np.uint32(0xFF)
        size = np.where(kind == _SHORT, 2, 5)
        bytes = ((head >> np.uint32(8)) & np.uint32(0xFF)).astype(np.int64)
        ends = kind == _SHORT
        if not ends.all():
            long = np.flatnonzero(kind == _LONG)
            bytes[long] = self._word(active.at[long] + 1, False)
            size[kind == _ORIGIN] = 3
            ends |= kind == _LONG
            self.bad[active.rows[kind < _TOP_XID]] = True
        whole = active.at + size + active.payload + bytes == active.end
        last = ends & whole
        self.bad[active.rows[ends & ~whole]] = True
        self.main_bytes[active.rows[last]] = bytes[last]
        if ends.all():
            return active.take(np.zeros(0, np.int64))
        more = active.take(np.flatnonzero((kind == _ORIGIN) | (kind == _TOP_XID)))
        more.at = more.at + size[(kind == _ORIGIN) | (kind == _TOP_XID)]
        return self._unfinished(more)

    def _blocks(self, active: _Active, head: Words, aligned: bool) -> _Active:
        """Headers of blocks."""
        at = active.at + 4
        payload = active.payload + (head >> np.uint32(16))
        images = np.flatnonzero(head & np.uint32(HAS_IMAGE << 8))
        if len(images):
            aligned = False
            place = at[images]
            payload[images] += self._word(place, False) & np.uint32(0xFFFF)
            # The fifth byte after the block's own header: what the image leaves out, and how it is packed.
            bits = self._word(place + 1, False) >> np.uint32(24)
            hole = ((bits & np.uint32(_HAS_HOLE)) != 0) & ((bits & np.uint32(_COMPRESSED)) != 0)
            at[images] = place + 5 + 2 * hole
        same = (head & np.uint32(SAME_REL << 8)) != 0
        relation = active.relation
        if not same.any():
            relation = np.stack([self._word(at + offset, aligned) for offset in (0, 4, 8)])
            at += 12
        elif not same.all():
            own = np.flatnonzero(~same)
            for row, offset in enumerate((0, 4, 8)):
                relation[row, own] = self._word(at[own] + offset, False)
            at[own] += 12
        block = self._word(at, aligned and not same.any())
        self._parts.append((active.rows, head, relation.copy(), block))
        return self._unfinished(_Active(active.rows, at + 4, active.end, payload, relation))

    def references(self) -> References:
        """All block references: the first of each record, then the second of those that have one."""
        parts = self._parts
        if not parts:
            none = np.zeros(0, np.uint32)
            empty = np.zeros(0, np.uint8)
            return References(np.zeros(0, np.int64), empty, empty, none, none, none, none)
        head = np.concatenate([part[1] for part in parts])
        relation = np.concatenate([part[2] for part in parts], axis=1)
        return References(
            record=np.concatenate([part[0] for part in parts]),
            id=head.astype(np.uint8),
            flags=(head >> np.uint32(8)).astype(np.uint8),
            tablespace=relation[0],
            database=relation[1],
            filenode=relation[2],
            block=np.concatenate([part[3] for part in parts]),
        )
