"""Records about relations that a partial clone leaves out, made no-ops in the clone's own copy of the WAL.

Replay would otherwise bring such a relation's file back with holes, which read as empty pages: silently
wrong. A record that touches only relations left out becomes XLOG_NOOP: its two bytes of resource manager
and kind change, and its CRC with them; length, transaction and link to the record before stay. What is
left of the WAL speaks only of whole relations, and PostgreSQL's own check for missing pages stays on.
"""

from __future__ import annotations

import functools
import mmap
import os
import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from knockwood.clone.pieces import Piece
from knockwood.clone.spool import new_tablespace, runs
from knockwood.errors import ProgramFailedError, RecoveryFailedError, RefusedError
from knockwood.host import files
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.postgres.pages import relation_file
from knockwood.postgres.walendings import COMMIT, COMMIT_PREPARED, HAS_INFO, OPERATION_MASK, parse_ending
from knockwood.postgres.walpages import Bytes, Ints, Tail, Words, read_segment
from knockwood.postgres.walreader import LONG_HEADER, PAGE_BYTES, SHORT_HEADER, Reader, files_end, parse_lsn
from knockwood.postgres.walrecords import (
    DBASE,
    HAS_IMAGE,
    HEAP,
    HEAP2,
    SMGR,
    STANDBY,
    TABLESPACE,
    WILL_INIT,
    XACT,
    XLOG,
    Records,
    References,
    decode,
)

Flags = NDArray[np.bool_]

Locator = tuple[int, int, int]
"""Tablespace, database, file number of a relation; all its forks and segments."""

_DEFAULT_SPACE, _GLOBAL_SPACE = 1663, 1664

# src/include/access/rmgrlist.h, those whose records change the blocks they name and nothing else: XLOG (images),
# Heap2, Heap, Btree, Hash, Gin, Gist, Sequence, SPGist, BRIN, Generic.
_CHANGE_BLOCKS: Final = np.array([XLOG, HEAP2, HEAP, 11, 12, 13, 14, 15, 16, 17, 20], np.uint8)
_IMAGES: Final = np.array([0xA0, 0xB0], np.uint8)  # XLOG_FPI_FOR_HINT, XLOG_FPI
_KIND: Final = 0xF0
_CREATE, _TRUNCATE, _LOCK = 0x10, 0x20, 0x00
_COPY_FILES, _DROP_DATABASE = 0x00, 0x20
_MAKE_TABLESPACE: Final = 0x00
_FORKS: Final = ("", "fsm", "vm", "init")
_NOOP_INFO: Final = 0x20
_HEADER = struct.Struct("<IIQBBHI")  # xl_tot_len, xl_xid, xl_prev, xl_info, xl_rmid, padding, xl_crc
_CHANGED_AT: Final = 16  # where xl_info begins

_LOCKS = re.compile(
    rb"^rmgr: Standby +len \(rec/tot\): +\d+/ *(\d+), tx: +\d+, lsn: ([0-9A-F]+/[0-9A-F]+), prev [0-9A-F/]+,"
    rb" desc: LOCK",
    re.MULTILINE,
)


def locator_of(path: str) -> Locator | None:
    """The relation whose file lies at `path` (relative to the data directory), or None for other files."""
    found = relation_file(path)
    if found is None:
        return None
    words = found.relation_path.split("/")
    if words[0] == "global":
        return (_GLOBAL_SPACE, 0, found.node)
    if words[0] == "base":
        return (_DEFAULT_SPACE, int(words[1]), found.node)
    return (int(words[1]), int(words[3]), found.node)


