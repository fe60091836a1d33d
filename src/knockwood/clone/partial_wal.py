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
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from knockwood.clone.pieces import Piece
from knockwood.clone.spool import runs
from knockwood.errors import ProgramFailedError, RecoveryFailedError, RefusedError
from knockwood.host import files
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.postgres.pages import relation_file
from knockwood.postgres.walreader import (
    LONG_HEADER,
    PAGE_BYTES,
    SHORT_HEADER,
    Reader,
    files_end,
    parse_lsn,
)

Locator = tuple[int, int, int]
"""Tablespace, database, file number of a relation; all its forks and segments."""

_DEFAULT_SPACE, _GLOBAL_SPACE = 1663, 1664

# src/include/access/rmgrlist.h: those whose records change the blocks they name and nothing else.
_MANAGERS: Final = {
    b"XLOG": 0,
    b"Storage": 2,
    b"Standby": 8,
    b"Heap2": 9,
    b"Heap": 10,
    b"Btree": 11,
    b"Hash": 12,
    b"Gin": 13,
    b"Gist": 14,
    b"Sequence": 15,
    b"SPGist": 16,
    b"BRIN": 17,
    b"Generic": 20,
}
_NOOP_INFO: Final = 0x20
_HEADER = struct.Struct("<IIQBBHI")  # xl_tot_len, xl_xid, xl_prev, xl_info, xl_rmid, padding, xl_crc

_LINE = re.compile(
    rb"^rmgr: (\w+) +len \(rec/tot\): +\d+/ *(\d+), tx: +\d+, lsn: ([0-9A-F]+/[0-9A-F]+), prev [0-9A-F/]+,"
    rb" desc: ([^\n]*)",
    re.MULTILINE,
)
_REFERENCE = re.compile(rb"blkref #\d+: rel (\d+/\d+/\d+) ")
_BLOCK = re.compile(
    rb"blkref #(\d+): rel (\d+/\d+/\d+) (?:fork (\w+) )?blk (\d+)( FPW(?! for WAL verification))?"
)
_DROPPED = re.compile(rb"; rels:((?: [^\s;]+)+)")
_REMOVED = re.compile(rb"DROP dir((?: \d+/\d+)+)")
_COPIES = re.compile(rb"copy dir \S+ to (\S+)")


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


def _locator(name: bytes) -> Locator:
    space, database, number = map(int, name.split(b"/"))
    return space, database, number


