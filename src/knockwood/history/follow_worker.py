"""The process that indexes segments as they are archived: it reads their names from its input, line by line.

First comes the repository as JSON. For each name it answers one line of JSON: what is wrong or null, and
whether another try may help. If the input ends, the receiver is done or dead, and so is this.
"""

from __future__ import annotations

import json
import sys
from typing import Final

from knockwood.errors import KnockwoodError, ObjectMissingError
from knockwood.history import store
from knockwood.history.build import Indexed, Indexer, pieces_of, put, runs_of
from knockwood.history.child import repository_from
from knockwood.model.wal import WalSegment
from knockwood.repository.archive import WalArchive
from knockwood.repository.inventory import segment_object
from knockwood.repository.repository import Repository
from knockwood.repository.route import Route
from knockwood.repository.walk import Piece

CATCH_UP: Final = 64
"""Segments before the first one that are looked at: what was archived while nobody followed, if not for long."""


class Following:
    """Indexes an archive's new segments one after the other."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self._indexer: Indexer | None = None
        self._last: WalSegment | None = None

    def archived(self, segment: WalSegment) -> str | None:
        """Index a segment that was archived; what is wrong with it, if anything. Raises what storage raises."""
        last, self._last = self._last, None
        if (
            self._indexer is None
            or last is None
            or segment != WalSegment(last.timeline, last.number + 1, last.bytes)
        ):
            wrong = self._look(segment)
        else:
            wrong = self._put(self._indexer.follow(*self._piece(segment)))
        self._last = segment
        return wrong

    def _look(self, segment: WalSegment) -> str | None:
        """Find the way to a segment, and index what the index lacks shortly before it."""
        archive = WalArchive(self.repository)
        listing = archive.listing()
        route = Route(archive.inventory_of(listing), segment.timeline)
        pieces = [
            piece
            for piece in pieces_of(route, listing)
            if piece.end is None and piece.segment.number <= segment.number
        ]
        if not pieces or pieces[-1].segment != segment:
            raise ObjectMissingError("not in the archive", where=segment_object(segment))
        *_, run = runs_of(pieces)
        self._indexer = Indexer(self.repository, run)
        first = max(len(run) - CATCH_UP, 0)
        known = store.heads(self.repository, [piece.segment for piece in run[first:]])
        wrong = None
        for position in range(first, len(run)):
            piece = run[position]
            if piece.segment.name not in known:
                wrong = self._put(self._indexer.index(position, listing[piece.object].bytes)) or wrong
        return wrong

    def _piece(self, segment: WalSegment) -> tuple[Piece, int]:
        name = self.repository.find(segment_object(segment))
        info = self.repository.storage.info(name) if name is not None else None
        if info is None:
            raise ObjectMissingError("not in the archive", where=segment_object(segment))
        return Piece(segment, info.name, None), info.bytes

    def _put(self, made: Indexed) -> str | None:
        put(self.repository, made)
        return f"{made.piece.segment.name}: {made.reason}" if made.reason is not None else None


def main() -> None:
    """Work until the input ends."""
    job = json.loads(sys.stdin.readline())
    following: Following | None = None
    for line in sys.stdin:
        try:
            following = following or Following(repository_from(job))
            size = following.repository.header.segment_bytes
            _say(following.archived(WalSegment.parse(line.strip(), size)), False)
        except KnockwoodError as error:
            _say(str(error), True)


def _say(wrong: str | None, passing: bool) -> None:
    sys.stdout.write(json.dumps([wrong, passing]) + "\n")
    sys.stdout.flush()
