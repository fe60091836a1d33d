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


_Place = tuple[int, bytes, int]
"""The number of a line, what it says of one block, and what the record is taken for."""


class BlockReference(NamedTuple):
    """One block that a record touched. `lsn` is the record's start, `following` the next one's (ints, for
    speed; None where there is no next one).

    `touch` is what the reader of the WAL takes the record for (0: a change); `image` the number of the block
    reference within its record where a full-page image comes with it, else -1.
    """

    lsn: int
    following: int | None
    fork: Fork
    block: int
    touch: int
    image: int


def block_references(
    programs: Programs,
    folder: Path,
    timeline: Timeline,
    start: Lsn,
    end: Lsn | None = None,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    *,
    touch: Callable[[Kind, str], int] = lambda kind, fork: 0,
    touch_managers: frozenset[str] = frozenset(),
    account: Account | None = None,
) -> Iterator[list[BlockReference]]:
    """The references of each stretch of some thousand records: at least the last one to each block, all that
    come with a full-page image, and the one before each of these.

    Others to a block that the same stretch names again may be left out. Those that `touch` (asked only for
    records of `touch_managers`, with the fork) tells from plain changes hide none of these, nor are they hidden
    by them. Those of a stretch are in the order of the WAL. Raises ProgramFailedError where WAL is damaged;
    unwritten zeroes at the tail end it quietly.
    """
    reader = Reader(programs, folder, timeline, segment_bytes, account)
    taker = _Taker(touch, tuple(f"rmgr: {name} ".encode() for name in touch_managers))
    lines: list[bytes] = []
    for block in _blocks(reader, [], start, end):
        # The last line waits: where its record ends is known from the next one.
        lines = [*lines[-1:], *block.splitlines()]
        yield taker.take(lines, len(lines) - 1)
    yield taker.take(lines[-1:], 1)


class _Taker:
    """Takes the references out of lines; what a file is called, and what a kind of record does, is looked up once."""

    def __init__(self, touch: Callable[[Kind, str], int], marks: tuple[bytes, ...]) -> None:
        self._touch = touch
        self._marks = marks
        self._forks: dict[tuple[bytes, bytes], Fork] = {}
        self._touches: dict[tuple[tuple[bytes, bytes], bytes], int] = {}

    def take(self, lines: list[bytes], count: int) -> list[BlockReference]:
        """Those of `lines[:count]`; the line after tells where the last record ends."""
        last: dict[bytes, int] = {}
        others: dict[tuple[int, bytes], int] = {}
        found: list[_Place] = []
        marks = self._marks
        # This loop runs for every record, the rest only for what it leaves.
        for number, line in enumerate(lines[:count]):
            parts = line.split(b"blkref #")
            if len(parts) > 1 and line.startswith(b"rmgr: "):
                kind = _kind(line) if line.startswith(marks) else None
                for part in parts[1:]:
                    touch = self._told(kind, part) if kind else 0
                    if b" FPW" in part:
                        found += _before(part, last)
                        found.append((number, part, touch))
                    elif touch:
                        others[touch, part] = number
                    else:
                        last[part] = number
        found += [(number, part, 0) for part, number in last.items()]
        found += [(number, part, touch) for (touch, part), number in others.items()]
        found.sort()
        return self._references(lines, found)

    def _told(self, kind: tuple[bytes, bytes], part: bytes) -> int:
        fork = part.partition(b" fork ")[2].split(b" ")[0]
        known = self._touches.get((kind, fork))
        if known is None:
            manager, word = kind
            known = self._touch((manager.decode(), word.decode()), fork.decode() or "main")
            self._touches[kind, fork] = known
        return known

    def _references(self, lines: list[bytes], found: list[_Place]) -> list[BlockReference]:
        references: list[BlockReference] = []
        at = -1
        lsn: int | None = None
        following: int | None = None
        for number, part, touch in found:
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
            image = int(words[0][:-1]) if b" FPW" in part else -1
            references.append(BlockReference(lsn, following, fork, block, touch, image))
        return references

    def _fork(self, relation: bytes, name: bytes) -> Fork:
        known = self._forks.get((relation, name))
        if known is None:
            tablespace, database, number = map(int, relation.split(b"/"))
            known = self._forks[relation, name] = (tablespace, database, number, name.decode())
        return known


def _before(part: bytes, last: dict[bytes, int]) -> Iterator[_Place]:
    """What is known of a block so far, taken out of `last`: that is to stay where an image of it comes."""
    place = part[part.index(b" rel ") : part.index(b" FPW")]
    # A record that names more blocks than these makes most of them anew.
    for number in (b"0:", b"1:", b"2:", b"3:"):
        for name in (number + place, number + place + b", "):
            if name in last:
                yield last.pop(name), name, 0


def _kind(line: bytes) -> tuple[bytes, bytes]:
    head = _HEAD.match(line)
    return (head[1], head[2]) if head else (b"", b"")


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


def server_starts(
    programs: Programs,
    folder: Path,
    timeline: Timeline,
    start: Lsn,
    end: Lsn,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    *,
    account: Account | None = None,
) -> Iterator[Lsn]:
    """The records that a server wrote as it stopped, or as its recovery ended: after each, it was started."""
    reader = Reader(programs, folder, timeline, segment_bytes, account)
    for block in _blocks(reader, ["--rmgr=XLOG"], start, end):
        for _, _, _, lsn, text in RECORD.findall(block):
            if text.startswith((b"CHECKPOINT_SHUTDOWN", b"END_OF_RECOVERY")):
                yield Lsn(parse_lsn(lsn))


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
