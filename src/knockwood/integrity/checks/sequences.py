"""Sequences that will hand out numbers already used."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from knockwood.integrity.check import Outcome, Subject, Weight
from knockwood.integrity.databases import attempt, in_each_database, rows, sql_beside
from knockwood.model import Finding, Location, Severity
from knockwood.postgres.connection import Connection

_SEQUENCES = sql_beside(__file__)


class Sequences:
    """The next value of each sequence lies beyond every value of the columns it feeds.

    One statement reads both: the column as of its snapshot, the sequence (which knows no snapshot) later,
    so that a writer in between cannot look like damage.
    """

    name = "sequences"
    title = "Sequences are ahead of the columns they feed"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        return in_each_database(subject, self.name, self._look)

    def _look(self, connection: Connection, database: str) -> Iterator[Outcome]:
        for sequence, table, column, increment in rows(connection, _SEQUENCES):
            compare = partial(self._compare, connection, database, sequence, table, column, increment)
            yield from attempt(self.name, f"sequence {sequence} in database {database}", compare, connection)

    def _compare(
        self, connection: Connection, database: str, sequence: str, table: str, column: str, increment: int
    ) -> Iterator[Outcome]:
        furthest = "max" if increment > 0 else "min"
        [(last, called, used)] = rows(
            connection,
            f"select s.last_value, s.is_called,"
            f" (select pg_catalog.{furthest}({column})::numeric from {table})"
            f" from {sequence} s",
        )
        coming = last + increment if called else last
        if used is None or (coming > used if increment > 0 else coming < used):
            return
        yield Finding(
            check=self.name,
            severity=Severity.HIGH,
            location=Location(database=database, relation=table, key=f"{column}={used}"),
            summary=f"sequence {sequence} gives {coming} next, but {table}.{column} already holds {used}",
            meaning="inserts fail with duplicate keys or, with no unique index, two rows get one number",
            remedy=f"SELECT pg_catalog.setval('{_literal(sequence)}', {used});",
            evidence={
                "sequence": sequence,
                "last_value": last,
                "is_called": called,
                "increment": increment,
                f"{furthest}_in_table": str(used),
            },
        )


def _literal(text: str) -> str:
    return text.replace("'", "''")


CHECK = Sequences()
