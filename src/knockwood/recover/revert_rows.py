"""Reading the rows of now, and writing them: one statement for all rows of a table, values as arrays of text.

Values travel as the text that the type's own input function reads, inside an array literal of the column's
exact type, so neither a cast of the user's nor the client's idea of a type comes in between. Before anything
is written the server is asked for their images, and those must be the images wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from psycopg import DataError, NotSupportedError, RawCursor
from psycopg.errors import UndefinedObject, UndefinedTable

from knockwood.errors import RefusedError
from knockwood.history.transaction import ColumnValue, TableId
from knockwood.postgres.connection import Connection
from knockwood.recover.plan.rows import Current, Found, Operation, Row, RowKey, cell
from knockwood.recover.revert_catalog import Catalog, LiveColumn, LiveTable

Wanted = Mapping[TableId, Mapping[RowKey, Row]]
Version = tuple[str, int]
"""Where a row version lies (`tableoid:ctid`) and who wrote it (raw xmin)."""

PLACE = "t.tableoid::pg_catalog.int8::pg_catalog.text || ':' || t.ctid::pg_catalog.text"


def literal(values: Iterable[str | None], delimiter: str = ",") -> str:
    """An array literal whose elements are read by the element type's input function."""
    elements = (
        "NULL" if value is None else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        for value in values
    )
    return "{" + delimiter.join(elements) + "}"


@dataclass(frozen=True, slots=True)
class Given:
    """Rows of values as a FROM item `v`, its parameters, and the expression of each column."""

    source: str
    parameters: list[str]
    values: Mapping[str, str]


def given(
    columns: Sequence[LiveColumn], rows: Sequence[Row], more: Mapping[str, Sequence[str]] | None = None
) -> Given:
    """The rows' columns, and `more` columns of type text, as `v`; `v.n` counts the rows from 1."""
    parameters, items, names, values = [], [], [], {}
    for number, column in enumerate(columns):
        parameters.append(literal((row[column.name].text for row in rows), column.delimiter))
        items.append(f"${number + 1}::{column.array}")
        names.append(f"c{number}")
        values[column.name] = f"v.c{number}{column.cast}"
    for name, texts in (more or {}).items():
        parameters.append(literal(texts))
        items.append(f"${len(parameters)}::pg_catalog.text[]")
        names.append(name)
    source = f"unnest({', '.join(items)}) with ordinality v({', '.join([*names, 'n'])})"
    return Given(source, parameters, values)


def run(connection: Connection, statement: str, parameters: Sequence[str]) -> RawCursor[Any]:
    """Execute with `$1` parameters whose types the statement names."""
    cursor: RawCursor[Any] = RawCursor(connection)
    cursor.execute(statement.encode(), parameters)
    return cursor


def key_match(table: LiveTable, row: Given) -> str:
    """`t` is the row that `v` gives the key of."""
    return " and ".join(
        f"t.{table.columns[name].quoted} {table.operators[name]} ({row.values[name]}{table.columns[name].collation})"
        for name in table.facts.key
    )


def _image_match(table: LiveTable, row: Given, names: Sequence[str]) -> str:
    """`t` equals `v` in every byte. Only an operator between records can be joined by sorting."""
    left = ", ".join(f"t.{table.columns[name].quoted}" for name in names)
    right = ", ".join(row.values[name] for name in names)
    return f"row({left})::record operator(pg_catalog.*=) row({right})::record"


def _matching(table: LiveTable, wanted: Sequence[Row]) -> tuple[Given, str]:
    names = table.facts.key or tuple(name for name in table.facts.columns if name in wanted[0])
    row = given([table.columns[name] for name in names], wanted)
    return row, key_match(table, row) if table.facts.key else _image_match(table, row, names)


def read_current(connection: Connection, catalog: Catalog, wanted: Wanted) -> Current:
    """The rows of now at the keys asked for, as the connection's snapshot sees them."""
    found = {}
    for table, keys in wanted.items():
        live = catalog.tables[table]
        asked = _askable(live, keys)
        found[table] = _read(connection, live, asked) if asked else {}
    return Current(found)


def _askable(table: LiveTable, keys: Mapping[RowKey, Row]) -> dict[RowKey, Row]:
    """Keys that can be looked for: with every column that the table has for it."""
    names = table.facts.key or table.facts.columns
    return {key: row for key, row in keys.items() if all(name in row for name in names)}


