"""One WAL file on disk: is it the segment its name says, and how far is it filled."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from knockwood.errors import ObjectDamagedError, WrongSystemError
from knockwood.host import files
from knockwood.model.wal import Lsn, WalSegment

# XLogLongPageHeaderData: magic, info, timeline, page address, remaining length, padding, system
# identifier, segment size, block size. In the byte order of the server, which is this machine's.
_LONG_HEADER = struct.Struct("=HHIQIIQII")
_LONG_HEADER_FLAG = 0x0002
# XLogPageHeaderData up to the page address.
_SHORT_HEADER = struct.Struct("=HHIQ")
_PAGE = 8192
_ALIGNMENT = 8


def check_header(segment: WalSegment, path: Path, system_identifier: int) -> None:
    """Raise unless the file begins as this segment of this cluster must.

    WrongSystemError for another cluster's WAL, ObjectDamagedError for anything else. A timeline's
    first segment begins with its parent's pages, so the header's timeline may be a lower one.
    """
    with files.translated(path), path.open("rb") as file:
        head = file.read(_LONG_HEADER.size)
    if len(head) < _LONG_HEADER.size:
        raise ObjectDamagedError("not a WAL segment: shorter than its first page header", where=str(path))
    _magic, info, timeline, address, _left, _pad, system, segment_bytes, _block = _LONG_HEADER.unpack(head)
    if not info & _LONG_HEADER_FLAG:
        raise ObjectDamagedError(f"{segment} does not begin with a long page header", where=str(path))
    if system != system_identifier:
        raise WrongSystemError(
            f"{segment} belongs to cluster {system}, the repository to cluster {system_identifier}",
            where=str(path),
            hint="does archive_command name the right repository? A new cluster needs one of its own",
        )
    in_place = segment_bytes == segment.bytes and address == segment.start.value
    if not in_place or not 0 < timeline <= segment.timeline:
        raise ObjectDamagedError(
            f"{segment} holds WAL of {Lsn(address)} on timeline {timeline}"
            f" in segments of {segment_bytes} bytes, which is not what its name says",
            where=str(path),
            hint="was the file recycled or renamed by hand?",
        )


def content_end(path: Path, segment: WalSegment) -> Lsn:
    """The position after the last byte that is not zero in the pages that belong to the segment.

    WAL is written from the front and every page begins with its own address, so the last page written
    is found by bisection; a server's recycled file holds older pages, with other addresses, after it.
    Trailing zeros of the last record are not seen. The segment's start if nothing is written yet.
    """
    with files.translated(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            pages = min(os.fstat(handle).st_size, segment.bytes) // _PAGE
            low, high = 0, pages  # pages before `low` are written, those from `high` on are not
            while low < high:
                middle = (low + high) // 2
                if _written(handle, segment, middle):
                    low = middle + 1
                else:
                    high = middle
            if low == 0:
                return segment.start
            last = os.pread(handle, _PAGE, (low - 1) * _PAGE)
        finally:
            os.close(handle)
    return segment.start + ((low - 1) * _PAGE + len(last.rstrip(b"\0")))


def _written(handle: int, segment: WalSegment, page: int) -> bool:
    head = os.pread(handle, _SHORT_HEADER.size, page * _PAGE)
    if len(head) < _SHORT_HEADER.size:
        return False
    magic, _info, _timeline, address = _SHORT_HEADER.unpack(head)
    return bool(magic) and address == segment.start.value + page * _PAGE


def rounded_up(lsn: Lsn) -> Lsn:
    """The next position where a record can begin: for a file that nobody writes."""
    return Lsn(-(-lsn.value // _ALIGNMENT) * _ALIGNMENT)


def rounded_down(lsn: Lsn) -> Lsn:
    """The last position where a record can begin: for a file whose last bytes may still be written."""
    return Lsn(lsn.value // _ALIGNMENT * _ALIGNMENT)


def valid_end(path: Path, segment: WalSegment) -> Lsn:
    """How far a file that nobody writes is filled, up to the next possible record."""
    return rounded_up(content_end(path, segment))
