"""WAL records read by `pg_waldump`, which checks each record's CRC and its link to the one before.

Its output is streamed, so memory does not grow with the WAL. A file that is missing makes pg_waldump
wait for five seconds, so no call here ever lets it run past the files that exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from knockwood.errors import ProgramFailedError
from knockwood.host.privileges import Account
from knockwood.model.proof import Commit
from knockwood.model.wal import DEFAULT_SEGMENT_BYTES, Lsn, Timeline, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.postgres.walreader import Reader, files_end, parse_lsn, records

_COMMIT = re.compile(
    rb"^rmgr: Transaction +len \(rec/tot\): +\d+/ *\d+, tx: +(\d+), lsn: ([0-9A-F]+/[0-9A-F]+),"
    rb" prev [0-9A-F/]+, desc: COMMIT(?:_PREPARED (\d+):)? (\d{4,}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}) UTC",
    re.MULTILINE,
)
_COMMIT_WITH_CHILDREN = re.compile(_COMMIT.pattern + rb"[^\n]*?; subxacts:((?: \d+)+)", re.MULTILINE)
# One that lies in the data directory itself has no path, and its record an empty one.
_TABLESPACE = re.compile(
    rb"^rmgr: Tablespace +[^\n]*?, lsn: ([0-9A-F]+/[0-9A-F]+), prev [0-9A-F/]+, desc: CREATE \d+ \"[^\"\n]",
    re.MULTILINE,
)
_ERROR_AT = re.compile(r"error in WAL record at ([0-9A-F]+/[0-9A-F]+): (.*)")


class WalStop(StrEnum):
    """Why a walk ended: it came to the end asked for, to unwritten zeroes, to a missing file, to damage."""

    COMPLETE = "complete"
    ZEROES = "zeroes"
    MISSING = "missing"
    DAMAGED = "damaged"


RawCommit = tuple[bytes, bytes, bytes, bytes]
"""A commit record as printed, for walks over millions: xid, LSN, the xid of COMMIT PREPARED, and time
(which sorts as text)."""


def raw_lsn(raw: RawCommit) -> int:
    return parse_lsn(raw[1])


def commit_from(raw: RawCommit) -> Commit:
    xid, lsn, prepared, time = raw
    return Commit(int(prepared or xid), Lsn(parse_lsn(lsn)), parse_time(time))


@dataclass(frozen=True, slots=True)
class WalWalk:
    """What a walk found. WAL is valid up to `end_lsn`, which is where the record after would start.

    `end_lsn` is exact where the walk met an error or zeroes; where it is `COMPLETE` it is the end asked
    for, unless the exact end of the last whole record was asked for.
    """

    commits: tuple[Commit, ...]
    end_lsn: Lsn
    stop: WalStop
    error: str | None = None

    @property
    def sound(self) -> bool:
        return self.stop in (WalStop.COMPLETE, WalStop.ZEROES)


def tells_tablespaces(programs: Programs) -> bool:
    """Whether `walk` can tell of tablespaces: before version 15 pg_waldump picks one kind of record only."""
    return programs.major >= 15


def parse_time(text: bytes) -> datetime:
    """A commit time as pg_waldump prints it under TZ=UTC."""
    return datetime.fromisoformat(text.decode()).replace(tzinfo=UTC)


def walk(
    programs: Programs,
    folder: Path,
    timeline: Timeline,
    start: Lsn,
    end: Lsn | None = None,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    *,
    on_commits: Callable[[list[RawCommit]], None] | None = None,
    on_tablespace: Callable[[Lsn], None] | None = None,
    exact_end: bool = False,
    account: Account | None = None,
) -> WalWalk:
    """Check every record from `start` up to `end` (default: as far as segment files follow each other).

    `start` is a record's start or any position before one. The commits are returned, or, where
    `on_commits` is given, handed over in batches and not kept. `on_tablespace` hears of each record that
    makes a tablespace at a path; only where `tells_tablespaces`. With `exact_end` also a walk that ends
    well tells the end of its last whole record, at the price of reading the last stretch again.
    """
    kept: list[Commit] = []
    sink = on_commits or (lambda lines: kept.extend(commit_from(raw) for raw in lines))
    available = files_end(folder, timeline, start, segment_bytes)
    wanted = min(end, available) if end is not None else available
    if wanted <= start:
        name = WalSegment.containing(timeline, start, segment_bytes).name
        return WalWalk((), start, WalStop.MISSING, f"segment {name} is missing")
    last = _LastCommit(sink, start, on_tablespace)
    reader = Reader(programs, folder, timeline, segment_bytes, account)
    managers = ["--rmgr=Transaction", *(["--rmgr=Tablespace"] if on_tablespace else [])]
    error = reader.stream(managers, start, wanted, last.take)
    if error is not None:
        return stopped(reader, error, last.lsn, start, tuple(kept))
    reached = wanted
    if exact_end:
        reached = reader.end_after(last.lsn, wanted)
    if end is not None and available < end:
        name = WalSegment.containing(timeline, available, segment_bytes).name
        return WalWalk(tuple(kept), reached, WalStop.MISSING, f"segment {name} is missing")
    return WalWalk(tuple(kept), reached, WalStop.COMPLETE)


def stopped(reader: Reader, error: str, known: Lsn, start: Lsn, commits: tuple[Commit, ...]) -> WalWalk:
    match = _ERROR_AT.search(error)
    if match is None:
        if "could not find a valid record" not in error:
            raise ProgramFailedError(error.strip(), where="pg_waldump")
        return WalWalk(commits, start, WalStop.DAMAGED, f"no valid record at {start}")
    # With no record read at all the program names 0/0.
    last = Lsn.parse(match[1])
    reached = reader.end_of(max(last, known)) if last.value else start
    if reader.only_zeroes_after(reached):
        return WalWalk(commits, reached, WalStop.ZEROES)
    return WalWalk(commits, reached, WalStop.DAMAGED, match[2])


class _LastCommit:
    """Takes blocks of output, hands the commits on, and remembers where the last one starts."""

    def __init__(
        self,
        sink: Callable[[list[RawCommit]], None],
        start: Lsn,
        on_tablespace: Callable[[Lsn], None] | None = None,
    ) -> None:
        self._sink = sink
        self._on_tablespace = on_tablespace
        self.lsn = start

    def take(self, block: bytes) -> None:
        if self._on_tablespace is not None and b"rmgr: Tablespace" in block:
            for lsn in _TABLESPACE.findall(block):
                self._on_tablespace(Lsn(parse_lsn(lsn)))
        lines: list[RawCommit] = _COMMIT.findall(block)
        if lines:
            self.lsn = Lsn(raw_lsn(lines[-1]))
            self._sink(lines)


def first_record(
    programs: Programs,
    folder: Path,
    timeline: Timeline,
    start: Lsn,
    end: Lsn,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    *,
    account: Account | None = None,
) -> Lsn | None:
    """Where the first valid record at or after `start` begins; None if there is none before `end`."""
    reader = Reader(programs, folder, timeline, segment_bytes, account)
    end = min(end, files_end(folder, timeline, start, segment_bytes))
    found: list[Lsn] = []
    if end > start:
        reader.stream(
            ["--limit=1"], start, end, lambda block: found.extend(Lsn(r[0]) for r in records(block))
        )
    return found[0] if found else None


def commit_of(
    programs: Programs,
    folder: Path,
    timeline: Timeline,
    xid: int,
    start: Lsn,
    end: Lsn,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    *,
    account: Account | None = None,
) -> Commit | None:
    """The commit record of a transaction, or of the one that a subtransaction belonged to."""
    found: list[Commit] = []
    wanted = str(xid).encode()

    def take(block: bytes) -> None:
        if wanted not in block:
            return
        raws: list[RawCommit] = _COMMIT.findall(block)
        found.extend(commit_from(raw) for raw in raws if wanted == (raw[2] or raw[0]))
        for top, lsn, prepared, time, children in _COMMIT_WITH_CHILDREN.findall(block):
            if wanted in children.split():
                found.append(commit_from((top, lsn, prepared, time)))

    reader = Reader(programs, folder, timeline, segment_bytes, account)
    end = min(end, files_end(folder, timeline, start, segment_bytes))
    if end > start:
        reader.stream(["--rmgr=Transaction"], start, end, take)
    return found[0] if found else None