def ordered(wanted: Wanted) -> Wanted:
    """The keys in the order in which rows are read and locked: the same for everybody who reverts."""
    return {
        table: {key: wanted[table][key] for key in sorted(wanted[table], key=_order)}
        for table in sorted(wanted)
    }


def _order(key: RowKey) -> tuple[bytes, ...]:
    return tuple(
        cell if isinstance(cell, bytes) else (cell or "").encode("utf-8", "surrogateescape") for cell in key
    )


def _read(
    connection: Connection, table: LiveTable, asked: Mapping[RowKey, Row]
) -> dict[RowKey, tuple[Found, ...]]:
    keys = list(asked)
    row, matches = _matching(table, list(asked.values()))
    texts = [f"t.{column.quoted}" for column in table.columns.values()]
    images = [
        column.send.format(f"t.{column.quoted}") if column.send else "null"
        for column in table.columns.values()
    ]
    cursor = run(
        connection,
        f"select v.n, {PLACE}, t.xmin, {', '.join(texts + images)}"
        f" from {row.source} join {table.source} t on {matches} order by v.n",
        row.parameters,
    )
    found: dict[RowKey, list[Found]] = {}
    for n, place, xmin, *values in text_rows(cursor):
        half = len(texts)
        key = keys[int(n) - 1]
        known = asked[key]
        cells = {}
        for name, text, image in zip(table.columns, values[:half], values[half:], strict=True):
            if name in table.facts.columns or name in table.facts.key:
                value = ColumnValue(text, None if image is None else bytes.fromhex(image[2:]))
                # Most are as the transaction left them: one value does for both, of a million rows.
                cells[name] = known[name] if known.get(name) == value else value
        found.setdefault(key, []).append(Found(place, int(xmin), cells))
    return {key: tuple(rows) for key, rows in found.items()}


def text_rows(cursor: RawCursor[Any]) -> Iterable[list[Any]]:
    """Rows as the server's output functions print them: no loader of the driver's comes in between."""
    result = cursor.pgresult
    assert result is not None
    columns = range(result.nfields)
    for number in range(result.ntuples):
        values = (result.get_value(number, column) for column in columns)
        # What is not UTF-8, in a database of encoding SQL_ASCII, is kept byte by byte (postgres/bytetext.py).
        yield [None if value is None else bytes(value).decode("utf-8", "surrogateescape") for value in values]


def read_versions(
    connection: Connection, catalog: Catalog, wanted: Wanted
) -> dict[TableId, dict[RowKey, list[Version]]]:
    """Which versions lie at the keys now: equal to an earlier answer means that nothing has changed."""
    versions: dict[TableId, dict[RowKey, list[Version]]] = {}
    for table, keys in wanted.items():
        live = catalog.tables[table]
        asked = _askable(live, keys)
        versions[table] = {}
        if asked:
            row, matches = _matching(live, list(asked.values()))
            cursor = run(
                connection,
                f"select v.n, {PLACE}, t.xmin from {row.source} join {live.source} t on {matches}",
                row.parameters,
            )
            order = list(asked)
            for n, place, xmin in text_rows(cursor):
                versions[table].setdefault(order[int(n) - 1], []).append((place, int(xmin)))
    return versions


def lock(connection: Connection, table: LiveTable, operations: Sequence[Operation]) -> int:
    """Lock the rows of these operations FOR UPDATE in the order of their keys; how many were there."""
    found = sorted(
        (each for each in operations if each.found is not None),
        key=lambda each: _order(_row_key(table, each)),
    )
    if not found:
        return 0
    row, matches = _by_row(table, found)
    cursor = run(
        connection,
        f"select v.n from {row.source} join {table.source} t on {matches} order by v.n for update of t",
        row.parameters,
    )
    return cursor.rowcount


def _row_key(table: LiveTable, operation: Operation) -> RowKey:
    assert operation.found is not None
    row = operation.found.values
    return tuple(cell(row[name]) for name in table.facts.key) or (operation.found.place,)


