"""Rows that share a key which is declared unique."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from knockwood.integrity.check import NotChecked, Outcome, Subject, Weight
from knockwood.integrity.databases import EXAMPLES, attempt, heap_only, in_each_database, rows, sql_beside
from knockwood.model import Finding, Location, Severity
from knockwood.postgres.connection import Connection

_INDEXES = sql_beside(__file__)

PAIRWISE_ROWS: Final = 20_000
"""Rows of a table up to which an exclusion constraint without an equality is checked pair by pair."""


@dataclass(frozen=True, slots=True)
class UniqueIndex:
    """A unique index, or the index of an exclusion constraint (then `operators` are its operators)."""

    index: str
    table: str
    unique: bool
    nulls_distinct: bool
    predicate: str
    expressions: list[str]
    collations: list[str]
    special: bool
    operators: list[str] | None
    shared: bool
    rows: int

    @property
    def keys(self) -> list[str]:
        return [f"({e}){c}" for e, c in zip(self.expressions, self.collations, strict=True)]


def duplicates_query(index: UniqueIndex) -> str:
    """Groups of rows with one key: how many groups, rows in this one, some ctids, and the key as text."""
    names = [f"k{number}" for number in range(len(index.keys))]
    keys = ", ".join(f"{key} as {name}" for key, name in zip(index.keys, names, strict=True))
    given = " and ".join(f"{name} is not null" for name in names) if index.nulls_distinct else "true"
    shown = " || ', ' || ".join(f"coalesce({name}::pg_catalog.text, 'null')" for name in names)
    return (
        f"select pg_catalog.count(*) over (), pg_catalog.count(*),"
        f" (pg_catalog.array_agg(c::pg_catalog.text))[1:{EXAMPLES}], {shown}"
        f" from (select ctid as c, {keys} from only {index.table} where {index.predicate}) s"
        f" where {given} group by {', '.join(names)} having pg_catalog.count(*) > 1 limit {EXAMPLES}"
    )


def conflicts_query(index: UniqueIndex) -> str:
    """Pairs of rows that an exclusion constraint forbids, in the shape of `duplicates_query`."""
    assert index.operators is not None
    names = [f"k{number}" for number in range(len(index.keys))]
    keys = ", ".join(f"{key} as {name}" for key, name in zip(index.keys, names, strict=True))
    source = f"(select ctid as c, {keys} from only {index.table} where {index.predicate})"
    matches = [
        f"a.{name}{collation} {operator} b.{name}{collation}"
        for name, operator, collation in zip(names, index.operators, index.collations, strict=True)
    ]
    shown = " || ', ' || ".join(f"coalesce(a.{name}::pg_catalog.text, 'null')" for name in names)
    return (
        f"select pg_catalog.count(*) over (), 2, array[a.c::pg_catalog.text, b.c::pg_catalog.text], {shown}"
        f" from {source} a join {source} b on {' and '.join(matches)} and a.c < b.c limit {EXAMPLES}"
    )


class UniqueKeys:
    """Groups the rows of each table by its unique keys, from the table itself: an index that lost an entry
    lets a second row in, and a lost write brings an old one back."""

    name = "unique_keys"
    title = "Unique keys are unique in the tables themselves"
    weight = Weight.HEAVY

    def run(self, subject: Subject) -> Iterator[Outcome]:
        self_seen: set[str] = set()
        return in_each_database(subject, self.name, partial(self._look, self_seen))

    def _look(self, seen: set[str], connection: Connection, database: str) -> Iterator[Outcome]:
        heap_only(connection)
        for row in rows(connection, _INDEXES):
            index = UniqueIndex(*row)
            if index.shared and index.index in seen:
                continue
            if index.shared:
                seen.add(index.index)
            look = partial(self._duplicates, connection, database, index)
            yield from attempt(self.name, f"{index.index} in database {database}", look, connection)

    def _duplicates(self, connection: Connection, database: str, index: UniqueIndex) -> Iterator[Outcome]:
        if index.operators is None and index.special:
            reason = "its operator class has an equality of its own"
            yield NotChecked(self.name, f"{index.index} in database {database}: {reason}")
            return
        if index.operators is not None and not _feasible(index):
            reason = f"{index.rows} rows are too many to compare each with each"
            yield NotChecked(self.name, f"{index.index} in database {database}: {reason}")
            return
        query = duplicates_query(index) if index.operators is None else conflicts_query(index)
        found = rows(connection, query)
        if not found:
            return
        columns = ", ".join(index.expressions)
        yield Finding(
            check=self.name,
            severity=Severity.CRITICAL,
            location=Location(
                database=None if index.shared else database,
                relation=index.table,
                index=index.index,
                key=f"({columns})=({found[0][3]})",
            ),
            summary=f"{found[0][0]} key(s) of {index.table}, unique by {index.index}, are there twice",
            meaning="the index lost entries, or old rows came back: lookups give one of several rows",
            remedy="compare the rows with a clone, delete the wrong ones, then REINDEX"
            f" {'INDEX ' if index.table.startswith('pg_') else 'INDEX CONCURRENTLY '}{index.index};",
            evidence={
                "keys": found[0][0],
                "examples": [{"key": key, "rows": count, "ctids": ctids} for _, count, ctids, key in found],
            },
        )


def _feasible(index: UniqueIndex) -> bool:
    equality = any(operator.endswith(".=)") for operator in index.operators or ())
    return equality or index.rows <= PAIRWISE_ROWS


CHECK = UniqueKeys()
