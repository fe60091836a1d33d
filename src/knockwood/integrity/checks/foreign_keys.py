"""Rows whose foreign key points nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from knockwood.integrity.check import Outcome, Subject, Weight
from knockwood.integrity.databases import EXAMPLES, attempt, heap_only, in_each_database, rows, sql_beside
from knockwood.model import Finding, Location, Severity
from knockwood.postgres.connection import Connection

_KEYS = sql_beside(__file__)


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """A foreign key; all names quoted. `period` (from 18): its last columns are ranges to be covered."""

    name: str
    table: str
    kind: str
    target: str
    target_kind: str
    match: str
    validated: bool
    period: bool
    columns: list[str]
    target_columns: list[str]
    operators: list[str]
    collations: list[str]


def orphans_query(key: ForeignKey) -> str:
    """A query for the rows that break the key: count of all, then ctid and key columns as text.

    MATCH FULL also refuses keys of which some columns are null.
    """
    shown = " || ', ' || ".join(f"coalesce(r.{column}::text, 'null')" for column in key.columns)
    all_given = " and ".join(f"r.{column} is not null" for column in key.columns)
    broken = f"{all_given} and not exists ({_target_query(key)})"
    if key.match == "f" and len(key.columns) > 1:
        some_given = " or ".join(f"r.{column} is not null" for column in key.columns)
        some_null = " or ".join(f"r.{column} is null" for column in key.columns)
        broken = f"({broken}) or (({some_given}) and ({some_null}))"
    return (
        f"select pg_catalog.count(*) over (), r.ctid::text, {shown}"
        f" from {_source(key.table, key.kind)} r where {broken} limit {EXAMPLES}"
    )


def _source(table: str, kind: str) -> str:
    # A plain parent's key does not bind its inheritance children; a partitioned table's binds all its rows.
    return table if kind == "p" else f"only {table}"


def _target_query(key: ForeignKey) -> str:
    matches = [
        f"t.{remote}{collation} {operator} r.{local}{collation}"
        for local, remote, operator, collation in zip(
            key.columns, key.target_columns, key.operators, key.collations, strict=True
        )
    ]
    source = _source(key.target, key.target_kind)
    if not key.period:
        return f"select from {source} t where {' and '.join(matches)}"
    remote, local = key.target_columns[-1], key.columns[-1]
    overlapping = [*matches[:-1], f"t.{remote} operator(pg_catalog.&&) r.{local}"]
    return (
        f"select from (select pg_catalog.range_agg(t.{remote}) as covered from {source} t"
        f" where {' and '.join(overlapping)}) x where x.covered operator(pg_catalog.@>) r.{local}"
    )


class ForeignKeys:
    """An anti-join per foreign key over the tables: triggers may have been off, and indexes may lie."""

    name = "foreign_keys"
    title = "Every foreign key points at a row"
    weight = Weight.HEAVY

    def run(self, subject: Subject) -> Iterator[Outcome]:
        return in_each_database(subject, self.name, self._look)

    def _look(self, connection: Connection, database: str) -> Iterator[Outcome]:
        heap_only(connection)
        for row in rows(connection, _KEYS):
            key = ForeignKey(*row)
            look = partial(self._orphans, connection, database, key)
            yield from attempt(
                self.name, f"{key.name} on {key.table} in database {database}", look, connection
            )

    def _orphans(self, connection: Connection, database: str, key: ForeignKey) -> Iterator[Outcome]:
        found = rows(connection, orphans_query(key))
        if not found:
            return
        count = found[0][0]
        columns = ", ".join(key.columns)
        yield Finding(
            check=self.name,
            severity=Severity.HIGH,
            location=Location(database=database, relation=key.table, key=f"({columns})=({found[0][2]})"),
            summary=f"{count} row(s) of {key.table} break {key.name}: no row of {key.target} matches",
            meaning="rows were lost from the referenced table, or written while the constraint did not fire",
            remedy=f"bring the missing rows of {key.target} back from a clone, or remove the orphans",
            evidence={
                "constraint": key.name,
                "referenced": key.target,
                "rows": count,
                "validated": key.validated,
                "examples": [{"ctid": ctid, "key": values} for _, ctid, values in found],
            },
        )


CHECK = ForeignKeys()
