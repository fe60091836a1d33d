"""Full-page images in WAL: which pages they are of, the page LSN inside each, and the pages themselves."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Final, NamedTuple

from knockwood.errors import HostError
from knockwood.host import files
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.postgres.walcompression import lz4_head, pglz_head, zstd_head
from knockwood.postgres.walreader import LONG_HEADER, PAGE_BYTES, SHORT_HEADER, Reader, parse_lsn
from knockwood.postgres.walrefs import Fork

_LSN: Final = re.compile(rb", lsn: ([0-9A-F]+/[0-9A-F]+),")
_IMAGE_OF: Final = re.compile(
    rb"blkref #(\d+): rel (\d+)/(\d+)/(\d+)(?: fork (\w+))? blk (\d+)(?: \(FPW[^)]*\)| FPW)"
)

# access/xlogrecord.h
_RECORD_HEADER: Final = 24
_HAS_IMAGE: Final = 0x10
_SAME_RELATION: Final = 0x80
_HAS_HOLE: Final = 0x01
_APPLY: Final = 0x02
_METHODS: Final = {0x04: pglz_head, 0x08: lz4_head, 0x10: zstd_head}
_COMPRESSED: Final = 0x1C
_MAX_BLOCK_ID: Final = 32
_HEADERS: Final = 1024
"""More than the headers of a record take: 33 blocks of at most 27 bytes each."""


class _Place(NamedTuple):
    """An image in a record: where its bytes are, how they are packed, and the hole of zeros that was left out."""

    offset: int
    length: int
    info: int
    hole_at: int
    hole_bytes: int


class PageImage(NamedTuple):
    """Where an image is: its record's start, and the number of its block reference."""

    lsn: Lsn
    number: int


def first_images(reader: Reader, start: Lsn, end: Lsn) -> dict[tuple[Fork, int], PageImage]:
    """The first full-page image of each block in [start, end), as far as the WAL can be read."""
    found: dict[tuple[Fork, int], PageImage] = {}

    def take(block: bytes) -> None:
        for line in block.split(b"\n"):
            if b" FPW" not in line and b"(FPW" not in line:
                continue
            head = _LSN.search(line)
            if head is None:
                continue
            lsn = Lsn(parse_lsn(head[1]))
            for number, space, base, node, fork, page in _IMAGE_OF.findall(line):
                key = (int(space), int(base), int(node), (fork or b"main").decode()), int(page)
                found.setdefault(key, PageImage(lsn, int(number)))

    reader.stream([], start, end, take)
    return found


class WalImages:
    """Raw WAL in files: the page LSN in the images of its records (access/xloginsert.c). Of a record only the bytes
    that are needed are read; the last file stays open until `close`."""

    def __init__(self, folder: Path, timeline: Timeline, segment_bytes: int) -> None:
        self._folder = folder
        self._timeline = timeline
        self.segment_bytes = segment_bytes
        self._open: tuple[int, int] | None = None

    def __enter__(self) -> WalImages:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def image_lsn(self, lsn: Lsn, number: int) -> Lsn | None:
        """The page LSN of the image of the block reference `number` of the record at `lsn`; None where replay does
        not use it, or it is compressed by a method that is not known.

        Raises HostError where the WAL is not there or ends too early.
        """
        place, head = self._place(lsn, number)
        data = self._data(lsn, place, 8, head) if place is not None else b""
        if len(data) < 8:
            return None
        high, low = struct.unpack("<II", data)
        return Lsn(high << 32 | low)

    def page(self, lsn: Lsn, number: int, end: Lsn) -> bytes | None:
        """The page as replay of the record at `lsn`, which ends at `end`, leaves it, but for its checksum; None where
        `image_lsn` is (xlogreader.c, RestoreBlockImage)."""
        place, head = self._place(lsn, number)
        if place is None:
            return None
        kept = PAGE_BYTES - place.hole_bytes
        data = self._data(lsn, place, kept, head)
        if len(data) != kept or not any(data):
            return None
        page = data[: place.hole_at] + bytes(place.hole_bytes) + data[place.hole_at :]
        return struct.pack("<II", end.value >> 32, end.value & 0xFFFF_FFFF) + page[8:]

    def _place(self, lsn: Lsn, number: int) -> tuple[_Place | None, bytes]:
        """Where the image is that replay uses, and the record's first bytes."""
        # Mostly one read will do: up to the end of the WAL page there is no header of one in between.
        head = self._pread(lsn.value, min(_HEADERS, PAGE_BYTES - lsn.value % PAGE_BYTES))
        total = int.from_bytes(head[:4], "little")
        if len(head) < min(_HEADERS, total):
            head = self._bytes(lsn, 0, min(_HEADERS, total))
        place = _image(head, number, total)
        return (place if place is not None and place.info & _APPLY else None), head

    def _data(self, lsn: Lsn, place: _Place, wanted: int, head: bytes) -> bytes:
        """The first bytes of an image, unpacked; nothing where the method is not known."""
        compressed = place.info & _COMPRESSED
        needed = place.length if compressed else min(wanted, place.length)
        end = place.offset + needed
        data = head[place.offset : end] if end <= len(head) else self._bytes(lsn, place.offset, needed)
        if compressed:
            return _METHODS[compressed](data, wanted) if compressed in _METHODS else b""
        return data

    def _bytes(self, lsn: Lsn, skip: int, count: int) -> bytes:
        """Bytes of a record, which the headers of the pages that it crosses interrupt."""
        pieces: list[bytes] = []
        position = lsn.value
        while count:
            room = PAGE_BYTES - position % PAGE_BYTES
            if skip < room:
                wanted = min(room - skip, count)
                piece = self._pread(position + skip, wanted)
                if len(piece) != wanted:
                    raise HostError("the WAL file is too short", where=str(self._folder))
                pieces.append(piece)
                count -= wanted
            skip = max(skip - room, 0)
            position += room
            position += LONG_HEADER if position % self.segment_bytes == 0 else SHORT_HEADER
        return b"".join(pieces)

    def _pread(self, position: int, count: int) -> bytes:
        """What the file that holds a position has there: less than asked for where it ends."""
        number, offset = divmod(position, self.segment_bytes)
        if self._open is None or self._open[0] != number:
            self.close()
            path = self._folder / WalSegment(self._timeline, number, self.segment_bytes).name
            with files.translated(path):
                self._open = number, os.open(path, os.O_RDONLY)
        try:
            return os.pread(self._open[1], count, offset)
        except OSError as error:
            raise HostError(f"WAL cannot be read: {error.strerror}", where=str(self._folder)) from error


def _image(record: bytes, number: int, total: int) -> _Place | None:
    """Where the image of a block reference is (xlogreader.c, DecodeXLogRecord).

    Headers come first, then the data of all of them: what is left of `total` bytes shows where the headers end.
    """
    at, data_bytes = _RECORD_HEADER, 0
    images: dict[int, _Place] = {}
    while total - at > data_bytes:
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
            image_bytes, hole_at, info = struct.unpack_from("<HHB", record, at)
            at += 5
            hole = PAGE_BYTES - image_bytes if info & _HAS_HOLE else 0
            if info & _COMPRESSED and info & _HAS_HOLE:
                (hole,) = struct.unpack_from("<H", record, at)
                at += 2
            images[identity] = _Place(data_bytes, image_bytes, info, hole_at, hole)
            data_bytes += image_bytes
        data_bytes += length
        at += 4 if flags & _SAME_RELATION else 16
    if number not in images:
        return None
    place = images[number]
    return place._replace(offset=at + place.offset)


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
