"""The rows that a question means: found by a WHERE expression, in a transaction that can only read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import psycopg

from knockwood.errors import ObjectMissingError, PostgresError
from knockwood.history.chains import Place, ctid, parse_place
from knockwood.history.reading import qualified, quoted
from knockwood.history.shapes import TableShape, open_catalog
from knockwood.history.touched import FileId
from knockwood.history.transaction import TableId
from knockwood.operations.diff import name_parts
from knockwood.operations.where import checked_expression
from knockwood.postgres.connection import Connection, connect, translated, with_words

# Values are shown the same way everywhere, and read the same way in the expression.
_SETTINGS = {
    "TimeZone": "UTC",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    # A policy that hides rows makes the query fail: an answer that lacks rows would be wrong.
    "row_security": "off",
}


@dataclass(frozen=True, slots=True)
class Question:
    """Rows of a table: `where` is None for all of them. `database` None: the dsn's."""

    database: str | None
    schema: str | None
    name: str
    where: str | None

    @classmethod
    def of(cls, table: str, where: str | None) -> Question:
        """Read `[[DATABASE.]SCHEMA.]NAME` and an expression; raises UsageError."""
        parts = name_parts(table)
        expression = checked_expression(where) if where is not None else None
        database = parts[0] if len(parts) == 3 else None
        return cls(database, parts[-2] if len(parts) > 1 else None, parts[-1], expression)

    @property
    def condition(self) -> str:
        """As it goes into a query: in brackets of its own, and on lines of its own."""
        return f"(\n{self.where}\n)" if self.where is not None else "true"


@dataclass(frozen=True, slots=True)
class Table:
    """A table, or a partitioned one with its partitions. `files` and `shapes` by the oid of each leaf."""

    id: TableId
    key: tuple[str, ...]
    files: Mapping[int, FileId]
    shapes: Mapping[int, TableShape]


@dataclass(frozen=True, slots=True)
class Found:
    """A row as it lies there: its leaf table, key, place and raw xmin."""

    table: TableId
    oid: int
    key: Mapping[str, str | None]
    ctid: str
    xmin: int

    @property
    def place(self) -> Place:
        return parse_place(self.ctid)


def table_of(dsn: str, asked: Question) -> Table:
    """Look the table up. Raises ObjectMissingError where there is none of that name, or several."""
    database = asked.database
    with connect(with_words(dsn, dbname=database) if database else dsn) as connection, translated():
        row = connection.execute(
            "select pg_catalog.current_database(), c.oid::bigint, n.nspname from pg_catalog.pg_class c"
            " join pg_catalog.pg_namespace n on n.oid = c.relnamespace"
            " where c.relname = %(name)s and c.relkind in ('r', 'p') and case when %(schema)s::text is null"
            " then pg_catalog.pg_table_is_visible(c.oid) else n.nspname = %(schema)s end",
            {"name": asked.name, "schema": asked.schema},
        ).fetchone()
    if row is None:
        name = f"{asked.schema}.{asked.name}" if asked.schema else asked.name
        raise ObjectMissingError(
            f"there is no table {name}",
            where=f"database {database}" if database else None,
            hint="write SCHEMA.NAME, or DATABASE.SCHEMA.NAME; was it dropped? `knockwood log` tells by whom",
        )
    database, oid, schema = row
    with open_catalog(with_words(dsn, dbname=database), database) as catalog:
        shapes = catalog.shapes(catalog.named(schema, asked.name))
    leaves = {number: shape for number, shape in shapes.items() if shape.kind == "r"}
    return Table(
        TableId(database, schema, asked.name),
        shapes[oid].key,
        {number: shape.file for number, shape in leaves.items()},
        leaves,
    )


def select_rows(
    dsn: str, table: Table, asked: Question, limit: int, timeout: float
) -> tuple[list[Found], bool]:
    """At most `limit` matching rows, and whether there are more. Raises PostgresError."""
    name = f"{quoted(table.id.schema)}.{quoted(table.id.name)}"
    query = f"select {_wanted(table.key)} from {name} t where {asked.condition} limit {limit + 1}"
    with connect(with_words(dsn, dbname=table.id.database)) as connection:
        rows = run_read_only(connection, query, timeout)
    found = [_found(table, row) for row in rows[:limit]]
    return found, len(rows) > limit


def rows_at(
    connection: Connection,
    table: Table,
    shape: TableShape,
    places: Collection[Place],
    asked: Question,
    timeout: float,
) -> list[Found]:
    """Of the rows of one leaf that lie at some places, those that match and can be seen."""
    tids = ",".join(f"'{ctid(place)}'" for place in sorted(places))
    query = (
        f"select {_wanted(table.key)} from only {qualified(shape)} t"
        f" where t.ctid = any(array[{tids}]::pg_catalog.tid[]) and {asked.condition}"
    )
    return [_found(table, row) for row in run_read_only(connection, query, timeout)]


def _wanted(key: Sequence[str]) -> str:
    return ", ".join(["t.tableoid", "t.ctid", "t.xmin", *(f"t.{quoted(name)}" for name in key)])


def run_read_only(connection: Connection, query: str, timeout: float) -> list[list[str | None]]:
    """Run one statement in a transaction that can only read; its rows as the server prints them.

    Prepared, it is one statement or an error, whatever was in it.
    """
    try:
        with connection.transaction(), connection.cursor() as cursor:
            cursor.execute("set transaction read only")
            settings = _SETTINGS | {"statement_timeout": str(int(timeout * 1000))}
            for name, value in settings.items():
                cursor.execute("select pg_catalog.set_config(%s, %s, true)", [name, value])
            cursor.execute(query.encode("utf-8", "surrogateescape"), prepare=True)
            result = cursor.pgresult
            assert result is not None
            width = range(result.nfields)
            return [
                [_text(result.get_value(row, column)) for column in width] for row in range(result.ntuples)
            ]
    except psycopg.errors.QueryCanceled as error:
        raise PostgresError(
            f"the query took longer than {timeout:g} s",
            hint="give an expression that an index serves, or more time with --statement-timeout",
        ) from error
    except (psycopg.OperationalError, psycopg.errors.InsufficientPrivilege):
        with translated():
            raise
    except psycopg.Error as error:
        raise PostgresError(
            str(error).strip().splitlines()[0], hint="is the expression one that could stand after WHERE?"
        ) from error


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")


def _found(table: Table, row: Sequence[str | None]) -> Found:
    oid, place, xmin = row[:3]
    assert oid is not None
    assert place is not None
    assert xmin is not None
    shape = table.shapes[int(oid)]
    return Found(shape.table, int(oid), dict(zip(table.key, row[3:], strict=True)), place, int(xmin))
