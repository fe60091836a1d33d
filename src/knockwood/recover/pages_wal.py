"""Every WAL record that names some blocks of one relation, and the page LSN inside each full-page image."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from knockwood.errors import HostError, ProgramFailedError
from knockwood.host import files
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.postgres.waldump import stopped
from knockwood.postgres.walreader import (
    LONG_HEADER,
    PAGE_BYTES,
    SHORT_HEADER,
    Reader,
    files_end,
    parse_lsn,
    record_end,
)
from knockwood.recover.plan.pages import BlockRecord

Node = tuple[int, int, int]
"""Tablespace, database, relation file number, as WAL names a relation."""

_LINE: Final = re.compile(
    rb"^rmgr: (\w+) +len \(rec/tot\): +\d+/ *(\d+), tx: +(\d+), lsn: ([0-9A-F]+/[0-9A-F]+), prev [0-9A-F/]+,"
    rb" desc: ([^\s,]+)([^\n]*)",
    re.MULTILINE,
)
_REFERENCE: Final = re.compile(
    rb"blkref #(\d+): rel (\d+)/(\d+)/(\d+)(?: fork (\w+))? blk (\d+)((?: \(FPW[^)]*\)| FPW)?)"
)

# access/xlogrecord.h
_RECORD_HEADER: Final = 24
_HAS_IMAGE: Final = 0x10
_SAME_RELATION: Final = 0x80
_HAS_HOLE: Final = 0x01
_APPLY: Final = 0x02
_PGLZ: Final = 0x04
_OTHER_COMPRESSION: Final = 0x18
_MAX_BLOCK_ID: Final = 32


def block_records(
    programs: Programs,
    folder: Path,
    timeline: Timeline,
    start: Lsn,
    end: Lsn,
    segment_bytes: int,
    node: Node,
    blocks: Collection[int],
    fork: str = "main",
) -> dict[int, list[BlockRecord]]:
    """The records in [start, end) that name the blocks, in order; each block asked for has its list.

    Raises ProgramFailedError where WAL is missing or damaged: then nothing is proven.
    """
    found: dict[int, list[BlockRecord]] = {block: [] for block in blocks}
    if end <= start or not blocks:
        return found
    available = files_end(folder, timeline, start, segment_bytes)
    if available < end:
        name = WalSegment.containing(timeline, available, segment_bytes).name
        raise ProgramFailedError(f"segment {name} is missing", where=str(folder))
    reader = Reader(programs, folder, timeline, segment_bytes, None)
    taker = _Taker(_Files(folder, timeline, segment_bytes), node, fork, found)
    options = [f"--relation={'/'.join(map(str, node))}", f"--fork={fork}"]
    if len(blocks) == 1:
        options.append(f"--block={min(blocks)}")
    complaint = reader.stream(options, start, end, taker.take)
    if complaint is not None and not stopped(reader, complaint, start, start, ()).sound:
        raise ProgramFailedError(f"WAL cannot be read: {complaint.strip()}", where=str(folder))
    return found


class _Taker:
    def __init__(self, wal: _Files, node: Node, fork: str, found: Mapping[int, list[BlockRecord]]) -> None:
        self._wal = wal
        self._node = tuple(str(part).encode() for part in node)
        self._fork = fork.encode()
        self._found = found

    def take(self, text: bytes) -> None:
        for rmgr, size, xid, lsn, kind, rest in _LINE.findall(text):
            for number, *node, fork, block, image in _REFERENCE.findall(rest):
                mine = tuple(node) == self._node and (fork or b"main") == self._fork
                records = self._found.get(int(block)) if mine else None
                if records is None:
                    continue
                start, total = Lsn(parse_lsn(lsn)), int(size)
                has_image = bool(image)
                inner = self._wal.image_lsn(start, total, int(number)) if has_image else None
                records.append(
                    BlockRecord(
                        start,
                        record_end(start, total, self._wal.segment_bytes),
                        f"{rmgr.decode()} {kind.decode()}",
                        has_image,
                        inner,
                        int(xid),
                    )
                )


class _Files:
    """Raw WAL: the bytes of records, and the page LSN in their images (access/xloginsert.c)."""

    def __init__(self, folder: Path, timeline: Timeline, segment_bytes: int) -> None:
        self._folder = folder
        self._timeline = timeline
        self.segment_bytes = segment_bytes

    def image_lsn(self, lsn: Lsn, total: int, number: int) -> Lsn | None:
        """The page LSN of the image of the record's block reference `number`; None where it is compressed
        by a method that is not read here, or replay does not use it."""
        record = self._record(lsn, total)
        place = _image(record, number)
        if place is None:
            return None
        offset, length, info = place
        if not info & _APPLY or info & _OTHER_COMPRESSION:
            return None
        data = record[offset : offset + length]
        head = _pglz_head(data, 8) if info & _PGLZ else data[:8]
        if len(head) < 8:
            return None
        high, low = struct.unpack("<II", head)
        return Lsn(high << 32 | low)

    def _record(self, lsn: Lsn, total: int) -> bytes:
        """A record's bytes without the headers of the pages that it crosses."""
        pieces: list[bytes] = []
        position, left = lsn.value, total
        while left:
            segment = WalSegment.containing(self._timeline, Lsn(position), self.segment_bytes)
            room = min(PAGE_BYTES - position % PAGE_BYTES, left)
            path = self._folder / segment.name
            with files.translated(path), path.open("rb") as file:
                piece = os.pread(file.fileno(), room, position - segment.start.value)
            if len(piece) != room:
                raise HostError("the WAL file is too short", where=str(path))
            pieces.append(piece)
            position, left = position + room, left - room
            if left:
                position += LONG_HEADER if position % self.segment_bytes == 0 else SHORT_HEADER
        return b"".join(pieces)


