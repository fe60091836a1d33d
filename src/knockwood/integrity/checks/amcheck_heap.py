"""amcheck's verify_heapam over every table, materialized view, catalog and TOAST table."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

import psycopg

from knockwood.integrity.amcheck import HeapDamage, is_gone, verify_heap
from knockwood.integrity.catalog import Relation, relations, stake
from knockwood.integrity.check import NotChecked, Outcome, Subject, Weight
from knockwood.integrity.databases import attempt, in_each_database
from knockwood.integrity.extensions import absent, schema_of
from knockwood.model import Finding, Severity
from knockwood.postgres.connection import Connection

_LISTED_SINGLY: Final = 200


class AmcheckHeap:
    """Rows, their headers and their TOAST values as verify_heapam sees them; past unreadable pages too."""

    name = "amcheck_heap"
    title = "Tables and TOAST values (verify_heapam)"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        def look(connection: Connection, database: str) -> Iterator[Outcome]:
            schema = schema_of(subject, connection, "amcheck")
            if schema is None:
                yield absent(self.name, database, "amcheck")
                return
            for relation in heaps(connection, database, subject.facts.in_recovery):
                yield from attempt(
                    self.name,
                    f"database {database}, table {relation.name}",
                    partial(_table, subject, connection, schema, relation),
                )

        yield from in_each_database(subject, self.name, look)


def heaps(connection: Connection, database: str, in_recovery: bool) -> list[Relation]:
    """The database's tables, materialized views and TOAST tables in heap storage that can be read."""
    return [
        relation
        for relation in relations(connection, database)
        if relation.kind in ("r", "m", "t")
        and relation.method == "heap"
        and relation.persistence != "t"
        and not (in_recovery and relation.persistence == "u")
    ]


def _table(subject: Subject, connection: Connection, schema: str, relation: Relation) -> Iterator[Outcome]:
    damaged: list[HeapDamage] = []
    try:
        for damage in verify_heap(subject, connection, schema, relation):
            if damage.path is not None:
                yield NotChecked(
                    AmcheckHeap.name,
                    f"the TOAST values of {relation.name} could not all be followed: {damage.messages[0]}",
                )
            else:
                damaged.append(damage)
    except psycopg.Error:
        if connection.closed or not is_gone(connection, relation):
            yield from _findings(relation, damaged)
            raise
    yield from _findings(relation, damaged)


def _findings(relation: Relation, damaged: list[HeapDamage]) -> Iterator[Finding]:
    many = len(damaged) > _LISTED_SINGLY
    what = stake(relation, "main")
    for damage in damaged[:1] if many else damaged:
        evidence = (
            {"blocks": [d.block for d in damaged], "messages": list(damage.messages)}
            if many
            else {"messages": list(damage.messages)}
        )
        count = f"{len(damaged)} blocks are damaged, the first: " if many else ""
        yield Finding(
            AmcheckHeap.name,
            Severity.CRITICAL,
            relation.location(relation.path, None if many else damage.block),
            f"{count}{damage.messages[0]}",
            what.meaning,
            what.remedy,
            evidence | ({"toast_of": relation.owner} if relation.kind == "t" else {}),
        )


CHECK = AmcheckHeap()