@dataclass(slots=True)
class WalFilter:
    """Takes out of a spool what concerns `absent` relations, and learns which relations the WAL makes.

    `present` are the relations whose files the clone has from the backup. Calls of `apply` go forward;
    one may begin again in segments that were fetched anew.
    """

    folder: Path
    segment_bytes: int
    present: frozenset[Locator]
    absent: frozenset[Locator]
    pieces: Mapping[Locator, Piece] = field(default_factory=dict)
    """Present relations of which the clone has only some blocks."""
    created: dict[Locator, int] = field(default_factory=dict)
    """Relations made by the WAL, whole in it, with the place of the record that makes them."""
    unexplained: dict[Locator, int] = field(default_factory=dict)
    """Relations that the WAL changes and that neither the backup has nor the WAL makes."""
    tablespaces: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Tablespaces made at a path, by the record: oid and path."""
    silenced: int = 0
    scanned: int = 0
    reached: Lsn | None = None
    """Where the last record that was looked at starts."""

    def apply(self, segments: Iterable[WalSegment], start: Lsn, target: Lsn | None) -> None:
        """Look at every record of the spool's `segments`, given in order, from `start` on, and silence what has to be.

        All of them, not only those up to the record at `target`: a later goal may lie in the same segment.
        Raises RefusedError where the WAL does what a partial clone cannot follow, ProgramFailedError or
        RecoveryFailedError where it cannot be read up to the target.
        """
        complaint: str | None = None
        tail: Tail | None = None
        previous: WalSegment | None = None
        for segment in segments:
            # One that ends there is read for the record that it leaves to the next.
            if segment.end < start:
                continue
            if previous is None or previous.number + 1 != segment.number:
                tail = None
            complaint, tail = self._segment(segment, tail, start)
            previous = segment
            if complaint is not None:
                break
        if target is not None and (self.reached is None or self.reached < target):
            raise ProgramFailedError(
                f"the WAL can be read only to {self.reached}, not to {target}: {complaint or 'it ends'}",
                where=str(self.folder),
            )

    def require_no_tablespace(self, end: Lsn) -> None:
        """Raise RefusedError where WAL before or at `end` makes a tablespace at a path: replay would write there."""
        for lsn, (oid, path) in self.tablespaces.items():
            if Lsn(lsn) <= end:
                raise new_tablespace(oid, str(Lsn(lsn)), path)

    def has_seen(self, target: Lsn | None) -> bool:
        """Whether every record up to the one at a target was looked at."""
        return target is not None and self.reached is not None and target <= self.reached

    def whole(self, relation: Locator) -> bool:
        """Whether a relation that the clone has on disk is all there."""
        return relation in self.present or relation in self.created

    def _segment(
        self, segment: WalSegment, before: Tail | None, start: Lsn
    ) -> tuple[str | None, Tail | None]:
        """One segment; why its WAL breaks off (None: it does not), and what it leaves to the next."""
        path = self.folder / segment.name
        with files.translated(path):
            raw = np.memmap(path, np.uint8, "r+")
        found = read_segment(raw, segment, before)
        if before is not None and before.lsn is not None and segment.end > start:
            # What changes of the header of a record that crosses the border may lie behind it.
            start = min(start, Lsn(before.lsn))
        with closing(Patcher(self.folder, segment.timeline, self.segment_bytes)) as patcher:
            for stretch in found.stretches:
                records = decode(stretch)
                if records.bad is not None:
                    where = Lsn(int(records.lsn[records.bad]))
                    raise RecoveryFailedError(f"the record at {where} contradicts itself", where=str(path))
                rows = self.judge(records, start, found.major or 0)
                self.silenced += len(rows)
                _silence(raw, segment, records, rows, patcher)
        return found.broken, found.tail

    def judge(self, records: Records, start: Lsn, major: int) -> Ints:
        """The rows of the records from `start` on that are to be silenced; learns from all of them."""
        count = len(records)
        fresh = records.lsn >= start.value
        self.scanned += int(fresh.sum())
        if count:
            self.reached = max(self.reached or Lsn(0), Lsn(int(records.lsn[-1])))
        kind = records.info & np.uint8(_KIND)
        for row in np.flatnonzero(fresh & (records.manager == DBASE) & (kind == _COPY_FILES)):
            _refuse_copy(records.data(int(row)))
        for row in np.flatnonzero(fresh & (records.manager == TABLESPACE) & (kind == _MAKE_TABLESPACE)):
            self._tablespace(records.data(int(row)), int(records.lsn[row]))
        silent = (records.manager == STANDBY) & (kind == _LOCK)
        # Whoever reads would wait for a transaction in progress (such as the DROP that is to be undone),
        # which nobody can end. Nobody reads during replay.
        for row in np.flatnonzero(fresh & (records.manager == SMGR)):
            silent[row] = self._storage(records.data(int(row)), int(kind[row]), int(records.lsn[row]))
        silent |= self._of_absent(records, fresh)
        if self.unexplained:
            self._forget_dropped(records, np.flatnonzero(fresh), kind, major)
        return np.flatnonzero(silent & fresh)

    def _of_absent(self, records: Records, fresh: Flags) -> Flags:
        """Which records name blocks, and none that is here."""
        refs = records.references
        named = np.zeros(len(records), bool)
        named[refs.record] = True
        relations, code = _relations(refs)
        lsn = records.lsn[refs.record]
        here = np.zeros(len(code), bool)
        for number, relation in enumerate(relations):
            if relation not in self.pieces:
                mine = np.flatnonzero(code == number)
                here[mine] = self._is_here(relation, lsn[mine], fresh[refs.record[mine]])
        keep = np.zeros(len(records), bool)
        keep[refs.record[here]] = True
        for relation, piece in self.pieces.items():
            if relation in relations:
                mine = np.flatnonzero((code == relations.index(relation)) & fresh[refs.record])
                _keep_pieces(piece, refs, mine, lsn[mine], keep)
        changes = np.isin(records.manager, _CHANGE_BLOCKS)
        changes &= (records.manager != XLOG) | np.isin(records.info & np.uint8(_KIND), _IMAGES)
        silent: Flags = named & ~keep & changes
        return silent

    def _is_here(self, relation: Locator, lsn: Ints, fresh: Flags) -> Flags:
        """For references to one relation, whether it is on the clone at that point."""
        if relation in self.present:
            return np.ones(len(lsn), bool)
        made = self.created.get(relation)
        if relation in self.absent:
            found: Flags = lsn >= made if made is not None else np.zeros(len(lsn), bool)
            return found
        if made is None and fresh.any():
            self.unexplained.setdefault(relation, int(lsn[fresh].min()))
        return np.ones(len(lsn), bool)

    def _tablespace(self, data: bytes, lsn: int) -> None:
        # One within the data directory has no path.
        if path := os.fsdecode(data[4:].partition(b"\0")[0]):
            self.tablespaces[lsn] = (int.from_bytes(data[:4], "little"), path)

    def _storage(self, data: bytes, kind: int, lsn: int) -> bool:
        """Storage CREATE tells that a relation is whole in the WAL; TRUNCATE would make an empty file."""
        if kind == _CREATE:
            relation = struct.unpack_from("<III", data)
            if relation not in self.present:
                self.created.setdefault(relation, lsn)
                self.unexplained.pop(relation, None)
            return False
        if kind != _TRUNCATE:
            return False
        relation = struct.unpack_from("<III", data, 4)
        if relation in self.pieces:
            raise RefusedError("the WAL truncates a table of which only some blocks were to be fetched")
        return relation in self.absent and not (relation in self.created and lsn >= self.created[relation])

    def _forget_dropped(self, records: Records, rows: Ints, kind: Bytes, major: int) -> None:
        """What a commit or a dropped database takes away need not be explained."""
        for row in rows[records.manager[rows] == XACT]:
            for relation in _dropped(int(records.info[row]), records.data(int(row)), major):
                self.unexplained.pop(relation, None)
        for row in rows[(records.manager[rows] == DBASE) & (kind[rows] == _DROP_DATABASE)]:
            data = records.data(int(row))
            database, count = struct.unpack_from("<II", data)
            gone = {(space, database) for space in struct.unpack_from(f"<{count}I", data, 8)}
            self.unexplained = {r: lsn for r, lsn in self.unexplained.items() if r[:2] not in gone}


def _relations(refs: References) -> tuple[list[Locator], Ints]:
    """The relations that references name, and of each reference the number of its relation."""
    pairs, first = _numbered((refs.database.astype(np.uint64) << np.uint64(32)) | refs.filenode)
    spaces, second = _numbered(refs.tablespace)
    found, code = _numbered(first * max(len(spaces), 1) + second)
    relations = []
    for each in found.tolist():
        both = int(pairs[each // max(len(spaces), 1)])
        relations.append((int(spaces[each % max(len(spaces), 1)]), both >> 32, both & 0xFFFF_FFFF))
    return relations, code


def _numbered(values: NDArray[Any]) -> tuple[NDArray[Any], Ints]:
    """The different values, ascending, and of each one its place among them. They are few: then looking each one up
    takes half as long as the sorting that np.unique does for the same."""
    different = np.unique(values)
    return different, np.searchsorted(different, values)


def _keep_pieces(piece: Piece, refs: References, mine: Ints, lsn: Ints, keep: Flags) -> None:
    """Mark the records to be replayed that name a block which is here, and learn what else they name.

    What one of them makes whole is here from then on: so once more, until nothing is new.
    """
    record, block, fork = refs.record[mine], refs.block[mine], refs.fork[mine]
    whole = (refs.flags[mine] & np.uint8(HAS_IMAGE | WILL_INIT)) != 0
    held = (fork == 0) & np.isin(block, np.array(sorted(piece.blocks), np.uint32))
    seen = np.zeros(len(mine), bool)
    while True:
        here = held | ((fork == 0) & _joined(piece, block, lsn))
        keep[record[here]] = True
        beside = np.flatnonzero(keep[record] & ~here & ~seen)
        if not len(beside):
            return
        seen[beside] = True
        for at in beside:
            spot = (_FORKS[int(fork[at])], int(block[at]))
            if not piece.holds(spot, int(lsn[at])):
                piece.beside(spot, int(lsn[at]), bool(whole[at]))


def _joined(piece: Piece, block: Words, lsn: Ints) -> Flags:
    """Which references are to blocks of the main fork that the WAL had made whole by then."""
    made = sorted((number, since) for (fork, number), since in piece.joined.items() if fork == "")
    if not made:
        return np.zeros(len(block), bool)
    blocks = np.array([number for number, _ in made], np.int64)
    since = np.array([lsn for _, lsn in made], np.int64)
    place = np.minimum(np.searchsorted(blocks, block), len(blocks) - 1)
    found: Flags = (blocks[place] == block) & (since[place] <= lsn)
    return found


def _dropped(info: int, data: bytes, major: int) -> tuple[Locator, ...]:
    """The relations that a commit record drops."""
    operation = info & OPERATION_MASK
    if operation not in (COMMIT, COMMIT_PREPARED) or not info & HAS_INFO:
        return ()
    return parse_ending(data, operation, major).dropped


def _refuse_copy(data: bytes) -> None:
    database, space = struct.unpack_from("<II", data)
    raise RefusedError(
        f"the WAL copies a whole database by its files (to {space}/{database}),"
        " which a clone of some relations does not have"
    )


def _silence(raw: Bytes, segment: WalSegment, records: Records, rows: Ints, patcher: Patcher) -> None:
    """Make records no-ops: where what changes of their headers lies in the segment, of all at once.

    Kind, manager and CRC are the last eight bytes of a header; records begin at multiples of eight, so that no border
    of pages lies within these.
    """
    lsn = records.lsn[rows]
    at = lsn + _CHANGED_AT - segment.start.value
    at[lsn % PAGE_BYTES + _CHANGED_AT >= PAGE_BYTES] += SHORT_HEADER
    near = (lsn >= segment.start.value) & (at < segment.bytes)
    for row in rows[~near]:
        patcher.silence(int(records.lsn[row]), int(records.length[row]), int(records.manager[row]))
    rows, at = rows[near], at[near]
    kind = records.info[rows].astype(np.int64) << 8 | records.manager[rows]
    changes = np.zeros(1 << 16, np.uint32)
    for each in np.flatnonzero(np.bincount(kind)).tolist():
        changes[each] = crc_change((each >> 8) ^ _NOOP_INFO, each & 0xFF)
    if len(rows):
        raw.view("<u4")[(at + 4) >> 2] ^= changes[kind]
        raw.view("<u2")[at >> 1] = _NOOP_INFO


@dataclass(slots=True)
class LockFilter:
    """Silences the locks of transactions in progress in a whole clone's spool, of any version."""

    programs: Programs
    folder: Path
    segment_bytes: int
    reached: Lsn | None = None
    """Where the last record that was looked at starts."""

    def apply(self, segments: Collection[WalSegment], start: Lsn) -> None:
        """Look at the spool's `segments` from `start` on, as far as they can be read."""
        for first, last in runs(segments):
            low, high = max(first.start, start), last.end
            if low >= high:
                continue
            high = min(high, files_end(self.folder, first.timeline, low, self.segment_bytes))
            reader = Reader(self.programs, self.folder, first.timeline, self.segment_bytes, None)
            with closing(Patcher(self.folder, first.timeline, self.segment_bytes)) as patcher:
                for block in reader.blocks(("--rmgr=Standby",), low, high, lambda _: None):
                    for size, lsn in _LOCKS.findall(block):
                        self.reached = Lsn(parse_lsn(lsn))
                        patcher.silence(self.reached.value, int(size), STANDBY)