def _by_row(
    table: LiveTable,
    operations: Sequence[Operation],
    more: Sequence[LiveColumn] = (),
    values: Sequence[Row] = (),
) -> tuple[Given, str]:
    """The rows of operations as they are now, by key, or where there is none by their place.

    `more` columns of the rows `values` come along; a key column's value as it is now is named `key N`.
    """
    key = [table.columns[name] for name in table.facts.key]
    found = [each.found for each in operations]
    renamed = [replace(column, name=f"key {column.name}") for column in key]
    merged: list[dict[str, ColumnValue]] = []
    for number, each in enumerate(found):
        assert each is not None
        line = {f"key {column.name}": each.values[column.name] for column in key}
        if more:
            line |= {column.name: values[number][column.name] for column in more}
        merged.append(line)
    places = {} if key else _places([each.place for each in found if each is not None])
    row = given([*renamed, *more], merged, places)
    if not key:
        # A ctid stays where it is while its row is locked.
        return row, "t.ctid = v.ctid::pg_catalog.tid and t.tableoid = v.relation::pg_catalog.oid"
    matches = " and ".join(
        f"t.{column.quoted} {table.operators[column.name]} ({row.values[f'key {column.name}']}{column.collation})"
        for column in key
    )
    return row, matches


def _places(places: Sequence[str]) -> dict[str, list[str]]:
    parts = [place.partition(":") for place in places]
    return {"relation": [part[0] for part in parts], "ctid": [part[2] for part in parts]}


def delete(connection: Connection, table: LiveTable, operations: Sequence[Operation]) -> int:
    """Delete the rows of these operations; how many were deleted."""
    row, matches = _by_row(table, operations)
    return run(
        connection, f"delete from {table.source} t using {row.source} where {matches}", row.parameters
    ).rowcount


def update(
    connection: Connection,
    table: LiveTable,
    operations: Sequence[Operation],
    columns: Sequence[str],
    null: bool = False,
) -> int:
    """Set these columns of the operations' rows to their final values, or to NULL; how many were set."""
    live = [table.columns[name] for name in columns]
    finals = [each.final or {} for each in operations]
    row, matches = _by_row(table, operations, () if null else live, finals)
    values = {column.name: "null" if null else row.values[column.name] for column in live}
    setting = ", ".join(f"{column.quoted} = {values[column.name]}" for column in live)
    statement = f"update {table.source} t set {setting} from {row.source} where {matches}"
    return run(connection, statement, row.parameters).rowcount


def fill(
    connection: Connection, table: LiveTable, operations: Sequence[Operation], columns: Sequence[str]
) -> int:
    """Give inserted rows, found by their new key, the columns that were left NULL; how many."""
    names = [*table.facts.key, *columns]
    row = given([table.columns[name] for name in names], [each.final or {} for each in operations])
    setting = ", ".join(f"{table.columns[name].quoted} = {row.values[name]}" for name in columns)
    statement = f"update {table.source} t set {setting} from {row.source} where {key_match(table, row)}"
    return run(connection, statement, row.parameters).rowcount


def insert(
    connection: Connection, table: LiveTable, operations: Sequence[Operation], withheld: Sequence[str] = ()
) -> int:
    """Insert the operations' final rows, without the columns withheld; how many. Identity is as given."""
    finals = [each.final or {} for each in operations]
    columns = [column for column in table.stored if column.name in finals[0] and column.name not in withheld]
    row = given(columns, finals)
    names = ", ".join(column.quoted for column in columns)
    values = ", ".join(row.values[column.name] for column in columns)
    target = table.source.removeprefix("only ")
    statement = f"insert into {target} ({names}) overriding system value select {values} from {row.source} order by v.n"
    return run(connection, statement, row.parameters).rowcount


def require_images(
    connection: Connection, table: LiveTable, names: Sequence[str], rows: Sequence[Row]
) -> None:
    """Raise RefusedError unless the server reads each value's text as the very image wanted."""
    columns = [table.columns[name] for name in names if table.columns[name].send]
    if not columns or not rows:
        return
    row = given(columns, rows)
    images = ", ".join(str(column.send).format(row.values[column.name]) for column in columns)
    try:
        cursor = run(connection, f"select {images} from {row.source} order by v.n", row.parameters)
    except (DataError, NotSupportedError, UndefinedObject, UndefinedTable) as error:
        # Some types show what they would not take: a timestamp(0) rounded past the last one, a name that is gone.
        raise RefusedError(
            f"the server does not read a value of {table.facts.table} back: {error.diag.message_primary}",
            hint="set that value by hand, or restore the table instead",
        ) from error
    for wanted, values in zip(rows, text_rows(cursor), strict=True):
        for column, image in zip(columns, values, strict=True):
            want = wanted[column.name].image
            if want is not None and (image is None or bytes.fromhex(image[2:]) != want):
                raise RefusedError(
                    f"the server does not read a value of {table.facts.table}.{column.name} as it was stored",
                    hint=f"the type {column.type} does not come back from its text; restore the table instead",
                )
