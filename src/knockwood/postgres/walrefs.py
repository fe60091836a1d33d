"""What WAL records touch: blocks, and relations' files that come, go and shrink. Streamed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from knockwood.errors import ProgramFailedError
from knockwood.host.privileges import Account
from knockwood.model.wal import DEFAULT_SEGMENT_BYTES, Lsn, Timeline, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.postgres.waldump import stopped
from knockwood.postgres.walreader import RECORD, Reader, files_end, parse_lsn

_BLOCK_REFERENCE = re.compile(
    rb"^rmgr: (\w+) [^\n]*?lsn: ([0-9A-F]+/[0-9A-F]+), prev [0-9A-F/]+, desc: (\S+)"
    rb"|blkref #\d+: rel (\d+)/(\d+)/(\d+)(?: fork (\w+))? blk (\d+)",
    re.MULTILINE,
)
_TRUNCATE = re.compile(rb"TRUNCATE (\S+) to (\d+) blocks")
_DROPPED = re.compile(rb"; rels:((?: [^\s;]+)+)")


class BlockReference(NamedTuple):
    """One block that a record touched. `lsn` is the record's start (an int, for speed).

    `fork` is main, fsm, vm or init; `operation` the first word of the description (`INSERT+INIT`).
    """

    lsn: int
    tablespace: int
    database: int
    relation: int
    fork: str
    block: int
    rmgr: str
    operation: str


def block_references(
    programs: Programs,
    folder: Path,
    timeline: Timeline,
    start: Lsn,
    end: Lsn | None = None,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    *,
    account: Account | None = None,
) -> Iterator[BlockReference]:
    """Every block reference of every record, in order. Raises ProgramFailedError where WAL is damaged.

    Unwritten zeroes at the tail end it quietly; anything else that cannot be read does not.
    """
    reader = Reader(programs, folder, timeline, segment_bytes, account)
    lsn, rmgr, operation = 0, "", ""
    for block in _blocks(reader, [], start, end):
        for kind, position, word, spc, db, rel, fork, number in _BLOCK_REFERENCE.findall(block):
            if kind:
                lsn, rmgr, operation = parse_lsn(position), kind.decode(), word.rstrip(b",").decode()
            else:
                yield BlockReference(
                    lsn, int(spc), int(db), int(rel), fork.decode() or "main", int(number), rmgr, operation
                )


class RelationEvent(NamedTuple):
    """A relation's files came, went or shrank: `kind` is create, drop or truncate.

    `path` is relative to the data directory (`base/5/16384`); `blocks` is the length left by a truncation.
    """

    lsn: int
    xid: int
    kind: str
    path: str
    blocks: int | None


def relation_events(
    programs: Programs,
    folder: Path,
    timeline: Timeline,
    start: Lsn,
    end: Lsn | None = None,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    *,
    account: Account | None = None,
) -> Iterator[RelationEvent]:
    """Storage created and truncated, and dropped by commits and aborts, in order of the WAL."""
    reader = Reader(programs, folder, timeline, segment_bytes, account)
    # One --rmgr only before 15: then everything is printed and filtered here.
    filters = ["--rmgr=Transaction", "--rmgr=Storage"] if programs.major >= 15 else []
    for block in _blocks(reader, filters, start, end):
        for rmgr, _, xid, lsn, text in RECORD.findall(block):
            if rmgr == b"Storage":
                yield from _storage_event(parse_lsn(lsn), int(xid), text)
            elif rmgr == b"Transaction" and (dropped := _DROPPED.search(text)):
                for path in dropped[1].split():
                    yield RelationEvent(parse_lsn(lsn), int(xid), "drop", path.decode(), None)


def _storage_event(lsn: int, xid: int, text: bytes) -> Iterator[RelationEvent]:
    if match := _TRUNCATE.match(text):
        yield RelationEvent(lsn, xid, "truncate", match[1].decode(), int(match[2]))
    elif text.startswith(b"CREATE "):
        yield RelationEvent(lsn, xid, "create", text.split()[1].decode(), None)


def _blocks(reader: Reader, options: Iterable[str], start: Lsn, end: Lsn | None) -> Iterator[bytes]:
    available = files_end(reader.folder, reader.timeline, start, reader.segment_bytes)
    if available == start or (end is not None and available < end):
        name = WalSegment.containing(reader.timeline, available, reader.segment_bytes).name
        raise ProgramFailedError(f"segment {name} is missing", where=str(reader.folder))

    def complained(complaint: str) -> None:
        ended = stopped(reader, complaint, start, start, ())
        if not ended.sound:
            raise ProgramFailedError(f"WAL is damaged at {ended.end_lsn}: {ended.error}")

    yield from reader.blocks(options, start, end or available, complained)
