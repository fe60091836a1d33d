"""What relations are called: WAL knows them by their files' numbers only.

The catalogs' rows are not decoded. Names come from the live server and from the map that each backup has
of its time; where neither knows a file it is called by its number, never by a guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from knockwood.errors import KnockwoodError
from knockwood.postgres import catalog
from knockwood.postgres.catalog import NotRecorded, RelationRow
from knockwood.postgres.connection import connect
from knockwood.repository.backups.listing import Relation, list_backups, relation_map
from knockwood.repository.repository import Repository

FileKey = tuple[int, int]
"""Database oid (0 for relations all databases share) and relation file number, as in WAL."""


@dataclass(frozen=True, slots=True)
class RelationName:
    """A relation. `kind` is pg_class's letter; `owner` the oid of the table that an index or TOAST table
    belongs to. `source` says where the name comes from: live, or a backup's id.
    """

    database_oid: int
    database: str
    schema: str
    name: str
    oid: int
    filenode: int
    kind: str
    owner: int | None
    source: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def is_table(self) -> bool:
        """A table whose rows are anybody's: no index, no TOAST table, no sequence."""
        return self.kind in "rm"


class RelationNames:
    """Names by file, from the newest source that knows one: the live server, then backup after backup."""

    def __init__(self, repository: Repository, dsn: str | None = None) -> None:
        self.problems: list[str] = []
        self._known: dict[FileKey, RelationName] = {}
        self._all: list[RelationName] = []
        self._databases: dict[int, str] = {}
        self._sources = self._load(repository, dsn)

    def of(self, database: int, filenode: int) -> RelationName | None:
        """The relation whose main fork that file is or was; None where no source knows."""
        key = (database, filenode)
        while key not in self._known and next(self._sources, None) is not None:
            pass
        return self._known.get(key)

    def text(self, database: int, filenode: int) -> str:
        """The name, or `filenode DATABASE/NUMBER`."""
        known = self.of(database, filenode)
        return str(known) if known is not None else f"filenode {self.database(database)}/{filenode}"

    def database(self, oid: int) -> str:
        """A database's name, or its number."""
        if oid == 0:
            return "global"
        while oid not in self._databases and next(self._sources, None) is not None:
            pass
        return self._databases.get(oid, str(oid))

    def find(self, name: str) -> tuple[RelationName, ...]:
        """Every file, of whatever time, of the tables that `[[database.]schema.]table` may mean.

        A table's files are found by its name and then by its oid, so under older names too. (A file that
        came and went between two backups is known to nobody.)
        """
        for _ in self._sources:
            pass
        parts = name.split(".")
        named = {
            (one.database_oid, one.oid)
            for one in self._all
            if [one.database, one.schema, one.name][-len(parts) :] == parts and one.is_table
        }
        return tuple(one for one in self._all if (one.database_oid, one.oid) in named)

    def _load(self, repository: Repository, dsn: str | None) -> Iterator[None]:
        if dsn is not None:
            try:
                self._live(dsn)
            except KnockwoodError as error:
                self.problems.append(f"the live server did not tell its relations' names: {error.what}")
            yield
        for backup in reversed(list_backups(repository)):
            try:
                for relation in relation_map(repository, backup).relations:
                    self._add(_recorded(relation, backup.id))
            except KnockwoodError as error:
                self.problems.append(f"the names recorded with backup {backup.id}: {error.what}")
            yield

    def _live(self, dsn: str) -> None:
        with connect(dsn) as connection:
            databases = catalog.databases(connection)
        self._databases |= {one.oid: one.name for one in databases}
        for database, row in catalog.relations_everywhere(dsn, databases):
            if isinstance(row, NotRecorded):
                self.problems.append(f"relations of {row.database} have no live names: {row.reason}")
            else:
                self._add(_from_row(database.oid, database.name, row))

    def _add(self, one: RelationName) -> None:
        if one.database_oid:
            self._databases.setdefault(one.database_oid, one.database)
        key = (one.database_oid, one.filenode)
        if key not in self._known:
            self._known[key] = one
            self._all.append(one)


def _from_row(oid: int, database: str, row: RelationRow) -> RelationName:
    return RelationName(
        0 if row.shared else oid, database, row.schema, row.name, row.oid, row.filenode, row.kind, row.table, "live"
    )  # fmt: skip


def _recorded(one: Relation, backup: str) -> RelationName:
    return RelationName(
        0 if one.shared else one.database_oid, one.database, one.schema, one.name, one.oid, one.filenode,
        one.kind, one.table, backup,
    )  # fmt: skip
