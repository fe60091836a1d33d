"""Make the index of WAL segments: read, decode, store. One segment is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from knockwood.errors import KnockwoodError, ObjectDamagedError, ObjectMissingError, WrongSystemError
from knockwood.history import store
from knockwood.history.store import Head
from knockwood.history.summary import SegmentSummary, summarize
from knockwood.model.wal import WalSegment
from knockwood.postgres.walpages import Bytes, Tail, read_segment
from knockwood.repository.archive import WalArchive
from knockwood.repository.inventory import Partial, segment_object
from knockwood.repository.repository import Repository
from knockwood.repository.route import Route
from knockwood.repository.walk import Piece

_REMEMBERED: Final = 64
"""Pieces to go back to for the beginning of a record, while an archive is followed for months."""


@dataclass(frozen=True, slots=True)
class Indexed:
    """A segment's index just made. `reason` says why it holds nothing, or ends early."""

    piece: Piece
    summary: SegmentSummary | None
    head: Head | None
    reason: str | None = None

    @property
    def final(self) -> bool:
        """Whether it will never be otherwise: then it is worth storing."""
        summary = self.summary
        return (
            summary is not None and summary.broken is None and not summary.zeroes and self.piece.end is None
        )


def put(repository: Repository, made: Indexed) -> bool:
    """Store a segment's index if it is final; whether it is. Raises what storage raises."""
    if not made.final or made.summary is None or made.head is None:
        return False
    store.put(repository, made.summary, made.head)
    return True


def keep(repository: Repository, made: Indexed) -> str | None:
    """Store a segment's index if it is final; the full name of its head.

    A repository that cannot be written to can still be read: then None, and nothing is raised.
    """
    try:
        if not put(repository, made) or made.head is None:
            return None
    except KnockwoodError:
        return None
    return repository.find(store.object_name(made.head.segment, made.head.start) + ".head")


class Indexer:
    """Indexes pieces of an archive that follow each other; keeps what one leaves to the next.

    `pieces` are all of the run, in order: those before the ones asked for are read again where a record
    crosses the border.
    """

    def __init__(self, repository: Repository, pieces: Sequence[Piece]) -> None:
        self._repository = repository
        self._pieces = pieces
        self._at = -1
        self._tail: Tail | None = None

    def index(self, position: int, source_bytes: int) -> Indexed:
        """Index the piece at a position. Raises WrongKeyError and what storage raises; damage is told."""
        piece = self._pieces[position]
        before = self._tail if self._at == position - 1 else self._tail_before(position)
        self._at, self._tail = position, None
        try:
            raw = self._read(piece)
        except (ObjectDamagedError, ObjectMissingError, WrongSystemError) as error:
            return Indexed(piece, None, None, error.what)
        found = read_segment(raw, piece.segment, before)
        summary = summarize(found, piece.segment.start.value)
        if summary.broken is None:
            self._tail = found.tail
        return Indexed(piece, summary, store.make_head(summary, piece, source_bytes), summary.broken)

    def follow(self, piece: Piece, source_bytes: int) -> Indexed:
        """Index the piece after the last one of the run; what is long done is forgotten."""
        forgotten = max(len(self._pieces) - _REMEMBERED, 0)
        self._pieces = [*self._pieces[forgotten:], piece]
        self._at -= forgotten
        return self.index(len(self._pieces) - 1, source_bytes)

    def _tail_before(self, position: int) -> Tail | None:
        """What the pieces before leave to this one; None where that cannot be known."""
        for begin in range(position - 1, -1, -1):
            tail, found = self._tail_from(begin, position)
            if found or tail is not None:
                return tail
        return None

    def _tail_from(self, begin: int, position: int) -> tuple[Tail | None, bool]:
        """Read from the piece at `begin` on: the tail, and whether going back further is of no use."""
        tail: Tail | None = None
        seen = False
        for number in range(begin, position):
            try:
                raw = self._read(self._pieces[number])
            except (ObjectDamagedError, ObjectMissingError, WrongSystemError):
                return None, True
            found = read_segment(raw, self._pieces[number].segment, tail)
            if found.broken is not None or found.zeroes:
                return None, True
            seen = seen or found.tail is not None
            tail = found.tail
        # A segment in the middle of a record tells nothing: the record's beginning is further back.
        return (tail, True) if seen else (None, False)

    def _read(self, piece: Piece) -> Bytes:
        segment = piece.segment
        data = np.empty(segment.bytes, np.uint8)
        room, size = data.data, 0
        try:
            for chunk in self._repository.read(piece.object):
                # What is too much is counted, and not kept.
                room[size : size + len(chunk)] = chunk[: max(segment.bytes - size, 0)]
                size += len(chunk)
        except ObjectMissingError:
            if piece.end is None:
                raise
            return _replaced(self._repository, segment, piece)
        wanted = (piece.end or segment.end) - segment.start
        if size != wanted:
            raise ObjectDamagedError(f"holds {size} bytes instead of {wanted}", where=piece.object)
        data[size:] = 0
        return data


def _replaced(repository: Repository, segment: WalSegment, piece: Piece) -> Bytes:
    """A receiver replaced a partial segment by a longer one, or the whole: the same bytes are there."""
    partial = Partial.parse(piece.object, segment.bytes)
    if partial is None:
        raise ObjectMissingError("not in the archive", where=piece.object)
    data = bytearray(b"".join(WalArchive(repository).read_partial(partial)))
    data += bytes(segment.bytes - len(data))
    return np.frombuffer(data, np.uint8)


def pieces_of(route: Route, listing: Mapping[str, object]) -> Iterator[Piece]:
    """The files of a route in order, as far as they are there."""
    start = route.archive_start()
    if start is None:
        return
    for segment, partial in route.pieces(start, max(route.archive_end(), start + 1)):
        name = partial.name if isinstance(partial, Partial) else segment_object(segment)
        for suffix in (".zst", ".zst.age"):
            if name + suffix in listing:
                yield Piece(segment, name + suffix, partial.end if partial else None)
                break


def runs_of(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Cut pieces of a route where a number is skipped; a change of timeline does not cut."""
    begin = 0
    for position in range(1, len(pieces) + 1):
        if (
            position == len(pieces)
            or pieces[position].segment.number != pieces[position - 1].segment.number + 1
        ):
            yield pieces[begin:position]
            begin = position
