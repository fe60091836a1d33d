"""Which files of a backup a clone of some relations needs, and which relations it leaves out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from knockwood.clone.partial_wal import Locator, locator_of
from knockwood.errors import ObjectMissingError
from knockwood.repository.backups.listing import Relation, RelationMap

_FIRST_NORMAL = 16384
_TEMPLATE1, _TEMPLATE1_OID = "template1", 1

# pg_largeobject and its index: catalogs by name, as large as the users made them.
_LARGE_OBJECTS: Final = frozenset({2613, 2683})

_HEAPS: Final = frozenset("rtm")
_SMALL: Final = 256
"""Pages; what has fewer is fetched whole."""
_WORTH: Final = 4
"""Blocks are cut out of a table where at most one in so many is wanted."""

_TOP: Final = frozenset(
    {
        "base",
        "global",
        "PG_VERSION",
        "backup_label",
        "tablespace_map",
        "pg_commit_ts",
        "pg_dynshmem",
        "pg_logical",
        "pg_multixact",
        "pg_notify",
        "pg_replslot",
        "pg_serial",
        "pg_snapshots",
        "pg_stat",
        "pg_stat_tmp",
        "pg_subtrans",
        "pg_tblspc",
        "pg_twophase",
        "pg_wal",
        "pg_xact",
    }
)
"""What a server needs of a data directory; a log folder or a stray file can be of any size."""


Called = tuple[str, str, str | int]
"""A database, and a schema and name, or "oid" or "filenode" and the number."""


@dataclass(frozen=True, slots=True)
class RelationKey:
    """A relation that somebody wants to read, by name, by `oid`, or by the `filenode` that WAL names.

    The name is that at the clone's target (found also where it was made after the backup). With a table
    come its TOAST relation, its indexes and its partitions. With `blocks` only these of its main fork are
    wanted, and no index (a small table comes whole all the same).
    """

    database: str
    schema: str = ""
    name: str = ""
    oid: int | None = None
    filenode: int | None = None
    blocks: frozenset[int] | None = None

    def __str__(self) -> str:
        what = f"{self.schema}.{self.name}" if self.name else f"relation {self.oid or self.filenode}"
        return f"{self.database}.{what}"

    @property
    def called(self) -> Called:
        """What it is called by."""
        if self.oid is not None:
            return self.database, "oid", self.oid
        if self.filenode is not None:
            return self.database, "filenode", self.filenode
        return self.database, self.schema, self.name


@dataclass(frozen=True, slots=True)
class Cut:
    """Blocks of a relation's main fork (at `path`, `pages` long) in place of all of it."""

    path: str
    blocks: frozenset[int]
    pages: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The files to fetch: `relations` (with all forks and segments), and of `whole` databases everything.

    `entrance` is a database whose catalogs are among them. Of relations in `cuts` only some blocks are fetched, of
    indexes in `stubs` (with their paths) the first.
    """

    relations: frozenset[Locator]
    whole: frozenset[int] = frozenset()
    cuts: Mapping[Locator, Cut] = field(default_factory=dict)
    stubs: Mapping[Locator, str] = field(default_factory=dict)
    entrance: str = _TEMPLATE1

    def wants(self, path: str) -> bool:
        """Whether the file at `path` (relative to the data directory) is fetched."""
        relation = locator_of(path)
        if relation is None:
            return path.split("/", 1)[0] in _TOP
        return relation in self.relations or relation[1] == 0 or relation[1] in self.whole

    def split(self, paths: Iterable[str]) -> tuple[frozenset[Locator], frozenset[Locator]]:
        """The relations among the backup's files that are fetched, and those left out."""
        present: set[Locator] = set()
        absent: set[Locator] = set()
        for path in paths:
            relation = locator_of(path)
            if relation is not None:
                (present if self.wants(path) or relation in self.cuts else absent).add(relation)
        return frozenset(present), frozenset(absent)


