"""Where the receiver goes on: decided from the spool, the archive and the server's history. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from knockwood.errors import PostgresError
from knockwood.model.wal import Lsn, Timeline, TimelineHistory, WalRange, WalSegment
from knockwood.repository.inventory import ArchiveInventory, split
from knockwood.repository.receive_server import ServerPosition


@dataclass(frozen=True, slots=True)
class Start:
    """The segment to begin with, and whether the server left the timeline received so far before its end."""

    segment: WalSegment
    forked: bool = False


def archive_next(stock: ArchiveInventory) -> WalSegment | None:
    """The segment that the archive needs next: after its last whole one, in pg_receivewal's order."""
    candidates = [(numbers[-1] + 1, timeline) for timeline, numbers in stock.segments.items() if numbers]
    candidates += [(partial.segment.number, partial.segment.timeline) for partial in stock.partials]
    if not candidates:
        return None
    number, timeline = max(candidates)
    return WalSegment(timeline, number, stock.segment_bytes)


def choose_start(
    wanted: WalSegment | None,
    server: ServerPosition,
    reserved: Lsn | None,
    segment_bytes: int,
    known: Callable[[Timeline], TimelineHistory],
) -> Start:
    """Where to begin: at `wanted`, unless the server left that timeline before it; at the slot if nowhere.

    `known` gives the ancestry of a timeline received so far. Raises PostgresError if the server is
    on an older timeline than what was received.
    """
    if wanted is None:
        lsn = reserved or server.flush
        return Start(WalSegment.containing(server.history.timeline_at(lsn), lsn, segment_bytes))
    until = _left_at(server.history, wanted.timeline)
    if until is None and wanted.timeline == server.timeline:
        return Start(wanted)
    if until is not None and wanted.start <= until:
        return Start(wanted)
    fork = _fork(known(wanted.timeline), server.history)
    if fork is None:
        raise PostgresError(
            f"the server is on timeline {server.timeline}, the archive has gone on to timeline"
            f" {wanted.timeline}",
            hint="is this a former primary, started again after its standby was promoted?",
        )
    return Start(WalSegment.containing(server.history.timeline_at(fork), fork, segment_bytes), forked=True)


def _left_at(history: TimelineHistory, timeline: Timeline) -> Lsn | None:
    return next((lsn for parent, lsn in history.switches if parent == timeline), None)


def _fork(ours: TimelineHistory, server: TimelineHistory) -> Lsn | None:
    """Where two ancestries part; None if the server's is the beginning of ours."""
    shared: Lsn | None = None
    for mine, theirs in zip(ours.path(), server.path(), strict=False):
        if mine[:2] != theirs[:2]:
            return shared
        ends = [end for end in (mine[2], theirs[2]) if end is not None]
        if theirs[2] is None:
            return None
        shared = min(ends)
    return shared


def missing_pieces(server: ServerPosition, reached: Lsn, resume: WalSegment) -> list[WalRange]:
    """The WAL between what was received and where receiving goes on, per timeline."""
    if resume.start <= reached:
        return []
    return list(split(server.history.path(), reached, resume.start))
