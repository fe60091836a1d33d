"""Read archived WAL record by record: fetch in parallel, check with pg_waldump, keep little on disk.

Segments are fetched into a private temporary folder a chunk ahead of the walk. The walk of a chunk
begins at a record of the chunk before, so that records and prev-links across segments are checked, and
a run begins with the segment before it, also where that belongs to the parent timeline.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

from knockwood.errors import HostError, ObjectDamagedError, ObjectMissingError, WrongSystemError
from knockwood.host import files
from knockwood.host.processes import ProcessIdentity
from knockwood.model.wal import Lsn, Timeline, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.postgres.waldump import (
    RawCommit,
    WalStop,
    WalWalk,
    commit_from,
    first_record,
    parse_time,
    raw_lsn,
    tells_tablespaces,
    walk,
)
from knockwood.postgres.walreader import PAGE_BYTES
from knockwood.repository.archive import WalArchive
from knockwood.repository.repository import Repository
from knockwood.repository.route import Break, SegmentFacts
from knockwood.repository.walfile import check_header

CHUNK_BYTES = 96 * 1024 * 1024
"""WAL walked at once; at most two chunks and a segment are on disk."""

_FETCHERS = 2
_MOST_BREAKS = 20
_NAMED = re.compile(r"segment ([0-9A-F]{24})")
_WORKPLACE = re.compile(r"(\d+)-(\d+\.\d+)-[0-9a-f]+\Z")


@dataclass(frozen=True, slots=True)
class Piece:
    """A file of the archive: a segment, its full object name, and for a partial where its bytes end."""

    segment: WalSegment
    object: str
    end: Lsn | None = None


@dataclass(slots=True)
class Kept:
    """WAL files that were read, kept in `folder` under their own names for whoever needs them next.

    `room` is how many more bytes may lie there. `sources` has the partial object of each, "" for a whole one.
    """

    folder: Path
    room: int
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def reading(self) -> Path:
        """Where files lie while they are read, on the same disk."""
        return self.folder / "reading"

    def take(self, piece: Piece, path: Path) -> bool:
        """Move a file here if there is room; whether it was."""
        name = piece.segment.name
        if name not in self.sources:
            if self.room < piece.segment.bytes:
                return False
            self.room -= piece.segment.bytes
        path.replace(self.folder / name)
        whole = piece.end is None
        self.sources[name] = "" if whole else piece.object.partition(".zst")[0]
        return True


@dataclass(slots=True)
class RunResult:
    """What walking a run showed. `end` is the exact end of the last whole record, None if none was read."""

    facts: dict[WalSegment, SegmentFacts] = field(default_factory=dict)
    breaks: list[Break] = field(default_factory=list)
    end: Lsn | None = None
    bytes: int = 0


@contextmanager
def workplace(keep: Kept | None = None) -> Iterator[Path]:
    """A private temporary folder, removed at the end; those of dead processes are removed first."""
    if keep is not None:
        with files.translated(keep.folder):
            keep.reading.mkdir(mode=0o700)
        try:
            yield keep.reading
        finally:
            shutil.rmtree(keep.reading, ignore_errors=True)
        return
    shelf = Path(tempfile.gettempdir()) / f"knockwood-wal-{os.getuid()}"
    with files.translated(shelf):
        shelf.mkdir(mode=0o700, exist_ok=True)
        if shelf.stat().st_uid != os.getuid():
            raise HostError("folder belongs to somebody else", where=str(shelf))
        for left in shelf.iterdir():
            match = _WORKPLACE.match(left.name)
            if match and not ProcessIdentity(int(match[1]), float(match[2])).alive():
                shutil.rmtree(left, ignore_errors=True)
        own = ProcessIdentity.own()
        folder = shelf / f"{own.pid}-{own.started:.2f}-{secrets.token_hex(4)}"
        folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetch(repository: Repository, piece: Piece, into: Path) -> None:
    """Write a file of the archive to `into`, zeroes after a partial's end. Not durable: for reading only.

    Raises ObjectDamagedError, ObjectMissingError, WrongSystemError, WrongKeyError.
    """
    try:
        _write(repository, piece, into)
    except ObjectMissingError:
        if piece.end is None:
            raise
        # A receiver replaces a partial segment by a longer one, or the whole: the same bytes are there.
        WalArchive(repository).fetch_partial(piece.object, into)
    check_header(piece.segment, into, repository.header.system_identifier)


def _write(repository: Repository, piece: Piece, into: Path) -> None:
    segment = piece.segment
    wanted = (piece.end or segment.end) - segment.start
    size = 0
    with files.translated(into), into.open("wb", buffering=0) as file:
        for chunk in repository.read(piece.object):
            size += file.write(chunk)
        if size != wanted:
            raise ObjectDamagedError(f"holds {size} bytes instead of {wanted}", where=piece.object)
        file.truncate(segment.bytes)


def runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Cut sorted pieces where the timeline changes or a number is skipped."""
    run: list[Piece] = []
    for piece in pieces:
        last = run[-1].segment if run else None
        if last is not None and (last.timeline, last.number + 1) != (
            piece.segment.timeline,
            piece.segment.number,
        ):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def walk_run(
    repository: Repository,
    programs: Programs,
    run: Sequence[Piece],
    before: Piece | None,
    folder: Path,
    keep: Kept | None = None,
) -> RunResult:
    """Walk consecutive pieces of one timeline. `before` is the piece just before them, for the prev-link.

    Its facts are told again too, since a record may have begun in it. Files that `keep` has room for move
    there once they were read, the others are removed. Raises WrongKeyError and what storage raises; damage
    is returned, not raised.
    """
    walker = _Walker(repository, programs, run[0].segment.timeline, folder, keep)
    pieces = [before, *run] if before is not None else list(run)
    size = max(1, CHUNK_BYTES // run[0].segment.bytes)
    chunks = [pieces[i : i + size] for i in range(0, len(pieces), size)]
    with ThreadPoolExecutor(_FETCHERS, thread_name_prefix="fetch-wal") as pool:
        try:
            coming = walker.order(pool, chunks[0])
            for index, chunk in enumerate(chunks):
                ready, coming = coming, []
                if index + 1 < len(chunks):
                    coming = walker.order(pool, chunks[index + 1])
                walker.take(chunk, ready, last=index + 1 == len(chunks))
        finally:
            pool.shutdown(cancel_futures=True)
            walker.clear()
    return walker.result


class _Walker:
    """The state of one run: what is on disk, where the next walk begins, what was found."""

    def __init__(
        self,
        repository: Repository,
        programs: Programs,
        timeline: Timeline,
        folder: Path,
        keep: Kept | None,
    ) -> None:
        self.result = RunResult()
        self._repository = repository
        self._programs = programs
        self._timeline = timeline
        self._folder = folder
        self._keep = keep
        self._pieces: dict[int, Piece] = {}
        self._start: Lsn | None = None
        self._tally = _Tally(repository.header.segment_bytes, tells_tablespaces(programs))

    def order(self, pool: ThreadPoolExecutor, chunk: Sequence[Piece]) -> list[Future[None]]:
        return [
            pool.submit(fetch, self._repository, piece, self._path(piece.segment.number)) for piece in chunk
        ]

    def _path(self, number: int) -> Path:
        # A parent's segment too gets this timeline's name: pg_waldump follows one timeline.
        size = self._repository.header.segment_bytes
        return self._folder / WalSegment(self._timeline, number, size).name

    def take(self, chunk: Sequence[Piece], ready: Sequence[Future[None]], *, last: bool) -> None:
        """Walk the pieces of a chunk, cut where one cannot be read."""
        span: list[Piece] = []
        for piece, future in zip(chunk, ready, strict=True):
            self._pieces[piece.segment.number] = piece
            try:
                future.result()
            except (ObjectDamagedError, ObjectMissingError, WrongSystemError) as error:
                self._unreadable(piece, span, error.what)
                span = []
            else:
                self.result.bytes += piece.segment.bytes
                span.append(piece)
        if span:
            self._span(span, exact=last)
            self._carry(span[-1])
        for number in sorted(self._pieces):
            self._tally.known(number)
        self.result.facts = {
            self._pieces[number].segment: facts.of(self._pieces[number].segment)
            for number, facts in self._tally.segments.items()
            if number in self._pieces and self._pieces[number].segment.timeline == self._timeline
        }

    def _unreadable(self, piece: Piece, span: Sequence[Piece], reason: str) -> None:
        at = piece.segment.start
        if span:
            at = self._span(span, exact=True)
        elif self._start is not None:
            at = self._end_before(at)
        self._start = None
        self._path(piece.segment.number).unlink(missing_ok=True)
        self.result.breaks.append(
            Break(piece.segment.timeline, at, None, piece.segment, piece.object, reason)
        )

    def _end_before(self, end: Lsn) -> Lsn:
        assert self._start is not None
        size = self._repository.header.segment_bytes
        return walk(
            self._programs, self._folder, self._timeline, self._start, end, size,
            on_commits=lambda _: None, exact_end=True,
        ).end_lsn  # fmt: skip

    def _span(self, span: Sequence[Piece], *, exact: bool) -> Lsn:
        """Walk whole pieces that follow each other; the end of the last whole record (if exact)."""
        size = self._repository.header.segment_bytes
        start = self._start or span[0].segment.start
        end = span[-1].end or span[-1].segment.end
        breaks = 0
        while True:
            done = walk(
                self._programs, self._folder, self._timeline, start, end, size,
                on_commits=self._tally.take, on_tablespace=self._tally.on_tablespace, exact_end=exact,
            )  # fmt: skip
            if done.stop is WalStop.COMPLETE:
                self.result.end = done.end_lsn
                return done.end_lsn
            breaks += 1
            resumes = self._resume(done, end, skip=breaks > _MOST_BREAKS)
            self._broken(done, resumes)
            if resumes is None:
                self.result.end = done.end_lsn
                return done.end_lsn
            start = resumes

    def _broken(self, done: WalWalk, resumes: Lsn | None) -> None:
        size = self._repository.header.segment_bytes
        named = _NAMED.search(done.error or "")
        number = done.end_lsn.value // size
        if named and (other := WalSegment.parse(named[1], size).number) in self._pieces:
            number = other
        piece = self._pieces[number]
        reason = done.error or f"nothing but zeroes from {done.end_lsn} on, where WAL should follow"
        self.result.breaks.append(
            Break(piece.segment.timeline, done.end_lsn, resumes, piece.segment, piece.object, reason)
        )

    def _resume(self, done: WalWalk, end: Lsn, *, skip: bool) -> Lsn | None:
        """The first valid record after damage: tried at page after page, in growing steps."""
        size = self._repository.header.segment_bytes
        position, step = (done.end_lsn.value // PAGE_BYTES + 1) * PAGE_BYTES, PAGE_BYTES
        if skip:
            position = (done.end_lsn.value // size + 1) * size
        while position < end.value:
            found = first_record(self._programs, self._folder, self._timeline, Lsn(position), end, size)
            if found is not None and found > done.end_lsn:
                return found
            border = (position // size + 1) * size
            position, step = (
                (border, PAGE_BYTES) if position + step >= border else (position + step, step * 2)
            )
        return None

    def _carry(self, last: Piece) -> None:
        """Choose where the next chunk begins, and drop the files before."""
        size = self._repository.header.segment_bytes
        segment = WalSegment(self._timeline, last.segment.number, size)
        end = last.end or last.segment.end
        if any(b.at >= segment.start and b.resumes is None for b in self.result.breaks):
            self._start = None
        elif self._tally.last >= segment.start:
            self._start = self._tally.last
        elif first_record(self._programs, self._folder, self._timeline, segment.start, end, size):
            self._start = segment.start
        elif self._start is None:  # one record fills the segment: begin where it began
            self._start = Lsn(min(self._pieces) * size)
        keep = (self._start or segment.end).value // size
        for number in [n for n in self._pieces if n < keep]:
            self._leave(self._pieces[number])

    def _leave(self, piece: Piece) -> None:
        """The file is read no more."""
        path = self._path(piece.segment.number)
        if not path.exists():
            return
        # A parent's segment lies here under another name.
        own = piece.segment.timeline == self._timeline
        if self._keep is None or not own or not self._keep.take(piece, path):
            path.unlink()

    def clear(self) -> None:
        for piece in self._pieces.values():
            self._leave(piece)
        for path in self._folder.iterdir():
            path.unlink(missing_ok=True)


class _Count:
    """The commits of one segment while they are counted; times as text that sorts."""

    __slots__ = ("earliest", "first", "last", "latest", "makes_tablespace", "number")

    def __init__(self, makes_tablespace: bool | None) -> None:
        self.number = 0
        self.makes_tablespace = makes_tablespace
        self.first: RawCommit | None = None
        self.last: RawCommit | None = None
        self.earliest: RawCommit | None = None
        self.latest: RawCommit | None = None

    def add(self, lines: Sequence[RawCommit]) -> None:
        self.number += len(lines)
        self.first = self.first or lines[0]
        self.last = lines[-1]
        low = min(lines, key=_time_of)
        high = max(lines, key=_time_of)
        self.earliest = low if self.earliest is None else min(self.earliest, low, key=_time_of)
        self.latest = high if self.latest is None else max(self.latest, high, key=_time_of)

    def of(self, segment: WalSegment) -> SegmentFacts:
        if not (self.first and self.last and self.earliest and self.latest):
            return SegmentFacts(segment, makes_tablespace=self.makes_tablespace)
        earliest, latest = parse_time(self.earliest[3]), parse_time(self.latest[3])
        first, last = commit_from(self.first), commit_from(self.last)
        return SegmentFacts(segment, self.number, first, last, earliest, latest, self.makes_tablespace)


_time_of = itemgetter(3)


class _Tally:
    """Counts commits per segment; those met again in an overlap count once."""

    def __init__(self, segment_bytes: int, tablespaces: bool) -> None:
        self.segments: dict[int, _Count] = {}
        self.last = Lsn(-1)
        self.on_tablespace = self._tablespace if tablespaces else None
        self._bytes = segment_bytes

    def known(self, number: int) -> _Count:
        found = self.segments.get(number)
        if found is None:
            found = self.segments[number] = _Count(None if self.on_tablespace is None else False)
        return found

    def _tablespace(self, lsn: Lsn) -> None:
        self.known(lsn.value // self._bytes).makes_tablespace = True

    def take(self, lines: list[RawCommit]) -> None:
        # Lines are in order of their LSN: borders are found by bisection, not line by line.
        begin = bisect_left(lines, self.last.value + 1, key=raw_lsn)
        while begin < len(lines):
            number = raw_lsn(lines[begin]) // self._bytes
            end = bisect_left(lines, (number + 1) * self._bytes, lo=begin, key=raw_lsn)
            self.known(number).add(lines[begin:end])
            begin = end
        if lines:
            self.last = max(self.last, Lsn(raw_lsn(lines[-1])))