def select(
    found: RelationMap,
    paths: Iterable[str],
    keys: Collection[RelationKey],
    more: Collection[Locator] = (),
    pages: Callable[[str], int] = lambda path: 0,
) -> Selection:
    """What to fetch of a backup with the files `paths` to read `keys` (and the relations `more`).

    `pages` tells the length of the main fork at a path. Raises ObjectMissingError where the map of a wanted
    database was not recorded.
    """
    names = {key.database for key in keys}
    known = names & {relation.database for relation in found.relations}
    # A database that was made since has its catalogs in the WAL: nobody can log in to it before.
    entrance = min(known) if known == names else _TEMPLATE1
    names |= {entrance}
    for key in keys:
        if key.database in found.not_recorded:
            raise ObjectMissingError(
                f"the relations of database {key.database} were not recorded with the backup:"
                f" {found.not_recorded[key.database]}"
            )
    recorded = [relation for relation in found.relations if relation.database in names]
    meant = _meant(recorded, keys)
    wanted = set(more) | _recorded(found, recorded, meant)
    cuts, stubs = _cuts(found, meant, keys, pages)
    wanted -= cuts.keys() | stubs.keys()
    large = _places(relation for relation in recorded if relation.oid in _LARGE_OBJECTS) - wanted
    databases = {relation.database_oid for relation in recorded}
    numbers = {key.filenode for key in keys if key.filenode is not None}
    for path in paths:
        place = locator_of(path)
        if place is None or place in large or place[1] not in databases:
            continue
        if place[2] < _FIRST_NORMAL or place[2] in numbers:
            wanted.add(place)
    # Without its map nobody knows where a database's catalogs lie; it is small if nobody may enter it.
    whole = {_TEMPLATE1_OID} if entrance in found.not_recorded else set()
    return Selection(frozenset(wanted), frozenset(whole), cuts, stubs, entrance)


def _meant(recorded: Iterable[Relation], keys: Iterable[RelationKey]) -> Mapping[Called, Sequence[Relation]]:
    """The recorded relations that keys mean, by what these call them; there may be many of both."""
    meant: dict[Called, list[Relation]] = {key.called: [] for key in keys}
    for relation in recorded:
        database = relation.database
        for called in (
            (database, "oid", relation.oid),
            (database, "filenode", relation.filenode),
            (database, relation.schema, relation.name),
        ):
            if called in meant:
                meant[called].append(relation)
    return meant


def _cuts(
    found: RelationMap,
    meant: Mapping[Called, Sequence[Relation]],
    keys: Iterable[RelationKey],
    pages: Callable[[str], int],
) -> tuple[dict[Locator, Cut], dict[Locator, str]]:
    """What is not fetched whole: large tables of which few blocks are wanted, and their large indexes."""
    cuts: dict[Locator, Cut] = {}
    stubs: dict[Locator, str] = {}
    for key in keys:
        for relation in meant[key.called] if key.blocks is not None else ():
            place = locator_of(relation.path)
            if place is None or relation.kind not in _HEAPS:
                continue
            length = pages(relation.path)
            if length < _SMALL or len(key.blocks or ()) > length // _WORTH:
                continue
            cuts[place] = Cut(relation.path, key.blocks or frozenset(), length)
            for one in found.family(relation):
                index = locator_of(one.path)
                if one.kind == "i" and one.table == relation.oid and index and pages(one.path) >= _SMALL:
                    stubs[index] = one.path
    return cuts, stubs


def _recorded(
    found: RelationMap, recorded: Iterable[Relation], meant: Mapping[Called, Sequence[Relation]]
) -> set[Locator]:
    """The catalogs, the sequences (small, and which are a table's own is not recorded) and what is asked for."""
    wanted = _places(
        relation
        for relation in recorded
        if relation.kind == "S" or (relation.oid < _FIRST_NORMAL and relation.oid not in _LARGE_OBJECTS)
    )
    for relations in meant.values():
        for relation in relations:
            wanted |= _places(found.family(relation))
    return wanted


def _places(relations: Iterable[Relation]) -> set[Locator]:
    return {place for relation in relations if (place := locator_of(relation.path)) is not None}
