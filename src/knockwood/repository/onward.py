"""Going on from a position in the archive without reading again what lies before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from knockwood.errors import StorageUnavailableError, TargetUnreachableError
from knockwood.model.proof import Commit
from knockwood.model.wal import Lsn, Timeline
from knockwood.postgres.binaries import Programs
from knockwood.repository import proved
from knockwood.repository.archive import WalArchive
from knockwood.repository.commits import ArchiveReader
from knockwood.repository.inventory import ArchiveInventory, Partial
from knockwood.repository.plans import WalPiece
from knockwood.repository.repository import Repository
from knockwood.repository.route import Reach, Route
from knockwood.repository.walk import workplace

_ATTEMPTS: Final = 10


@dataclass(frozen=True, slots=True)
class Onward:
    """How far one can go: `commit` is the last within the bounds (None: there is none further on).

    `pieces` hold the WAL from where it is needed up to the end of that record; `reach` says where whole
    WAL ends and why.
    """

    timeline: Timeline
    commit: Commit | None
    pieces: tuple[WalPiece, ...]
    histories: tuple[Timeline, ...]
    reach: Reach


@dataclass(frozen=True, slots=True)
class Bounds:
    """Commits at or after `after`; whose record starts before `before`; none from the first one later
    than `until` on (in order of the WAL)."""

    after: Lsn
    before: Lsn | None = None
    until: datetime | None = None


def newest_timeline(inventory: ArchiveInventory) -> Timeline:
    """The newest timeline known by WAL or history."""
    return max({*inventory.timelines, *inventory.histories}, default=Timeline(1))


def onward(
    repository: Repository,
    needed_from: Lsn,
    bounds: Bounds,
    programs: Programs,
    *,
    timeline: Timeline | None = None,
) -> Onward:
    """The last commit that can be reached within the bounds, along the newest timeline (or the one given).

    Only WAL from `needed_from` on is read, record by record. Raises StorageUnavailableError where the
    archive changes faster than it can be read.
    """
    return _read(
        repository, programs, timeline, lambda reader, route: _look(reader, route, needed_from, bounds)
    )


def wal_to(
    repository: Repository, needed_from: Lsn, target: Lsn, programs: Programs, *, timeline: Timeline
) -> Onward:
    """The WAL from a position up to the end of the record that starts at `target`, whatever that is.

    Raises TargetUnreachableError where it is not whole, StorageUnavailableError as `onward` does.
    """

    def look(reader: ArchiveReader, route: Route) -> Onward:
        # The record may go on into the next segment.
        limit = min(route.archive_end(), target + route.segment_bytes)
        reach = route.reach(needed_from, reader.read(route, needed_from, max(limit, needed_from)))
        return _found(route, needed_from, min(limit, reach.end), None, reach)

    found = _read(repository, programs, timeline, look)
    if found.reach.end <= target:
        raise TargetUnreachableError(
            f"the WAL from {needed_from} does not lead to {target}: {found.reach.reason}",
            hint="`knockwood verify` shows what the archive holds",
        )
    return found


def _read(
    repository: Repository,
    programs: Programs,
    timeline: Timeline | None,
    look: Callable[[ArchiveReader, Route], Onward],
) -> Onward:
    for _ in range(_ATTEMPTS):
        archive = WalArchive(repository)
        listing = archive.listing()
        inventory = archive.inventory_of(listing)
        route = Route(inventory, timeline or newest_timeline(inventory))
        state = proved.load(repository, repository.storage.list(proved.FOLDER))
        with workplace() as folder:
            reader = ArchiveReader(repository, inventory, listing, programs, folder, state)
            found = look(reader, route)
        if not reader.vanished:
            return found
    raise StorageUnavailableError(
        "the archive changed faster than it could be read",
        where=repository.storage.url,
        hint="try again; is the storage very slow?",
    )


def _look(reader: ArchiveReader, route: Route, needed_from: Lsn, bounds: Bounds) -> Onward:
    limit = route.archive_end()
    if bounds.before is not None:
        # A record before the bound may go on into the next segment.
        limit = min(limit, bounds.before + route.segment_bytes)
    facts = reader.read(route, needed_from, max(limit, needed_from))
    reach = route.reach(needed_from, facts)
    end = min(reach.end, bounds.before) if bounds.before is not None else reach.end
    if bounds.until is not None and bounds.after < end:
        later = reader.first_after(route, bounds.until, bounds.after, end)
        end = later.lsn if later is not None else end
    commit = reader.last(route, bounds.after, end) if bounds.after < end else None
    until = needed_from if commit is None else min(commit.lsn + route.segment_bytes, reach.end)
    return _found(route, needed_from, until, commit, reach)


def _found(route: Route, needed_from: Lsn, until: Lsn, commit: Commit | None, reach: Reach) -> Onward:
    pieces = route.pieces(needed_from, until)
    return Onward(
        route.timeline,
        commit,
        tuple(WalPiece(segment, partial.name if partial else None) for segment, partial in pieces),
        tuple(step[0] for step in route.path if step[0] in route.inventory.histories),
        reach,
    )


def renewed(repository: Repository, pieces: Iterable[WalPiece]) -> tuple[WalPiece, ...]:
    """The same files, from where they are now: a partial one may have grown or become whole since."""
    wanted = tuple(pieces)
    if all(piece.partial_name is None for piece in wanted):
        return wanted
    inventory = WalArchive(repository).inventory()
    return tuple(_now(piece, inventory) for piece in wanted)


def _now(piece: WalPiece, inventory: ArchiveInventory) -> WalPiece:
    if piece.partial_name is None:
        return piece
    source = inventory.source(piece.segment)
    if source is None:
        return piece  # fetching it says that it is gone
    return WalPiece(piece.segment, source.name if isinstance(source, Partial) else None)
