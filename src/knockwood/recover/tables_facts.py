"""What has to be known of a table, on a clone and on the live server, before it is brought back in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from knockwood.errors import ObjectMissingError, RefusedError
from knockwood.postgres.connection import Connection, translated
from knockwood.recover.plan.table import Comparison, TableState
from knockwood.recover.sql import sql
from knockwood.recover.table_definition import TableName

_SQL = sql(__file__)
_EXAMPLES = 20
_BATCH = 5000


@dataclass(frozen=True, slots=True)
class Shape:
    """A table's build. `columns` are (quoted name, type, generated); `key` the columns that tell rows apart."""

    oid: int
    name: str
    kind: str
    columns: tuple[tuple[str, str, bool], ...]
    key: tuple[str, ...]
    triggers: tuple[tuple[str, str], ...]
    rules: bool

    @property
    def stored(self) -> tuple[str, ...]:
        """The columns whose values are written, not computed."""
        return tuple(name for name, _, generated in self.columns if not generated)

    @property
    def source(self) -> str:
        return f"only {self.name}" if self.kind == "r" else self.name

    def row(self, alias: str = "") -> str:
        return "row(" + ", ".join(f"{alias}{name}" for name in self.stored) + ")"


def ask(connection: Connection, query: str, **words: Any) -> list[tuple[Any, ...]]:
    """The rows of one of the queries in the .sql file."""
    with translated():
        return connection.execute(_SQL[query], words).fetchall()


def shape(connection: Connection, table: TableName) -> Shape | None:
    """The table's build, None if there is no table of that name; RefusedError for a view or the like."""
    rows = ask(connection, "table", schema=table.schema, table=table.table)
    if not rows:
        return None
    oid, kind, _, rules = rows[0]
    if kind not in ("r", "p"):
        raise RefusedError(f"{table} is not a table", hint="views and sequences hold no rows to bring back")
    key = ask(connection, "key", oid=oid)
    return Shape(
        oid,
        qualified(connection, table.schema, table.table)[0],
        kind,
        tuple((name, kind_of, generated) for name, kind_of, generated in ask(connection, "columns", oid=oid)),
        tuple(key[0][0]) if key else (),
        tuple((name, enabled) for name, enabled in ask(connection, "triggers", oid=oid)),
        rules,
    )


def required_shape(connection: Connection, table: TableName) -> Shape:
    """The same, on a clone; raises ObjectMissingError if there is no such table."""
    found = shape(connection, table)
    if found is None:
        raise ObjectMissingError(
            f"there is no table {table} at that point",
            hint="was it created later, or dropped before? Choose another point in time",
        )
    return found


def qualified(connection: Connection, schema: str, name: str) -> tuple[str, bool]:
    """The quoted, qualified name, and whether something of that name is there."""
    row = ask(connection, "names", schema=schema, table=name)[0]
    return str(row[0]), bool(row[1])


def count(connection: Connection, source: str) -> int:
    with translated():
        row: Any = connection.execute(f"select pg_catalog.count(*) from {source}".encode()).fetchone()
    return int(row[0])


def names(connection: Connection, query: str, **words: Any) -> tuple[str, ...]:
    return tuple(str(row[0]) for row in ask(connection, query, **words))


def state_of(source: Connection, live: Connection, then: Shape, now: Shape | None, mode: str) -> TableState:
    """What a plan needs to know; both sessions must be pinned."""
    oids = [row[0] for row in ask(source, "tree", oid=then.oid)]
    rows = count(source, then.source)
    if now is None:
        views = (qualified(live, schema, name) for schema, name, _ in ask(source, "views", oids=oids))
        return TableState(
            False,
            rows,
            referring=names(source, "referring", oid=then.oid),
            referred=names(source, "referred", oid=then.oid),
            views=tuple(name for name, there in views if not there),
            left_out=tuple(f"publication {name}" for name in names(source, "publications", oids=oids)),
        )
    return TableState(
        True,
        rows,
        key=now.key if now.key == then.key else (),
        hindrances=tuple(_hindrances(live, then, now, mode)),
        referring=names(live, "referring", oid=now.oid),
        referred=names(live, "referred", oid=now.oid),
    )


def _hindrances(live: Connection, then: Shape, now: Shape, mode: str) -> Iterator[str]:
    if differences := _differences(then, now):
        yield (
            f"{now.name} has been altered since: {differences} (bring it back beside, or rename it and"
            " bring the old one back under its name)"
        )
    if now.key != then.key:
        yield f"the key of {now.name} is ({', '.join(now.key)}) now, it was ({', '.join(then.key)})"
    if now.rules:
        yield f"{now.name} has rules, which would change what is written"
    if now.kind == "p" and now.triggers:
        yield f"{now.name} is partitioned and has triggers, which would fire"
    if mode == "keep-restored" and (ties := names(live, "cascading", oid=now.oid, key=list(now.key))):
        yield f"putting rows back would cascade to other tables by {', '.join(ties)}"


def _differences(then: Shape, now: Shape) -> str:
    before = {name: (kind, generated) for name, kind, generated in then.columns}
    after = {name: (kind, generated) for name, kind, generated in now.columns}
    parts = [f"column {name} is gone" for name in before if name not in after]
    parts += [f"column {name} is new" for name in after if name not in before]
    parts += [
        f"column {name} was {before[name][0]} and is {after[name][0]}"
        for name in before
        if name in after and before[name] != after[name]
    ]
    return ", ".join(parts)


def compare(source: Connection, live: Connection, then: Shape, now: Shape) -> Comparison:
    """Compare every row by key, in bounded memory; both sessions must be pinned. Locks nothing.

    Rows come from both servers in the order of a hash of their keys, which needs no common collation.
    """
    counts = {"same": 0, "missing": 0, "changed": 0, "newer": 0}
    examples: list[str] = []
    with _ordered(source, then) as old, _ordered(live, now) as new:
        before, after = next(old, None), next(new, None)
        while before is not None or after is not None:
            if after is None or (before is not None and before[:2] < after[:2]):
                counts["missing"] += 1
                before = next(old, None)
            elif before is None or after[:2] < before[:2]:
                counts["newer"] += 1
                after = next(new, None)
            else:
                same = before[2] == after[2]
                counts["same" if same else "changed"] += 1
                if not same and len(examples) < _EXAMPLES:
                    examples.append(after[1].decode())
                before, after = next(old, None), next(new, None)
    return Comparison(**counts, examples=tuple(examples))


_Row = tuple[int, bytes, int]


@contextmanager
def _ordered(connection: Connection, table: Shape) -> Iterator[Iterator[_Row]]:
    """Rows as (hash of the key, the key's text, hash of the row), sorted by the first two as bytes."""
    key = "row(" + ", ".join(table.key) + ")::text"
    query = (
        "select pg_catalog.hashtextextended(k, 0), pg_catalog.convert_to(k, 'UTF8'), r"
        f" from (select {key} k, pg_catalog.hashtextextended({table.row()}::text, 0) r"
        f" from {table.source}) rows order by 1, 2"
    )
    with translated(), connection.transaction(), connection.cursor("knockwood_rows") as cursor:
        cursor.itersize = _BATCH
        cursor.execute(query.encode())
        yield ((int(key_hash), bytes(text), int(row_hash)) for key_hash, text, row_hash in cursor)
