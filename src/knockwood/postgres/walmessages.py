"""Logical messages in WAL (pg_logical_emit_message), by their prefix."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from knockwood.model.wal import DEFAULT_SEGMENT_BYTES, Lsn, Timeline
from knockwood.postgres.binaries import Programs
from knockwood.postgres.walreader import RECORD, Reader, parse_lsn

_MESSAGE = re.compile(
    rb'MESSAGE (?:non-)?transactional, prefix "(.*)"; payload \(\d+ bytes\): ([0-9A-F ]*)', re.DOTALL
)


class WalMessage(NamedTuple):
    """A message: the start of its record, and what it says."""

    lsn: Lsn
    payload: bytes


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