def _image(record: bytes, number: int) -> tuple[int, int, int] | None:
    """Offset, length and flags of the image of a block reference (xlogreader.c, DecodeXLogRecord).

    Headers come first, then the data of all of them: what is left shows where the headers end.
    """
    at, data_bytes = _RECORD_HEADER, 0
    images: dict[int, tuple[int, int, int]] = {}
    while len(record) - at > data_bytes:
        identity = record[at]
        if identity > _MAX_BLOCK_ID:
            size, more = _other_header(record, at)
            if not size:
                return None
            at, data_bytes = at + size, data_bytes + more
            continue
        _, flags, length = struct.unpack_from("<BBH", record, at)
        at += 4
        if flags & _HAS_IMAGE:
            image_bytes, _, info = struct.unpack_from("<HHB", record, at)
            at += 5 + (2 if info & (_PGLZ | _OTHER_COMPRESSION) and info & _HAS_HOLE else 0)
            images[identity] = (data_bytes, image_bytes, info)
            data_bytes += image_bytes
        data_bytes += length
        at += 4 if flags & _SAME_RELATION else 16
    if number not in images:
        return None
    offset, length, info = images[number]
    return at + offset, length, info


def _other_header(record: bytes, at: int) -> tuple[int, int]:
    """The size of a header that is no block's, and how much data it announces; 0 for one that is unknown."""
    match record[at]:
        case 255:
            return 2, record[at + 1]
        case 254:
            (length,) = struct.unpack_from("<I", record, at + 1)
            return 5, length
        case 253:  # replication origin
            return 3, 0
        case 252:  # top-level transaction
            return 5, 0
    return 0, 0


def _pglz_head(data: bytes, wanted: int) -> bytes:
    """The first bytes of what pglz compressed (common/pg_lzcompress.c)."""
    out = bytearray()
    at = 0
    while at < len(data) and len(out) < wanted:
        control = data[at]
        at += 1
        for bit in range(8):
            if at >= len(data) or len(out) >= wanted:
                break
            if control >> bit & 1:
                length = (data[at] & 0x0F) + 3
                back = (data[at] & 0xF0) << 4 | data[at + 1]
                at += 2
                if length == 18:
                    length += data[at]
                    at += 1
                if not 0 < back <= len(out):
                    return b""
                for _ in range(length):
                    out.append(out[-back])
            else:
                out.append(data[at])
                at += 1
    return bytes(out[:wanted])
