"""What WAL records touch: blocks, and relations' files that come, go and shrink. Streamed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from knockwood.errors import ProgramFailedError
from knockwood.host.privileges import Account
from knockwood.model.wal import DEFAULT_SEGMENT_BYTES, Lsn, Timeline, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.postgres.waldump import stopped
from knockwood.postgres.walreader import RECORD, Reader, files_end, parse_lsn

_HEAD = re.compile(rb"rmgr: (\w+) [^\n]*?, lsn: [0-9A-F]+/[0-9A-F]+, prev [0-9A-F/]+, desc: ([^\s,]+)")
_TRUNCATE = re.compile(rb"TRUNCATE (\S+) to (\d+) blocks")
_DROPPED = re.compile(rb"; rels:((?: [^\s;]+)+)")


Fork = tuple[int, int, int, str]
"""Tablespace, database, relation file number, fork (main, fsm, vm, init)."""

Kind = tuple[str, str]
"""A record's resource manager and the first word of its description (`INSERT+INIT`)."""


class BlockReference(NamedTuple):
    """One block that a record touched. `lsn` is the record's start, `following` the next one's (ints, for
    speed; None where there is no next one).

    `image` tells a bare full-page image; `apart` that the record is of a kind told apart.
    """

    lsn: int
    following: int | None
    fork: Fork
    block: int
    image: bool
    apart: bool


def block_references(
    programs: Programs,
    folder: Path,
    timeline: Timeline,
    start: Lsn,
    end: Lsn | None = None,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    *,
    apart: Callable[[Kind, str], bool] = lambda kind, fork: False,
    apart_managers: frozenset[str] = frozenset(),
    account: Account | None = None,
) -> Iterator[list[BlockReference]]:
    """The references of each stretch of some thousand records: at least the last one to each block.

    Earlier ones to a block that the same stretch names again may be left out. References for which `apart`
    is true (asked only for records of `apart_managers`, with the fork) hide none of the others, nor are
    they hidden by them. Those of a stretch are in the order of the WAL. Raises ProgramFailedError where WAL
    is damaged; unwritten zeroes at the tail end it quietly.
    """
    reader = Reader(programs, folder, timeline, segment_bytes, account)
    marks = tuple(f"rmgr: {name} ".encode() for name in apart_managers)
    taker = _Taker(apart, marks)
    lines: list[bytes] = []
    for block in _blocks(reader, [], start, end):
        # The last line waits: where its record ends is known from the next one.
        lines = [*lines[-1:], *block.splitlines()]
        yield taker.take(lines, len(lines) - 1)
    yield taker.take(lines[-1:], 1)


class _Taker:
    """Takes the references out of lines; what a file is called is looked up once."""

    def __init__(self, apart: Callable[[Kind, str], bool], marks: tuple[bytes, ...]) -> None:
        self._apart = apart
        self._marks = marks
        self._forks: dict[tuple[bytes, bytes], Fork] = {}

    def take(self, lines: list[bytes], count: int) -> list[BlockReference]:
        """Those of `lines[:count]`; the line after tells where the last record ends."""
        last: dict[bytes, int] = {}
        others: dict[bytes, int] = {}
        marks = self._marks
        # This loop runs for every record, the rest only for what it leaves.
        for number, line in enumerate(lines[:count]):
            parts = line.split(b"blkref #")
            if len(parts) > 1 and line.startswith(b"rmgr: "):
                if line.startswith(marks):
                    kind = _kind(line)
                    for part in parts[1:]:
                        fork = part.partition(b" fork ")[2].split(b" ")[0].decode() or "main"
                        (others if self._apart(kind, fork) else last)[part] = number
                else:
                    for part in parts[1:]:
                        last[part] = number
        found = [(number, part, False) for part, number in last.items()]
        found += [(number, part, True) for part, number in others.items()]
        found.sort()
        return self._references(lines, found)

    def _references(self, lines: list[bytes], found: list[tuple[int, bytes, bool]]) -> list[BlockReference]:
        references: list[BlockReference] = []
        at = -1
        lsn: int | None = None
        following: int | None = None
        for number, part, apart in found:
            if number != at:
                # The next record is likely to have been asked for already.
                lsn = following if following is not None and number == at + 1 else _lsn(lines[number])
                following = _lsn(lines[number + 1]) if number + 1 < len(lines) else None
                at = number
            if lsn is None:
                continue
            # `0: rel 1663/5/16384 fork vm blk 7 FPW`
            words = part.split(b" ")
            plain = words[3] == b"blk"
            fork = self._fork(words[2], b"main" if plain else words[4])
            block = int(words[4 if plain else 6].rstrip(b",;"))
            image = lines[number].startswith(b"rmgr: XLOG ")
            references.append(BlockReference(lsn, following, fork, block, image, apart))
        return references

    def _fork(self, relation: bytes, name: bytes) -> Fork:
        known = self._forks.get((relation, name))
        if known is None:
            tablespace, database, number = map(int, relation.split(b"/"))
            known = self._forks[relation, name] = (tablespace, database, number, name.decode())
        return known


def _kind(line: bytes) -> Kind:
    head = _HEAD.match(line)
    return (head[1].decode(), head[2].decode()) if head else ("", "")


def _lsn(line: bytes) -> int | None:
    # A description can hold a line break (the name of a prepared transaction): then the next line is no head.
    begin = line.find(b", lsn: ")
    return parse_lsn(line[begin + 7 : line.find(b",", begin + 7)]) if begin > 0 else None


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
