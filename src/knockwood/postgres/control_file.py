"""global/pg_control as it lies on disk: read whole, and what of it tells which server writes it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from knockwood.errors import HostError
from knockwood.host import clock, files
from knockwood.model import Lsn, Timeline
from knockwood.postgres.connection import Connection, ServerFacts, translated

CONTROL_FILE = "global/pg_control"

IN_PRODUCTION = 6
"""DBState of a primary that runs, or that ended without a shutdown."""

_POLYNOMIAL = 0x82F63B78
_FIXED = 96  # what is read here lies before; the CRC, the structure's last field, behind
_LONGEST = 512  # the structure stays within one sector, so that it is written at once
_TRIES = 100
_LOOKS = 5


@dataclass(frozen=True, slots=True)
class ControlFile:
    """What pg_control said at one moment; `data` is all of it, with the right CRC."""

    data: bytes
    system_identifier: int
    catalog_version: int
    state: int
    redo: Lsn
    timeline: Timeline


def read_control_file(data_directory: Path) -> ControlFile:
    """Read pg_control until its CRC is right; raises HostError where it never is.

    The server writes it in place and readers take no lock, so one may see half of a write.
    """
    path = data_directory / CONTROL_FILE
    for attempt in range(_TRIES):
        with files.translated(path):
            data = path.read_bytes()
        if whole(data):
            return _decode(data)
        if attempt + 1 < _TRIES:
            clock.sleep(0.01)
    raise HostError(
        "the control file's CRC does not match",
        where=str(path),
        hint="is the disk well? `pg_controldata` tells the same; a standby or a restored copy has a good one",
    )


def is_control_file_of(connection: Connection, facts: ServerFacts, data_directory: Path) -> bool:
    """Whether the control file there says what the server says: then it is the server's own.

    That of a copy with the same identifier, or of the primary that the server took the place of, does not. Asked
    again where a checkpoint may have come between; False too from a promotion until its checkpoint is done.
    """
    for _ in range(_LOOKS):
        with translated():
            row = connection.execute(
                "select redo_lsn::text, timeline_id from pg_catalog.pg_control_checkpoint()"
            ).fetchone()
        control = read_control_file(data_directory)
        if control.system_identifier != facts.system_identifier:
            return False
        # Right after a promotion only the timeline that is written to differs from the former primary's.
        told = (Lsn.parse(row[0]), row[1], facts.timeline) if row is not None else None
        if told == (control.redo, control.timeline, control.timeline):
            return True
        clock.sleep(0.1)
    return False


def whole(data: bytes) -> bool:
    """Whether the data is a control file whose CRC matches what stands before it.

    The CRC's place differs between versions: it is the last field, and zeros follow it.
    """
    if len(data) < _LONGEST:
        return False
    filled = len(data.rstrip(b"\0"))
    state = 0xFFFFFFFF
    table = _table()
    for position, byte in enumerate(data[:_LONGEST]):
        if position >= _FIXED and position % 4 == 0 and filled <= position + 4:
            (stored,) = struct.unpack_from("<I", data, position)
            if stored == state ^ 0xFFFFFFFF:
                return True
        state = table[(state ^ byte) & 0xFF] ^ (state >> 8)
    return False


def _decode(data: bytes) -> ControlFile:
    # src/include/catalog/pg_control.h; these places are the same in versions 14 to 18.
    system, _, catalog, state = struct.unpack_from("<QIII", data)
    redo, timeline = struct.unpack_from("<QI", data, 40)
    return ControlFile(data, system, catalog, state, Lsn(redo), Timeline(timeline))


@cache
def _table() -> tuple[int, ...]:
    """CRC-32C of each byte (Castagnoli, reflected)."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)
