"""How transactions end in the WAL: commits, aborts and prepared ones, decoded from their records.

The layouts are those of xact.h (`xl_xact_commit` and what may follow it, `xl_xact_prepare`), PostgreSQL
15 to 18. Times are microseconds since 2000-01-01 UTC.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from knockwood.errors import ObjectDamagedError

COMMIT, PREPARE, ABORT, COMMIT_PREPARED, ABORT_PREPARED = 0x00, 0x10, 0x20, 0x30, 0x40
OPERATION_MASK = 0x70
HAS_INFO = 0x80

_DATABASE, _SUBXACTS, _FILES, _INVALIDATIONS = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TWO_PHASE, _GID, _STATISTICS = 1 << 4, 1 << 7, 1 << 8
_RELCACHE = -2
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)

File = tuple[int, int, int]
"""Tablespace, database, relation file number."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What a commit or abort record says beside its time.

    `xid` is set where the record's header does not tell (two-phase). `dropped` are files removed with it;
    `relations` the (database, oid) of relations whose definition changed; `catalogs` tells that some
    catalog row did.
    """

    xid: int | None = None
    subxids: tuple[int, ...] = ()
    dropped: tuple[File, ...] = ()
    relations: tuple[tuple[int, int], ...] = ()
    catalogs: bool = False
    gid: str | None = None


def parse_ending(data: bytes, operation: int, major: int) -> Ending:
    """Read the main data of a commit or abort record that has more than its time (`HAS_INFO`).

    Raises ObjectDamagedError where the data ends too early.
    """
    try:
        return _parse(data, operation, major)
    except (struct.error, IndexError, ValueError) as error:
        raise ObjectDamagedError(f"a commit or abort record cannot be read: {error}") from error


def _parse(data: bytes, operation: int, major: int) -> Ending:
    (bits,) = struct.unpack_from("<I", data, 8)
    at = 12
    if bits & _DATABASE:
        at += 8
    subxids: tuple[int, ...] = ()
    if bits & _SUBXACTS:
        (count,) = struct.unpack_from("<i", data, at)
        subxids = struct.unpack_from(f"<{count}I", data, at + 4)
        at += 4 + 4 * count
    dropped: list[File] = []
    if bits & _FILES:
        (count,) = struct.unpack_from("<i", data, at)
        dropped = [struct.unpack_from("<3I", data, at + 4 + 12 * row) for row in range(count)]
        at += 4 + 12 * count
    if bits & _STATISTICS:
        (count,) = struct.unpack_from("<i", data, at)
        # Objects were given 64-bit numbers in version 18.
        at += 4 + (16 if major >= 18 else 12) * count
    relations: set[tuple[int, int]] = set()
    catalogs = False
    if bits & _INVALIDATIONS and operation in (COMMIT, COMMIT_PREPARED):
        (count,) = struct.unpack_from("<i", data, at)
        for row in range(count):
            kind, database, number = struct.unpack_from("<b3xII", data, at + 4 + 16 * row)
            catalogs |= kind >= 0
            if kind == _RELCACHE:
                relations.add((database, number))
        at += 4 + 16 * count
    xid = None
    if bits & _TWO_PHASE:
        (xid,) = struct.unpack_from("<I", data, at)
        at += 4
    gid = None
    if bits & _GID:
        gid = data[at : data.index(b"\0", at)].decode(errors="replace")
    return Ending(xid, subxids, tuple(dropped), tuple(sorted(relations)), catalogs, gid)


def parse_prepare(data: bytes) -> tuple[int, str]:
    """The xid and the name of a prepared transaction. Raises ObjectDamagedError."""
    try:
        (xid,) = struct.unpack_from("<I", data, 8)
        (length,) = struct.unpack_from("<H", data, 54)
        return xid, data[72 : 72 + length].rstrip(b"\0").decode(errors="replace")
    except struct.error as error:
        raise ObjectDamagedError(f"a prepare record cannot be read: {error}") from error


def moment(microseconds: int) -> datetime:
    """A time of the WAL."""
    return _EPOCH + timedelta(microseconds=microseconds)


def microseconds(time: datetime) -> int:
    """A time as the WAL has it."""
    return (time - _EPOCH) // timedelta(microseconds=1)
