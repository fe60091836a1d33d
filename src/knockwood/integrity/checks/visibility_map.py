"""The visibility map against the pages and rows it speaks of."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import psycopg
from psycopg import sql

from knockwood.host import clock
from knockwood.integrity.amcheck import is_gone
from knockwood.integrity.budget import pace
from knockwood.integrity.catalog import Relation
from knockwood.integrity.check import Outcome, Subject, Weight
from knockwood.integrity.checks.amcheck_heap import heaps
from knockwood.integrity.databases import attempt, in_each_database
from knockwood.integrity.extensions import absent, schema_of
from knockwood.model import Finding, Severity
from knockwood.postgres.connection import Connection

_ROUNDS: Final = 3
_PAUSE: Final = 0.2
_SHOWN: Final = 20

# Each gives block and row (0 for the whole page) of what contradicts the map.
_QUERIES: Final = {
    "frozen": "select t::text from {}.pg_check_frozen(%s::oid::regclass) as t",
    "visible": "select t::text from {}.pg_check_visible(%s::oid::regclass) as t",
    "page": (
        "select '(' || blkno || ',0)' from {}.pg_visibility(%s::oid::regclass)"
        " where all_visible and not pd_all_visible"
    ),
}
_WORDS: Final = {
    "frozen": "the visibility map says that every row of the page is frozen, and some are not",
    "visible": "the visibility map says that everybody sees every row of the page, and some they do not",
    "page": "the visibility map says that every row of the page is visible, and the page does not",
}


class VisibilityMap:
    """pg_check_frozen, pg_check_visible, and the map's bits against the pages' own flags."""

    name = "visibility_map"
    title = "Visibility maps against their tables (pg_visibility)"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        def look(connection: Connection, database: str) -> Iterator[Outcome]:
            schema = schema_of(subject, connection, "pg_visibility")
            if schema is None:
                yield absent(self.name, database, "pg_visibility")
                return
            for table in heaps(connection, database, subject.facts.in_recovery):
                pace(subject)
                what = f"database {database}, table {table.name}"
                yield from attempt(self.name, what, partial(_table, connection, schema, table))

        yield from in_each_database(subject, self.name, look)


def _table(connection: Connection, schema: str, table: Relation) -> Iterator[Finding]:
    for kind, text in _QUERIES.items():
        query = sql.SQL(text).format(sql.Identifier(schema))
        try:
            # Rows become visible, and bits are cleared, while it looks: what stays wrong is wrong.
            wrong = _tids(connection, query, table)
            for _ in range(_ROUNDS):
                if not wrong:
                    break
                clock.sleep(_PAUSE)
                wrong &= _tids(connection, query, table)
        except psycopg.Error:
            if connection.closed or not is_gone(connection, table):
                raise
            return
        yield from _findings(table, kind, wrong)


def _tids(connection: Connection, query: sql.Composed, table: Relation) -> set[tuple[int, int]]:
    found = set()
    for (text,) in connection.execute(query, [table.oid]).fetchall():
        block, item = text.strip("()").split(",")
        found.add((int(block), int(item)))
    return found


def _findings(table: Relation, kind: str, wrong: set[tuple[int, int]]) -> Iterator[Finding]:
    for block in sorted({block for block, _ in wrong}):
        items = sorted(item for other, item in wrong if other == block and item)
        evidence: dict[str, Any] = {"kind": kind, "items": items[:_SHOWN], "count": len(items)}
        yield Finding(
            VisibilityMap.name,
            Severity.HIGH,
            table.location(table.path, block),
            _WORDS[kind],
            "index-only scans return rows that are not there or hide the page's loss, and VACUUM passes the"
            " page over until transaction ids wrap around",
            "check the page itself first (page_checksums, lost_writes); if it is sound, rebuild the map:"
            f" SELECT pg_truncate_visibility_map('{table.name}'), then VACUUM {table.name}",
            evidence,
        )


CHECK = VisibilityMap()
