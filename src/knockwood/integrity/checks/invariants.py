"""The user's own rules: queries that return the rows that break them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import psycopg

from knockwood.integrity.budget import pace
from knockwood.integrity.check import Invariant, Outcome, Subject, Weight
from knockwood.integrity.databases import attempt, prepare
from knockwood.model import Finding, Location, Severity
from knockwood.postgres.connection import Connection

SHOWN: Final = 10
COUNTED: Final = 1000
_LONGEST: Final = 500


class Invariants:
    """Runs each invariant in a read-only transaction under the budget's timeouts; no row means it holds."""

    name = "invariants"
    title = "The invariants of the settings"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        for invariant in subject.invariants:
            pace(subject)
            yield from attempt(
                self.name, f'invariant "{invariant.name}"', partial(self._run, subject, invariant)
            )

    def _run(self, subject: Subject, invariant: Invariant) -> Iterator[Outcome]:
        with subject.connect(invariant.database) as connection:
            prepare(connection)
            connection.execute("reset search_path")  # the query was written for the role's own
            columns, found = breaking_rows(connection, invariant.sql)
            if not found:
                return
            count = f"{COUNTED} or more" if len(found) >= COUNTED else str(len(found))
            examples = [dict(zip(columns, row, strict=True)) for row in found[:SHOWN]]
            yield Finding(
                check=self.name,
                severity=Severity(invariant.severity),
                location=Location(
                    database=connection.info.dbname, key=", ".join(f"{k}={v}" for k, v in examples[0].items())
                ),
                summary=f'invariant "{invariant.name}" is broken by {count} row(s)',
                meaning="the data contradict a rule of the application",
                remedy="find who wrote these rows (knockwood blame) and since when (knockwood bisect)",
                evidence={"invariant": invariant.name, "rows": len(found), "examples": examples},
            )


def breaking_rows(connection: Connection, sql: str) -> tuple[list[str], list[tuple[str | None, ...]]]:
    """Column names and at most `COUNTED` rows, values as PostgreSQL prints them.

    The query becomes a cursor, sent as one statement: it can neither change anything nor bring a second
    statement along. Raises psycopg's errors.
    """
    connection.execute("begin read only")
    try:
        declaration = b"declare knockwood_invariant no scroll cursor for " + _statement(sql)
        connection.execute(declaration, prepare=True)
        cursor: psycopg.Cursor[Any] = connection.execute(
            f"fetch forward {COUNTED} from knockwood_invariant".encode()
        )
        result = cursor.pgresult
        assert result is not None
        names = [(result.fname(i) or b"?").decode("utf-8", "replace") for i in range(result.nfields)]
        found = [
            tuple(_text(result.get_value(r, c)) for c in range(result.nfields)) for r in range(result.ntuples)
        ]
    finally:
        connection.execute("rollback")
    return names, found


def _statement(sql: str) -> bytes:
    return sql.strip().rstrip(";").encode()


def _text(value: bytes | None) -> str | None:
    if value is None:
        return None
    return bytes(value).decode("utf-8", "replace")[:_LONGEST]


CHECK = Invariants()
