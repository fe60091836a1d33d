"""Foreign and unique keys around the rows of a revert: foreseen before it, proved before it commits.

Foreseen: rows that would point nowhere, good rows that point at what is to go, values that somebody else has
taken meanwhile. Proved, where the replication role keeps the server from checking: both sides of every foreign
key for the rows touched, the referenced rows held by a key share lock as the server's own trigger would.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from knockwood.history.transaction import TableId
from knockwood.postgres.connection import Connection
from knockwood.recover.plan.rows import Conflict, ConflictKind, ForeignKey, Operation, Row, UniqueKey
from knockwood.recover.revert_catalog import Catalog, LiveColumn
from knockwood.recover.revert_rows import PLACE, Given, given, run, text_rows

_ACTIONS = {"c": ", which ON {} CASCADE would {} too", "n": ", which ON {} SET NULL would {}"}

Texts = tuple[str | None, ...]


def key_conflicts(
    connection: Connection, catalog: Catalog, operations: Sequence[Operation]
) -> list[Conflict]:
    """What stands against the operations in other rows, as the connection's snapshot sees them."""
    found: list[Conflict] = []
    for key in catalog.schema.foreign:
        if key.child in catalog.tables and not key.period:
            found += _missing_parents(connection, catalog, operations, key)
        if key.parent in catalog.tables and not key.period:
            found += _children(connection, catalog, operations, key)
    for unique in catalog.schema.unique:
        found += _taken(connection, catalog, operations, unique)
    return found


def broken_keys(connection: Connection, catalog: Catalog, operations: Sequence[Operation]) -> list[str]:
    """Foreign keys that the touched rows break now, within the transaction that changed them; locks the
    referenced rows FOR KEY SHARE, so that they are still there when it commits."""
    problems = []
    for key in catalog.schema.foreign:
        if key.child in catalog.tables:
            pointing = [
                each
                for each in _written(operations, key.child, key.columns)
                if _given(each.final, key.columns)
            ]
            if pointing and not _all_held(connection, catalog, key, pointing):
                problems.append(f"rows of {key.child} would reference nothing ({key.name})")
        if key.parent in catalog.tables:
            leaving = _leaving(operations, key)
            if leaving and _orphans(connection, catalog, key, leaving):
                problems.append(
                    f"rows of {key.child} would lose the row of {key.parent} they reference ({key.name})"
                )
    return problems


def source(table: TableId, partitioned: bool) -> str:
    """A table as it stands in FROM."""
    name = ".".join('"' + part.replace('"', '""') + '"' for part in (table.schema, table.name))
    return name if partitioned else f"only {name}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _texts(row: Row, columns: Sequence[str]) -> Texts:
    return tuple(row[name].text for name in columns)


def _given(row: Row | None, columns: Sequence[str]) -> bool:
    return row is not None and all(row[name].text is not None for name in columns)


def _written(operations: Sequence[Operation], table: TableId, columns: Sequence[str]) -> list[Operation]:
    """Operations that give a row of the table new values in these columns."""
    return [
        each
        for each in operations
        if each.table == table
        and (each.kind == "insert" or (each.kind == "set" and set(each.columns) & set(columns)))
    ]


def _leaving(operations: Sequence[Operation], key: ForeignKey) -> list[Operation]:
    """Operations that take away a referenced value which no other row of the plan supplies."""
    supplied = {
        _texts(each.final, key.referenced)
        for each in operations
        if each.table == key.parent and each.final is not None
    }
    return [
        each
        for each in operations
        if each.table == key.parent
        and each.found is not None
        and (each.kind == "delete" or set(each.columns) & set(key.referenced))
        and _given(each.found.values, key.referenced)
        and _texts(each.found.values, key.referenced) not in supplied
    ]


def _columns(catalog: Catalog, table: TableId, names: Sequence[str]) -> list[LiveColumn]:
    return [catalog.tables[table].columns[name] for name in names]


def _value(row: Given, column: LiveColumn) -> str:
    return f"({row.values[column.name]}{column.collation})"


def _parent_of(key: ForeignKey, row: Given, columns: Sequence[LiveColumn]) -> str:
    """`t`, a row of the parent, is what `v`, values of the child, references."""
    return " and ".join(
        f"t.{_quoted(name)} {operator} {_value(row, column)}"
        for name, operator, column in zip(key.referenced, key.operators, columns, strict=True)
    )


def _child_of(key: ForeignKey, row: Given, columns: Sequence[LiveColumn], alias: str = "t") -> str:
    """`t`, a row of the child, references `v`, values of the parent."""
    return " and ".join(
        f"{_value(row, column)} {operator} {alias}.{_quoted(name)}"
        for name, operator, column in zip(key.columns, key.operators, columns, strict=True)
    )


def _missing_parents(
    connection: Connection, catalog: Catalog, operations: Sequence[Operation], key: ForeignKey
) -> Iterator[Conflict]:
    pointing = [
        each for each in _written(operations, key.child, key.columns) if _given(each.final, key.columns)
    ]
    if not pointing:
        return
    columns = _columns(catalog, key.child, key.columns)
    row = given(columns, [each.final or {} for each in pointing])
    parent = source(key.parent, key.parent_partitioned)
    cursor = run(
        connection,
        f"select v.n from {row.source} where not exists"
        f" (select from {parent} t where {_parent_of(key, row, columns)})",
        row.parameters,
    )
    missing = {int(str(n)) - 1 for (n,) in text_rows(cursor)}
    supplied = {
        _texts(each.final, key.referenced)
        for each in operations
        if each.table == key.parent and each.final is not None
    }
    leaving = {_texts(each.found.values, key.referenced) for each in _leaving(operations, key) if each.found}
    for number, each in enumerate(pointing):
        values = _texts(each.final or {}, key.columns)
        if values not in supplied and (number in missing or values in leaving):
            shown = ", ".join(f"{name}={value}" for name, value in zip(key.columns, values, strict=True))
            detail = f"{key.parent} has no row for {shown} ({key.name})"
            yield _conflict(catalog, each, ConflictKind.PARENT_MISSING, key.columns, detail)


