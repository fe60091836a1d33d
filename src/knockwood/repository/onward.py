"""Going on from a position in the archive without reading again what lies before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from knockwood.errors import StorageUnavailableError, TargetUnreachableError
from knockwood.host import clock
from knockwood.model.proof import Commit
from knockwood.model.wal import Lsn, Timeline
from knockwood.postgres.binaries import Programs
from knockwood.repository import proved
from knockwood.repository.archive import WalArchive
from knockwood.repository.commits import ArchiveReader
from knockwood.repository.inventory import ArchiveInventory, Partial
from knockwood.repository.plans import WalPiece
from knockwood.repository.repository import Repository
from knockwood.repository.route import Reach, Route, WalFacts
from knockwood.repository.storage import ObjectInfo
from knockwood.repository.walk import workplace

_ATTEMPTS: Final = 10
_HINT: Final = "`knockwood verify` shows what the archive holds"


@dataclass(frozen=True, slots=True)
class Onward:
    """How far one can go: `commit` is the last within the bounds (None: there is none further on).

    `pieces` hold the WAL from where it is needed up to the end of that record, without a hole; `reach` says
    where whole WAL ends and why.
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
    read_from: Lsn,
    bounds: Bounds,
    programs: Programs,
    *,
    timeline: Timeline | None = None,
    needed_from: Lsn | None = None,
) -> Onward:
    """The last commit that can be reached within the bounds, along the newest timeline (or the one given).

    Only WAL from `read_from` on is read, record by record, and what was read through this repository object
    before is not read again; the pieces begin at `needed_from`, where that is earlier. Raises
    TargetUnreachableError where WAL between the two is gone, StorageUnavailableError where the archive
    changes faster than it can be read.
    """
    begin = needed_from or read_from
    return _read(
        repository, programs, timeline, lambda reader, route: _look(reader, route, read_from, begin, bounds)
    )


def wal_to(
    repository: Repository,
    read_from: Lsn,
    target: Lsn,
    programs: Programs,
    *,
    timeline: Timeline,
    needed_from: Lsn | None = None,
) -> Onward:
    """The WAL from a position up to the end of the record that starts at `target`, whatever that is.

    Positions and errors are those of `onward`; also TargetUnreachableError where it is not whole.
    """
    begin = needed_from or read_from

    def look(reader: ArchiveReader, route: Route) -> Onward:
        # The record may go on into the next segment.
        limit = min(route.archive_end(), target + route.segment_bytes)
        facts = reader.read(route, read_from, max(limit, read_from))
        reach = route.reach(read_from, facts)
        if reach.end <= target:
            raise TargetUnreachableError(
                f"the WAL from {read_from} does not lead to {target}: {reach.reason}", hint=_HINT
            )
        return _found(route, begin, min(limit, reach.end), None, reach, facts)

    return _read(repository, programs, timeline, look)


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
        state = proved.known(repository, listing)
        with workplace() as folder:
            reader = ArchiveReader(repository, inventory, listing, programs, folder, state)
            found, unreachable = None, None
            try:
                found = look(reader, route)
            except TargetUnreachableError as error:
                unreachable = error
        _remember(repository, reader, listing)
        if reader.vanished:
            continue
        if found is None:
            assert unreachable is not None
            raise unreachable
        return found
    raise StorageUnavailableError(
        "the archive changed faster than it could be read",
        where=repository.storage.url,
        hint="try again; is the storage very slow?",
    )


def _remember(repository: Repository, reader: ArchiveReader, listing: Mapping[str, ObjectInfo]) -> None:
    """Keep what was read for the next look through this object, and drop what is gone: it may live for months."""
    known = repository.read_before
    known.update({entry.name: entry for entry in reader.proved(clock.now())})
    for name in [name for name, entry in known.items() if not entry.still(listing.get(name))]:
        del known[name]


def _look(reader: ArchiveReader, route: Route, read_from: Lsn, begin: Lsn, bounds: Bounds) -> Onward:
    limit = route.archive_end()
    if bounds.before is not None:
        # A record before the bound may go on into the next segment.
        limit = min(limit, bounds.before + route.segment_bytes)
    facts = reader.read(route, read_from, max(limit, read_from))
    reach = route.reach(read_from, facts)
    end = min(reach.end, bounds.before) if bounds.before is not None else reach.end
    if bounds.until is not None and bounds.after < end:
        later = reader.first_after(route, bounds.until, bounds.after, end)
        end = later.lsn if later is not None else end
    commit = reader.last(route, bounds.after, end) if bounds.after < end else None
    if commit is None:
        return Onward(route.timeline, None, (), _histories(route), reach)
    return _found(route, begin, min(commit.lsn + route.segment_bytes, reach.end), commit, reach, facts)


def _found(
    route: Route, begin: Lsn, until: Lsn, commit: Commit | None, reach: Reach, facts: WalFacts
) -> Onward:
    pieces = tuple(
        WalPiece(
            segment,
            partial.name if partial else None,
            known.makes_tablespace if (known := facts.segments.get(segment)) is not None else None,
        )
        for segment, partial in route.pieces(begin, until)
    )
    require_unbroken(pieces, begin, until)
    return Onward(route.timeline, commit, pieces, _histories(route), reach)


def _histories(route: Route) -> tuple[Timeline, ...]:
    return tuple(step[0] for step in route.path if step[0] in route.inventory.histories)


def require_unbroken(pieces: Sequence[WalPiece], begin: Lsn, until: Lsn) -> None:
    """Raise TargetUnreachableError unless the pieces hold the range without a hole."""
    numbers = [piece.segment.number for piece in pieces]
    size = pieces[0].segment.bytes if pieces else 1
    first, last = begin.value // size, max(until.value - 1, begin.value) // size
    if numbers != list(range(first, last + 1)):
        raise TargetUnreachableError(f"WAL between {begin} and {until} is not in the archive", hint=_HINT)


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
