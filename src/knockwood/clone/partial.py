"""Clones of some relations: they cost what these relations and the WAL cost, whatever the database's size.

The catalogs, the transaction status and the wanted relations' files are fetched, nothing else. Relations
left out have no file, and the WAL that speaks of them is silenced (`partial_wal`), so that none comes into
being with holes: PostgreSQL itself raises an error for whoever reads one. What can be read is right.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from knockwood.clone import goal as goals
from knockwood.clone.feed import FedRecovery
from knockwood.clone.goal import Goal
from knockwood.clone.partial_files import RelationKey, Selection, select
from knockwood.clone.partial_wal import Locator, WalFilter, locator_of
from knockwood.clone.pieces import Piece, stub
from knockwood.clone.registry import Registry, sign
from knockwood.clone.spawn import Clone, Report, fetch, make, spawn
from knockwood.clone.workspace import Workspace
from knockwood.errors import (
    KnockwoodError,
    NoSpaceError,
    ObjectDamagedError,
    ObjectMissingError,
    PostgresError,
    ProgramFailedError,
    RefusedError,
)
from knockwood.host import clock, files, privileges
from knockwood.host.privileges import Account
from knockwood.model.wal import Lsn, WalSegment
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.postgres.connection import Connection, connect, translated
from knockwood.repository.backups.listing import relation_map
from knockwood.repository.backups.partial import Part
from knockwood.repository.repository import Repository
from knockwood.repository.targets import read_through

if TYPE_CHECKING:
    from knockwood.repository.plans import RestorePlan, WalPiece

__all__ = ["PartialClone", "PartialImpossibleError", "RelationKey", "spawn_for", "spawn_partial"]

_FAMILIES: Final = """
with recursive named(oid) as (
    select c.oid from pg_catalog.pg_class c where c.oid = any(%(oids)s::oid[])
    union
    select c.oid from pg_catalog.pg_class c
    where pg_catalog.cardinality(%(filenodes)s::oid[]) > 0
      and pg_catalog.pg_relation_filenode(c.oid) = any(%(filenodes)s::oid[])
    union
    select c.oid from unnest(%(schemas)s::name[], %(names)s::name[]) as w (schema, name)
    join pg_catalog.pg_namespace n on n.nspname = w.schema
    join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = w.name
), tree(oid) as (
    select oid from named
    union
    select i.inhrelid from pg_catalog.pg_inherits i join tree on i.inhparent = tree.oid
), tables as (
    select oid from tree
    union
    select c.reltoastrelid from pg_catalog.pg_class c join tree using (oid) where c.reltoastrelid <> 0
), every as (
    select oid from tables
    union
    select x.indexrelid from pg_catalog.pg_index x join tables on x.indrelid = tables.oid
)
select c.oid::regclass::text, pg_catalog.pg_relation_filepath(c.oid)
from pg_catalog.pg_class c join every using (oid)
where pg_catalog.pg_relation_filenode(c.oid) is not null and c.relpersistence = 'p'
"""


class PartialImpossibleError(RefusedError):
    """A clone of these relations alone would not hold all of them; `more` are files that might mend it."""

    def __init__(self, what: str, *, more: Collection[Locator] = ()) -> None:
        super().__init__(what, hint="a clone of the whole backup does")
        self.more = frozenset(more)


@dataclass(slots=True)
class PartialClone(Clone):
    """A clone that holds `keys` and no other relation of the users'; it can never be promoted.

    `wal_filter` tells what was silenced, `part` what was fetched. Sizes in bytes.
    """

    keys: tuple[RelationKey, ...] = ()
    part: Part | None = None
    wal_filter: WalFilter | None = None
    stubs: frozenset[Locator] = frozenset()

    def held(self, relation: Locator) -> frozenset[int] | None:
        """The blocks of a relation (tablespace, database, file) that can be read; None for all it has."""
        piece = self.wal_filter.pieces.get(relation) if self.wal_filter else None
        return None if piece is None else piece.blocks

    @property
    def fetched_bytes(self) -> int:
        """Stored bytes of the backup that were read (compressed), without its lists of files."""
        return self.part.read if self.part else 0

    def _look_through(
        self, plan: RestorePlan, missing: Sequence[WalPiece], segments: Iterator[WalSegment]
    ) -> None:
        """Silence in the WAL what concerns relations that are not here."""
        assert self.wal_filter is not None
        renewed = [piece.segment.start for piece in missing]
        start = plan.backup.start_lsn
        if self.wal_filter.reached is not None:
            start = min([self.wal_filter.reached, *renewed])
        if renewed or not self.wal_filter.has_seen(plan.target_lsn):
            self.wal_filter.apply(segments, start, plan.target_lsn)
        for _ in segments:
            pass
        self.wal_filter.require_no_tablespace(plan.target_lsn or plan.backup.stop_lsn)

    def _guard(self) -> None:
        """Write what keeps readers and redo from blocks that are not here; their files are."""
        assert self.wal_filter is not None
        pieces = self.wal_filter.pieces.values()
        if self.server.running and any(piece.outgrows(self.data_directory) for piece in pieces):
            # A server in recovery remembers how long a file is.
            self.recovery.settle()
        for part in pieces:
            part.guard(self.data_directory, self.workspace.account)

    def advance(self, plan: RestorePlan, progress: Report | None = None) -> Lsn:
        """Replay on to a later goal, without a restart where that can be."""
        if not isinstance(self.recovery, FedRecovery) or plan.target_lsn is None:
            return Clone.advance(self, plan, progress)
        self._require_onward(plan)
        if self.server.running and plan.timeline != self.plan.timeline:
            self.recovery.settle()
        self.fill_spool(plan, progress)
        self._guard()
        self.plan = plan
        self.recovery.segments = tuple(piece.segment for piece in plan.wal)
        if not self.server.running:
            return self.replay(progress)
        began = clock.monotonic()
        try:
            self.reached_lsn = self.recovery.step(Goal.of(plan))
        except BaseException:
            self.server.stop("immediate")
            raise
        self.timings.replay = clock.monotonic() - began
        _prove(self)
        return self.reached_lsn

    def replay(self, progress: Report | None = None) -> Lsn:
        """Run recovery to the plan's goal, and prove that nothing incomplete can be read there."""
        self._guard()
        reached = Clone.replay(self, progress)
        _prove(self)
        return reached

    def promote(self) -> None:
        """Refused: what was left out would be missing for good."""
        raise RefusedError(
            "a clone of some relations is never opened for writes", hint="make a clone of the whole backup"
        )


