"""Full-page images in WAL: which pages they are of, and the page LSN inside each."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Final, NamedTuple

from knockwood.errors import HostError
from knockwood.host import files
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.postgres.walreader import LONG_HEADER, PAGE_BYTES, SHORT_HEADER, Reader, parse_lsn
from knockwood.postgres.walrefs import Fork

_SIZE: Final = re.compile(rb"len \(rec/tot\): +\d+/ *(\d+), tx: +\d+, lsn: ([0-9A-F]+/[0-9A-F]+),")
_IMAGE_OF: Final = re.compile(
    rb"blkref #(\d+): rel (\d+)/(\d+)/(\d+)(?: fork (\w+))? blk (\d+)(?: \(FPW[^)]*\)| FPW)"
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


class PageImage(NamedTuple):
    """Where an image is: its record's start and size in bytes, and the number of its block reference."""

    lsn: Lsn
    total: int
    number: int


def first_images(reader: Reader, start: Lsn, end: Lsn) -> dict[tuple[Fork, int], PageImage]:
    """The first full-page image of each block in [start, end), as far as the WAL can be read."""
    found: dict[tuple[Fork, int], PageImage] = {}

    def take(block: bytes) -> None:
        for line in block.split(b"\n"):
            if b" FPW" not in line and b"(FPW" not in line:
                continue
            head = _SIZE.search(line)
            if head is None:
                continue
            place = Lsn(parse_lsn(head[2])), int(head[1])
            for number, space, base, node, fork, page in _IMAGE_OF.findall(line):
                key = (int(space), int(base), int(node), (fork or b"main").decode()), int(page)
                found.setdefault(key, PageImage(*place, int(number)))

    reader.stream([], start, end, take)
    return found


class WalImages:
    """Raw WAL in files: the page LSN in the images of its records (access/xloginsert.c)."""

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
