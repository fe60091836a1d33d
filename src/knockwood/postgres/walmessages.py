"""Logical messages in WAL (pg_logical_emit_message): written by a commit that changes nothing, and read again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from knockwood.model.wal import DEFAULT_SEGMENT_BYTES, Lsn, Timeline
from knockwood.postgres.binaries import Programs
from knockwood.postgres.connection import Connection, translated
from knockwood.postgres.walreader import RECORD, Reader, parse_lsn

_MESSAGE = re.compile(
    rb'MESSAGE (?:non-)?transactional, prefix "(.*)"; payload \(\d+ bytes\): ([0-9A-F ]*)', re.DOTALL
)


class WalMessage(NamedTuple):
    """A message: the start of its record, and what it says."""

    lsn: Lsn
    payload: bytes


def commit_nothing(connection: Connection, what: str) -> Lsn:
    """Commit a message that says `what`: all WAL before it is on disk then; where its record ends.

    No standby is waited for: one that lags must not hold up a repair. Raises PostgresError.
    """
    with translated(), connection.transaction():
        connection.execute("set local synchronous_commit = local")
        row = connection.execute(
            "select pg_catalog.pg_logical_emit_message(true, 'knockwood', %s)::text", [what]
        ).fetchone()
    assert row is not None
    return Lsn.parse(row[0])


def messages(
    programs: Programs,
    folder: Path,
    timeline: Timeline,
    start: Lsn,
    end: Lsn,
    prefix: str,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
) -> Iterator[WalMessage]:
    """The messages in [start, end) with this prefix, as far as the WAL can be read, in order.

    Whether the transaction of one was committed is not asked.
    """
    reader = Reader(programs, folder, timeline, segment_bytes, None)
    wanted = prefix.encode()
    for block in reader.blocks(["--rmgr=LogicalMessage"], start, end, lambda complaint: None):
        for _, _, _, lsn, text in RECORD.findall(block):
            found = _MESSAGE.match(text)
            if found and found[1] == wanted:
                yield WalMessage(Lsn(parse_lsn(lsn)), bytes.fromhex(found[2].decode()))
