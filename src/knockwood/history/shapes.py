"""Tables as a clone's catalog has them at one point: which file is whose, columns, keys, partition roots."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg

from knockwood.errors import PostgresError
from knockwood.history.touched import FileId
from knockwood.history.transaction import TableId
from knockwood.integrity.fingerprint import Types
from knockwood.integrity.tables import open_pinned, types_of
from knockwood.postgres.connection import Connection, connect, translated

_SQL = Path(__file__).with_suffix(".sql").read_text()

LOCK_TIMEOUT_MS: Final = 10_000


@dataclass(frozen=True, slots=True)
class ColumnShape:
    """A column. `type` as SQL writes it, `type_oid` its number.

    `generated` is `s` (stored), `v` (virtual) or empty, `identity` is `a` (always), `d` (by default) or
    empty, as in pg_attribute. `send` is the SQL name of the type's send function, None where a value
    (or one inside of it) has none.
    """

    name: str
    number: int
    type: str
    type_oid: int
    not_null: bool
    generated: str
    identity: str
    send: str | None


@dataclass(frozen=True, slots=True)
class TableShape:
    """A table at one point in time. `key` are the columns that tell rows apart, `key_source` where they
    come from (`primary key`, `replica identity`, `unique index`, or empty: no key). `root` is the
    partitioned table that it belongs to, if any. `kind` and `persistence` are pg_class's letters.
    """

    table: TableId
    oid: int
    file: FileId
    kind: str
    persistence: str
    root: TableId | None
    root_oid: int
    columns: tuple[ColumnShape, ...]
    key: tuple[str, ...]
    key_source: str
    bytes: int
    toasted: bool

    @property
    def family(self) -> int:
        """Rows of one family may move from table to table: the partitioned table's number (its own where it
        is no partition) with that of the database, as a signed 64-bit number.
        """
        return (self.file[1] << 32 | (self.root_oid or self.oid)) - (1 << 63)


@dataclass(frozen=True, slots=True)
class Relation:
    """Any relation that has a file."""

    oid: int
    schema: str
    name: str
    kind: str
    persistence: str
    file: FileId

    @property
    def is_catalog(self) -> bool:
        return self.schema == "pg_catalog"

    @property
    def is_plain_table(self) -> bool:
        """An ordinary table or a partition, of users."""
        return self.kind == "r" and self.schema not in ("pg_catalog", "information_schema")


def databases_of(dsn: str) -> dict[int, str]:
    """Databases that take connections, by number."""
    with connect(dsn) as connection, translated():
        rows = connection.execute(
            "select oid::bigint, datname from pg_catalog.pg_database where datallowconn"
        ).fetchall()
    return dict(rows)


class Catalog:
    """A pinned connection to one database of a clone, with questions about its relations."""

    def __init__(self, dsn: str, database: str) -> None:
        self.database = database
        self.connection: Connection = open_pinned(dsn, None, LOCK_TIMEOUT_MS)
        self._types: Types | None = None

    @property
    def types(self) -> Types:
        if self._types is None:
            with translated():
                self._types = types_of(self.connection)
        return self._types

    def relations(self, files: Iterable[FileId], oids: Collection[int] = ()) -> dict[FileId, Relation]:
        """The relations that have one of the files, or one of the numbers, by file."""
        wanted = sorted({number for _, _, number in files})
        rows = self._rows("relations", {"files": wanted, "oids": sorted(oids)})
        found = (
            Relation(oid, schema, name, kind, persistence, (space, base, number))
            for oid, schema, name, kind, persistence, space, base, number in rows
        )
        return {relation.file: relation for relation in found}

    def owners(self, oids: Collection[int]) -> set[int]:
        """The tables that relations are, or belong to as index or TOAST; those that exist."""
        return {row[0] for row in self._rows("owners", {"oids": sorted(oids)})}

    def shapes(self, oids: Collection[int]) -> dict[int, TableShape]:
        """The shapes of tables, by oid; those that exist."""
        return {row[0]: self._shape(row) for row in self._rows("shapes", {"oids": sorted(oids)})}

    def named(self, schema: str | None, name: str) -> tuple[int, ...]:
        """The oids of the tables of that name (in any schema if None), and of the partitions below them."""
        return tuple(row[0] for row in self._rows("named", {"schema": schema, "name": name}))

    def unlogged(self) -> list[str]:
        """Tables whose changes no WAL tells."""
        return [row[0] for row in self._rows("unlogged", {})]

    def _rows(self, name: str, values: dict[str, Any]) -> list[tuple[Any, ...]]:
        with translated():
            return self.connection.execute(_query(name).encode(), values).fetchall()

    def _shape(self, row: tuple[Any, ...]) -> TableShape:
        (oid, schema, name, kind, persistence, space, base, number) = row[:8]
        (root_oid, root_schema, root_name, columns, key, key_source, size, toasted) = row[8:]
        return TableShape(
            table=TableId(self.database, schema, name),
            oid=oid,
            file=(space, base, number),
            kind=kind,
            persistence=persistence,
            root=TableId(self.database, root_schema, root_name) if root_name else None,
            root_oid=root_oid or 0,
            columns=tuple(self._column(*column) for column in columns or ()),
            key=tuple(key or ()),
            key_source=key_source or "",
            bytes=size,
            toasted=toasted,
        )

    def _column(
        self, name: str, number: int, kind: str, oid: int, not_null: bool, generated: str, identity: str
    ) -> ColumnShape:
        send = self.types[oid].send if oid in self.types and _sendable(oid, self.types) else None
        return ColumnShape(name, number, kind, oid, not_null, generated, identity, send)

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_catalog(dsn: str, database: str) -> Catalog:
    """Raises PostgresError where the database cannot be entered."""
    try:
        return Catalog(dsn, database)
    except psycopg.Error as error:
        raise PostgresError(str(error).strip(), where=f"database {database}") from error


def _sendable(oid: int, types: Types) -> bool:
    """Whether a value's binary image can be had: its type and all inside have a send function."""
    kind = types.get(oid)
    if kind is None or kind.send is None:
        return False
    return all(_sendable(inner, types) for inner in (kind.base, kind.element, *kind.parts) if inner)


def _query(name: str) -> str:
    """One of the queries of shapes.sql: they are set apart by lines `-- name:`."""
    _, _, rest = _SQL.partition(f"-- {name}:\n")
    if not rest:
        raise ValueError(f"no query {name}")
    return rest.partition("\n-- ")[0]