class Patcher:
    """Turns records of one timeline's segments in a folder into no-ops."""

    def __init__(self, folder: Path, timeline: Timeline, segment_bytes: int) -> None:
        self._folder = folder
        self._timeline = timeline
        self._bytes = segment_bytes
        self._open: dict[int, mmap.mmap] = {}
        self._stack = ExitStack()

    def silence(self, lsn: int, size: int, manager: int) -> None:
        """Make the record at `lsn` an XLOG_NOOP; RecoveryFailedError unless it is of `size` and `manager`."""
        if PAGE_BYTES - lsn % PAGE_BYTES >= _HEADER.size:
            # Nearly all of them lie in one page; this runs for each record that is silenced.
            segment, offset = self._segment(lsn), lsn % self._bytes
            _HEADER.pack_into(
                segment, offset, *self._silenced(_HEADER.unpack_from(segment, offset), lsn, size, manager)
            )
            return
        places = list(self._places(lsn))
        header = bytes(self._segment(place)[place % self._bytes] for place in places)
        changed = _HEADER.pack(*self._silenced(_HEADER.unpack(header), lsn, size, manager))
        for place, new in zip(places, changed, strict=True):
            self._segment(place)[place % self._bytes] = new

    def _silenced(self, header: tuple[int, ...], lsn: int, size: int, manager: int) -> tuple[int, ...]:
        length, xid, previous, info, found, padding, crc = header
        if length != size or found != manager:
            raise RecoveryFailedError(
                f"the record at {Lsn(lsn)} is not the one that was read before", where=str(self._folder)
            )
        return length, xid, previous, _NOOP_INFO, 0, padding, crc ^ crc_change(info ^ _NOOP_INFO, manager)

    def close(self) -> None:
        self._stack.close()
        self._open.clear()

    def _places(self, lsn: int) -> Iterator[int]:
        """Where the bytes of a record's header are: page headers may lie in between."""
        position = lsn
        for _ in range(_HEADER.size):
            if position % PAGE_BYTES == 0:
                position += LONG_HEADER if position % self._bytes == 0 else SHORT_HEADER
            yield position
            position += 1

    def _segment(self, position: int) -> mmap.mmap:
        number = position // self._bytes
        if number not in self._open:
            path = self._folder / WalSegment(self._timeline, number, self._bytes).name
            if len(self._open) > 1:  # a header lies in two segments at most
                self.close()
            with files.translated(path):
                handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    self._open[number] = self._stack.enter_context(mmap.mmap(handle, self._bytes))
                finally:
                    os.close(handle)
        return self._open[number]


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ 0x82F63B78 if value & 1 else value >> 1
        table.append(value)
    return table


_CRC: Final = _crc_table()


@functools.cache
def crc_change(info: int, manager: int) -> int:
    """What changes in a record's CRC-32C when xl_info changes by `info` and xl_rmid by `manager` (xor).

    A CRC is linear, and the header comes last in a record's: after these two bytes only two more (of
    padding) follow, so the rest of the record need not be read. (xloginsert.c, XLogRecordAssemble.)
    """
    state = 0
    for byte in (info, manager, 0, 0):
        state = _CRC[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state