@dataclass(slots=True)
class WalFilter:
    """Takes out of a spool what concerns `absent` relations, and learns which relations the WAL makes.

    `present` are the relations whose files the clone has from the backup. Calls of `apply` go forward;
    one may begin again in segments that were fetched anew.
    """

    programs: Programs
    folder: Path
    segment_bytes: int
    present: frozenset[Locator]
    absent: frozenset[Locator]
    pieces: Mapping[Locator, Piece] = field(default_factory=dict)
    """Present relations of which the clone has only some blocks."""
    options: tuple[str, ...] = ()
    """Filters for pg_waldump, where only some records are looked at."""
    created: dict[Locator, int] = field(default_factory=dict)
    """Relations made by the WAL, whole in it, with the place of the record that makes them."""
    unexplained: dict[Locator, int] = field(default_factory=dict)
    """Relations that the WAL changes and that neither the backup has nor the WAL makes."""
    silenced: int = 0
    scanned: int = 0
    reached: Lsn | None = None
    """Where the last record that was looked at starts."""

    def apply(self, segments: Collection[WalSegment], start: Lsn, target: Lsn | None) -> None:
        """Look at every record of the spool's `segments` from `start` on, and silence what has to be.

        All of them, not only those up to the record at `target`: a later goal may lie in the same segment.
        Raises RefusedError where the WAL does what a partial clone cannot follow, ProgramFailedError or
        RecoveryFailedError where it cannot be read up to the target.
        """
        complaint: str | None = None
        for first, last in runs(segments):
            low = max(first.start, start)
            if low < last.end:
                complaint = self._run(first.timeline, low, last.end)
        if target is not None and (self.reached is None or self.reached < target):
            raise ProgramFailedError(
                f"the WAL can be read only to {self.reached}, not to {target}: {complaint or 'it ends'}",
                where=str(self.folder),
            )

    def whole(self, relation: Locator) -> bool:
        """Whether a relation that the clone has on disk is all there."""
        return relation in self.present or relation in self.created

    def _run(self, timeline: Timeline, start: Lsn, end: Lsn) -> str | None:
        """One stretch of segments; what pg_waldump complained of at its end, or None."""
        reader = Reader(self.programs, self.folder, timeline, self.segment_bytes, None)
        end = min(end, files_end(self.folder, timeline, start, self.segment_bytes))
        complaints: list[str] = []
        cache: dict[bytes, Locator] = {}
        position = b""
        with closing(Patcher(self.folder, timeline, self.segment_bytes)) as patcher:
            for block in reader.blocks(self.options, start, end, complaints.append):
                for rmgr, size, position, text in _LINE.findall(block):
                    self.scanned += 1
                    manager = _MANAGERS.get(rmgr)
                    if manager is None:
                        self._learn(rmgr, text)
                    elif self._concerns_absent(rmgr, text, position, cache):
                        patcher.silence(parse_lsn(position), int(size), manager)
                        self.silenced += 1
        if position:
            self.reached = Lsn(parse_lsn(position))
        return complaints[0] if complaints else None

    def _concerns_absent(self, rmgr: bytes, text: bytes, lsn: bytes, cache: dict[bytes, Locator]) -> bool:
        if rmgr == b"Storage":
            return self._storage(text, parse_lsn(lsn))
        if rmgr == b"Standby":
            # A transaction in progress at the target (such as the DROP that is to be undone) would lock
            # its relations for whoever reads here, and nobody can end it. Nobody reads during replay.
            return text.startswith(b"LOCK")
        if rmgr == b"XLOG" and not text.startswith(b"FPI"):
            return False
        names = _REFERENCE.findall(text)
        absent = bool(names)
        for name in names:
            relation = cache.get(name)
            if relation is None:
                relation = cache[name] = _locator(name)
            if relation in self.pieces:
                return self._beside_pieces(text, parse_lsn(lsn), alone=len(names) == 1)
            if relation in self.present:
                absent = False
            elif relation not in self.absent or (
                relation in self.created and parse_lsn(lsn) >= self.created[relation]
            ):
                absent = False
                if relation not in self.created:
                    self.unexplained.setdefault(relation, parse_lsn(lsn))
        return absent

    def _beside_pieces(self, text: bytes, lsn: int, *, alone: bool) -> bool:
        """Whether a record that names a relation in pieces names nothing that is here; if it does, redo will
        look at the other blocks that it names as well. `alone`: it names one block."""
        if alone and (match := _BLOCK.search(text)) is not None:
            only = self.pieces[_locator(match[2])]
            return match[3] is not None or not only.holds(("", int(match[4])), lsn)
        references = [
            (_locator(name), (fork.decode(), int(block)), number, bool(image))
            for number, name, fork, block, image in _BLOCK.findall(text)
        ]
        here = False
        for relation, spot, _, _ in references:
            piece = self.pieces.get(relation)
            if piece is None:
                here |= relation not in self.absent or self.created.get(relation, lsn + 1) <= lsn
            else:
                here |= spot[0] == "" and piece.holds(spot, lsn)
        if not here:
            return True
        init = b"+INIT " in text
        for relation, spot, number, image in references:
            piece = self.pieces.get(relation)
            if piece is not None and not piece.holds(spot, lsn):
                piece.beside(spot, lsn, image or (init and number == b"0"))
        return False

    def _storage(self, text: bytes, lsn: int) -> bool:
        """Storage CREATE tells that a relation is whole in the WAL; TRUNCATE would make an empty file."""
        verb, _, rest = text.partition(b" ")
        path = rest.split(b" ", 1)[0].decode()
        relation = locator_of(path)
        if relation is None:
            return False
        if relation in self.pieces:
            raise RefusedError(f"the WAL truncates {path}, of which only some blocks were to be fetched")
        if verb == b"CREATE":
            if relation not in self.present:
                self.created.setdefault(relation, lsn)
                self.unexplained.pop(relation, None)
            return False
        return relation in self.absent and not (relation in self.created and lsn >= self.created[relation])

    def _learn(self, rmgr: bytes, text: bytes) -> None:
        if rmgr == b"Transaction" and (dropped := _DROPPED.search(text)):
            for path in dropped[1].split():
                relation = locator_of(path.decode())
                if relation is not None:
                    self.unexplained.pop(relation, None)
        elif rmgr == b"Database" and (removed := _REMOVED.match(text)):
            gone = {tuple(map(int, pair.split(b"/"))) for pair in removed[1].split()}
            self.unexplained = {r: lsn for r, lsn in self.unexplained.items() if r[:2] not in gone}
        elif rmgr == b"Database" and (copied := _COPIES.search(text)):
            raise RefusedError(
                f"the WAL copies a whole database by its files (to {copied[1].decode()}),"
                " which a clone of some relations does not have"
            )


def lock_filter(programs: Programs, folder: Path, segment_bytes: int) -> WalFilter:
    """A filter that silences nothing but the locks of transactions in progress, for a whole clone."""
    return WalFilter(programs, folder, segment_bytes, frozenset(), frozenset(), options=("--rmgr=Standby",))


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
                f"the record at {Lsn(lsn)} is not the one that pg_waldump printed", where=str(self._folder)
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