def spawn_partial(
    repository: Repository,
    plan: RestorePlan,
    relations: Collection[RelationKey],
    *,
    purpose: str,
    into: Path | None = None,
    programs: Programs | None = None,
    progress: Report | None = None,
    keep: bool = False,
    account: Account | None = None,
    settings: Mapping[str, str] | None = None,
    workers: int = 4,
    registry: Registry | None = None,
    more: Collection[Locator] = (),
) -> PartialClone:
    """A clone at the plan's target, read-only and paused, that holds only `relations` and the catalogs.

    Reading any other table, index, sequence of another database, or large object of it is an error.
    Options are those of `clone.spawn.spawn`. Raises PartialImpossibleError where the relations would not
    be whole on it, UnreadableError where PostgreSQL cannot pause at the target. The plan's WAL may be unread.
    """
    programs = programs or find_programs(plan.backup.major)
    registry = registry or Registry()
    with suppress(KnockwoodError):
        registry.sweep()
    selection, part = _choose(repository, plan, relations, more)
    entry = registry.enter(purpose, into)
    try:
        workspace = Workspace(entry.record.root, account or privileges.server_account())
        made = make(repository, plan, workspace, programs, entry.record.socket_directory, "fail")
        clone = PartialClone(
            **{name: getattr(made, name) for name in Clone.__dataclass_fields__},
            keys=tuple(relations),
            part=part,
            wal_filter=_filter(made, plan, selection, part),
            stubs=frozenset(selection.stubs),
        )
        clone.entry = entry
        clone.recovery.entrance = selection.entrance
        _require_room(workspace.root, plan, part)
        workspace.create(lambda: sign(entry.record))
    except BaseException:
        entry.remove()
        raise
    try:
        fetch(
            clone,
            purpose,
            tablespaces=workspace.tablespaces,
            progress=progress,
            workers=workers,
            part=part,
            after_files=lambda: _write_pieces(clone, selection),
        )
        _configure(clone, settings or {})
        clone.replay(progress)
    except BaseException:
        clone.destroy()
        raise
    clone.keep = keep
    return clone


def spawn_for(
    repository: Repository,
    plan: RestorePlan,
    relations: Collection[RelationKey],
    *,
    purpose: str,
    into: Path | None = None,
    programs: Programs | None = None,
    progress: Report | None = None,
    keep: bool = False,
    account: Account | None = None,
    settings: Mapping[str, str] | None = None,
    workers: int = 4,
    registry: Registry | None = None,
) -> Clone:
    """A clone on which `relations` can be read: a partial one, or where that is not safe a whole one.

    A whole one says why in `whole_because`. Either way what a transaction in progress at the target has locked
    can be read at once. A whole one may be promoted if PostgreSQL cannot pause at the target. Of a plan whose WAL is
    unread it is read only if there comes nothing of the first attempt: TargetUnreachableError where it is not whole.
    """
    options: dict[str, Any] = {
        "purpose": purpose,
        "into": into,
        "programs": programs,
        "progress": progress,
        "keep": keep,
        "account": account,
        "settings": settings,
        "workers": workers,
        "registry": registry,
    }
    more: frozenset[Locator] = frozenset()
    while True:
        in_pieces = any(key.blocks is not None for key in relations)
        try:
            return spawn_partial(repository, plan, relations, more=more, **options)
        except NoSpaceError:
            raise
        except (
            RefusedError,
            PostgresError,
            ProgramFailedError,
            ObjectMissingError,
            ObjectDamagedError,
        ) as error:
            if isinstance(error, ObjectDamagedError) and not plan.unread:
                raise
            reason = error.what
            found = error.more if isinstance(error, PartialImpossibleError) else frozenset()
        plan = read_through(repository, plan, lambda major: programs or find_programs(major))
        if in_pieces:
            relations = [replace(key, blocks=None) for key in relations]
        elif found and not more:
            # Once more with what the catalogs of the target named: partitions, a table renamed since.
            more = found
        else:
            break
    clone = spawn(repository, plan, free_of_locks=True, **options)
    clone.whole_because = reason
    return clone