def _children(
    connection: Connection, catalog: Catalog, operations: Sequence[Operation], key: ForeignKey
) -> Iterator[Conflict]:
    leaving = _leaving(operations, key)
    if not leaving:
        return
    # Children that this very plan takes away, or points elsewhere.
    gone = [
        each.found.place
        for each in operations
        if each.table == key.child
        and each.found
        and (each.final is None or _texts(each.final, key.columns) != _texts(each.found.values, key.columns))
    ]
    columns = _columns(catalog, key.parent, key.referenced)
    row = given(columns, [each.found.values for each in leaving if each.found])
    child = source(key.child, key.child_partitioned)
    for number, writers in _others(connection, row, child, _child_of(key, row, columns), gone).items():
        each = leaving[number]
        count = sum(writers.values())
        action = key.on_delete if each.kind == "delete" else key.on_update
        words = ("DELETE", "delete") if each.kind == "delete" else ("UPDATE", "change")
        detail = f"{count} row(s) of {key.child} reference it ({key.name})" + _ACTIONS.get(action, "").format(
            *words
        )
        conflict = _conflict(catalog, each, ConflictKind.CHILDREN, key.referenced, detail)
        yield _by(conflict, writers)


def _taken(
    connection: Connection, catalog: Catalog, operations: Sequence[Operation], unique: UniqueKey
) -> Iterator[Conflict]:
    taking = [
        each
        for each in _written(operations, unique.table, unique.columns)
        if _given(each.final, unique.columns)
    ]
    if not taking:
        return
    table = catalog.tables[unique.table]
    freed = [
        each.found.place
        for each in operations
        if each.table == unique.table
        and each.found
        and (
            each.final is None
            or _texts(each.final, unique.columns) != _texts(each.found.values, unique.columns)
        )
    ]
    columns = _columns(catalog, unique.table, unique.columns)
    row = given(columns, [each.final or {} for each in taking])
    matches = " and ".join(
        f"t.{column.quoted} {operator} {_value(row, column)}"
        for column, operator in zip(columns, unique.operators, strict=True)
    )
    for number, writers in _others(connection, row, table.source, matches, freed).items():
        detail = f"another row has its value of {unique.name}"
        conflict = _conflict(catalog, taking[number], ConflictKind.UNIQUE, unique.columns, detail)
        yield _by(conflict, writers)


def _others(
    connection: Connection, row: Given, table: str, matches: str, without: Sequence[str]
) -> dict[int, dict[int, int]]:
    """Rows of a table that match, by the position of what they match and their writer, counted."""
    found: dict[int, dict[int, int]] = defaultdict(dict)
    places = f"${len(row.parameters) + 1}::pg_catalog.text[]"
    cursor = run(
        connection,
        f"select v.n, t.xmin, pg_catalog.count(*) from {row.source} join {table} t on {matches}"
        f" where not exists (select from unnest({places}) p (place) where p.place = {PLACE}) group by 1, 2 order by 1",
        [*row.parameters, "{" + ",".join(f'"{place}"' for place in without) + "}"],
    )
    for n, xmin, count in text_rows(cursor):
        found[int(str(n)) - 1][int(str(xmin))] = int(str(count))
    return found


def _conflict(
    catalog: Catalog, operation: Operation, kind: ConflictKind, columns: Sequence[str], detail: str
) -> Conflict:
    key = operation.key(catalog.tables[operation.table].facts.key)
    xid = operation.changes[0][0]
    return Conflict(kind, operation.table, key, xid, tuple(columns), detail, changes=operation.changes)


def _by(conflict: Conflict, writers: dict[int, int]) -> Conflict:
    return replace(conflict, writers=tuple(sorted(writers)), count=sum(writers.values()))


def _all_held(
    connection: Connection, catalog: Catalog, key: ForeignKey, pointing: Sequence[Operation]
) -> bool:
    """Whether each row written references a row, which is now locked."""
    columns = _columns(catalog, key.child, key.columns)
    distinct = {_texts(each.final or {}, key.columns): each.final or {} for each in pointing}
    row = given(columns, list(distinct.values()))
    parent = source(key.parent, key.parent_partitioned)
    cursor = run(
        connection,
        f"select v.n from {row.source} join {parent} t on {_parent_of(key, row, columns)}"
        " order by v.n for key share of t",
        row.parameters,
    )
    return len({n for (n,) in text_rows(cursor)}) == len(distinct)


def _orphans(connection: Connection, catalog: Catalog, key: ForeignKey, leaving: Sequence[Operation]) -> bool:
    columns = _columns(catalog, key.parent, key.referenced)
    row = given(columns, [each.found.values for each in leaving if each.found])
    child = source(key.child, key.child_partitioned)
    parent = source(key.parent, key.parent_partitioned)
    # The operator's name between two values of the parent's type.
    still = " and ".join(
        f"p.{_quoted(name)} {operator} {_value(row, column)}"
        for name, operator, column in zip(key.referenced, key.operators, columns, strict=True)
    )
    cursor = run(
        connection,
        f"select v.n from {row.source} where exists (select from {child} t where {_child_of(key, row, columns)})"
        f" and not exists (select from {parent} p where {still}) limit 1",
        row.parameters,
    )
    return cursor.rowcount > 0
