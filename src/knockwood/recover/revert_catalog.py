"""The tables that a revert touches, as the live server has them: columns, keys, constraints, triggers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from knockwood.errors import RefusedError
from knockwood.history.transaction import TableId
from knockwood.integrity.databases import rows
from knockwood.integrity.fingerprint import Type, Types
from knockwood.integrity.tables import types_of
from knockwood.postgres.connection import Connection, translated
from knockwood.recover.plan.rows import ForeignKey, Schema, TableFacts, UniqueKey
from knockwood.recover.sql import sql

_QUERIES = sql(__file__)


@dataclass(frozen=True, slots=True)
class LiveColumn:
    """A column as statements write it.

    `array` is the type of an array of its values, `cast` what such an element still needs; `type` and `oid`
    are the column's type; `send` its image as an expression over `{}`, None where the type has none.
    """

    name: str
    quoted: str
    array: str
    delimiter: str
    cast: str
    send: str | None
    collation: str
    type: str
    oid: int


@dataclass(frozen=True, slots=True)
class LiveTable:
    """A table as statements write it. `source` has ONLY where rows of inheritance children do not belong."""

    facts: TableFacts
    source: str
    columns: Mapping[str, LiveColumn]
    operators: Mapping[str, str]

    @property
    def stored(self) -> tuple[LiveColumn, ...]:
        return tuple(self.columns[name] for name in self.facts.columns)


@dataclass(frozen=True, slots=True)
class Catalog:
    """What was read. `roots` leads from a partition to the table that rows are read and written through."""

    schema: Schema
    tables: Mapping[TableId, LiveTable]
    roots: Mapping[TableId, TableId]


def read_catalog(connection: Connection, wanted: Collection[TableId]) -> Catalog:
    """Read what the connection's database says about these tables; the session must be pinned.

    Raises RefusedError for a table that is gone, renamed, or holds no rows of its own that last.
    """
    with translated():
        oids, roots = _roots(connection, wanted)
        types = types_of(connection)
        columns: dict[int, list[Any]] = defaultdict(list)
        for row in rows(connection, _QUERIES["columns"], list(oids)):
            columns[row[0]].append(row[1:])
        keys = {
            oid: (names, operators)
            for oid, names, operators in rows(connection, _QUERIES["keys"], list(oids))
        }
        writers: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for oid, name, enabled in rows(connection, _QUERIES["writers"], list(oids)):
            writers[oid].append((name, enabled))
        tables = {
            table: _table(table, kind, quoted, columns[oid], keys.get(oid), writers[oid], types)
            for oid, (table, kind, quoted) in oids.items()
        }
        foreign = _foreign(connection, oids, next(iter(wanted)).database)
        unique, unread = _unique(connection, oids)
    facts = {table: live.facts for table, live in tables.items()}
    return Catalog(Schema(facts, foreign, unique, unread), tables, roots)


Oids = dict[int, tuple[TableId, str, str]]


def _roots(connection: Connection, wanted: Collection[TableId]) -> tuple[Oids, dict[TableId, TableId]]:
    """The root tables by oid, and the way there from each table asked for."""
    oids: Oids = {}
    roots: dict[TableId, TableId] = {}
    asked = sorted(wanted)
    found = {
        (schema, name): rest
        for schema, name, *rest in rows(
            connection, _QUERIES["roots"], [each.schema for each in asked], [each.name for each in asked]
        )
    }
    for table in asked:
        if (table.schema, table.name) not in found:
            raise RefusedError(
                f"there is no table {table} now",
                hint="was it dropped or renamed since? Its rows have no place",
            )
        oid, kind, persistence, schema, name, quoted = found[table.schema, table.name]
        if kind not in ("r", "p") or persistence != "p":
            raise RefusedError(f"{table} is not an ordinary, logged table")
        roots[table] = TableId(table.database, schema, name)
        oids[oid] = (roots[table], kind, quoted)
    return oids, roots


def _table(
    table: TableId,
    kind: str,
    quoted: str,
    columns: list[Any],
    key: tuple[list[str], list[str]] | None,
    writers: list[tuple[str, str]],
    types: Types,
) -> LiveTable:
    live = {}
    for name, quoted_name, _, _, typ, array_type, delimiter, collation, type_oid in columns:
        # unnest() of composites would make a column of each of their parts.
        array = None if _base(type_oid, types).kind == "c" else array_type
        live[name] = LiveColumn(
            name,
            quoted_name,
            array or "pg_catalog.text[]",
            delimiter if array else ",",
            "" if array else f"::{typ}",
            _image(type_oid, types),
            collation,
            typ,
            type_oid,
        )
    names, operators = key or ([], [])
    facts = TableFacts(
        table,
        columns=tuple(row[0] for row in columns if not row[2]),
        key=tuple(names),
        generated=frozenset(row[0] for row in columns if row[2]),
        nullable=frozenset(row[0] for row in columns if not row[3]),
        partitioned=kind == "p",
        writers=tuple(name for name, enabled in writers if enabled in "OA"),
        always=tuple(name for name, enabled in writers if enabled in "AR"),
    )
    source = quoted if kind == "p" else f"only {quoted}"
    return LiveTable(facts, source, live, dict(zip(names, operators, strict=True)))


def _base(oid: int, types: Types) -> Type:
    kind = types[oid]
    while kind.kind == "d":
        kind = types[kind.base]
    return kind


def _image(oid: int, types: Types) -> str | None:
    """The expression for a value's image over `{}`; None where the type cannot be sent."""
    kind = _base(oid, types)
    cast = "" if kind.oid == oid else f"::{kind.name}"
    return f"{kind.send}({{}}{cast})" if _sendable(oid, types) else None


def _sendable(oid: int, types: Types) -> bool:
    kind = types.get(oid)
    if kind is None or kind.send is None:
        return False
    inner = [each for each in (kind.base, kind.element, *kind.parts) if each]
    return all(_sendable(each, types) for each in inner)


def _foreign(connection: Connection, oids: Oids, database: str) -> tuple[ForeignKey, ...]:
    found = []
    for row in rows(connection, _QUERIES["foreign"], list(oids)):
        child, parent = TableId(database, *row[1:3]), TableId(database, *row[3:5])
        found.append(
            ForeignKey(
                name=row[0],
                child=child,
                parent=parent,
                columns=tuple(row[5]),
                referenced=tuple(row[6]),
                operators=tuple(row[7]),
                on_update=row[8],
                on_delete=row[9],
                deferrable=row[10],
                full=row[11],
                period=row[12],
                child_partitioned=row[13],
                parent_partitioned=row[14],
            )
        )
    return tuple(found)


def _unique(connection: Connection, oids: Oids) -> tuple[tuple[UniqueKey, ...], tuple[str, ...]]:
    known, unread = [], []
    for oid, name, columns, operators, immediate, nulls, plain in rows(
        connection, _QUERIES["unique"], list(oids)
    ):
        table = oids[oid][0]
        if plain:
            known.append(UniqueKey(name, table, tuple(columns), tuple(operators), not immediate, nulls))
        else:
            unread.append(f"{name} on {table}")
    return tuple(known), tuple(unread)


def may_take_replica_role(connection: Connection) -> bool:
    """Whether the session may set session_replication_role."""
    with translated():
        found = rows(
            connection,
            "select pg_catalog.has_parameter_privilege(current_user, 'session_replication_role', 'set')",
        )
    return bool(found[0][0])