def _choose(
    repository: Repository, plan: RestorePlan, keys: Collection[RelationKey], more: Collection[Locator]
) -> tuple[Selection, Part]:
    if not keys:
        raise RefusedError("no relation is named that the clone should hold")
    found = relation_map(repository, plan.backup)
    part = Part(repository, plan.chain)
    selection = select(found, part.files[plan.backup.id], keys, more, part.pages)
    part.choose(selection.wants)
    return selection, part


def _filter(clone: Clone, plan: RestorePlan, selection: Selection, part: Part) -> WalFilter:
    present, absent = selection.split(part.files[plan.backup.id])
    pieces = {place: Piece(cut.path, cut.blocks, cut.pages) for place, cut in selection.cuts.items()}
    return WalFilter(clone.spool.folder, plan.backup.segment_bytes, present, absent, pieces)


def _configure(clone: PartialClone, settings: Mapping[str, str]) -> None:
    if clone.plan.target_lsn is not None:
        clone.recovery = FedRecovery.of(clone.recovery)
        clone.recovery.segments = tuple(piece.segment for piece in clone.plan.wal)
    clone.recovery.settings |= goals.throw_away_settings(True)
    # Looking ahead at blocks that are not here would only cost.
    clone.recovery.settings |= {"recovery_prefetch": "off"} if clone.programs.major >= 15 else {}
    clone.recovery.settings |= settings


def _write_pieces(clone: PartialClone, selection: Selection) -> None:
    """The wanted blocks of large tables, and the first of their indexes for the planner."""
    assert clone.part is not None
    assert clone.wal_filter is not None
    folder, account = clone.data_directory, clone.workspace.account
    for piece in clone.wal_filter.pieces.values():
        piece.make(folder, clone.part.blocks(piece.path, piece.blocks), account)
    for path in selection.stubs.values():
        stub(folder, path, clone.part.blocks(path, [0])[0], account)


def _require_room(root: Path, plan: RestorePlan, part: Part) -> None:
    wal = sum(piece.segment.bytes for piece in plan.wal)
    unpacked = part.raw_bytes * (2 if len(plan.chain) > 1 else 1)
    files.require_space(root, unpacked + 2 * wal, "the clone of some relations")


# --- what was made is proven ----------------------------------------------------------------------


def _prove(clone: PartialClone) -> None:
    """Raise PartialImpossibleError unless every relation's file here is whole, and every wanted one is here."""
    known = clone.wal_filter
    assert known is not None
    if known.unexplained:
        relation = "/".join(map(str, next(iter(known.unexplained))))
        raise PartialImpossibleError(
            f"the WAL changes relation {relation}, which neither the backup holds nor the WAL makes"
        )
    for path in _relation_files(clone.data_directory):
        relation_here = locator_of(path)
        if relation_here is not None and not known.whole(relation_here) and relation_here not in clone.stubs:
            raise PartialImpossibleError(f"replay made {path}, which is not whole")
    missing: dict[str, Locator] = {}
    with connect(clone.dsn(clone.entrance)) as connection, translated():
        rows = connection.execute("select datname from pg_catalog.pg_database").fetchall()
    for database in {row[0] for row in rows} & {key.database for key in clone.keys}:
        with connect(clone.dsn(database)) as connection:
            missing |= _missing(clone, known, database, connection)
    if missing:
        raise PartialImpossibleError(
            f"{', '.join(sorted(missing)[:3])} would not be whole on it",
            more=[place for place in missing.values() if place in known.absent],
        )


def _missing(
    clone: PartialClone, known: WalFilter, database: str, connection: Connection
) -> dict[str, Locator]:
    """The relations that belong to keys of a database and are not here, by name."""
    keys = [key for key in clone.keys if key.database == database]
    by_oid = [key.oid for key in keys if key.oid is not None]
    by_node = [key.filenode for key in keys if key.oid is None and key.filenode is not None]
    by_name = [key for key in keys if key.oid is None and key.filenode is None]
    words = {
        "oids": by_oid,
        "filenodes": by_node,
        "schemas": [key.schema for key in by_name],
        "names": [key.name for key in by_name],
    }
    with translated():
        rows = connection.execute(_FAMILIES, words).fetchall()
    missing = {}
    for name, path in rows:
        place = locator_of(path)
        here = place in clone.stubs or (place is not None and known.whole(place))
        if not here or not (clone.data_directory / path).exists():
            missing[name] = place or (0, 0, 0)
    return missing


def _relation_files(data_directory: Path) -> Iterable[str]:
    folders = [data_directory / "base", *sorted((data_directory / "pg_tblspc").iterdir())]
    for top in folders:
        for folder, _, names in os.walk(top):
            below = Path(folder).relative_to(data_directory)
            yield from (f"{below}/{name}" for name in names)
