"""Collations whose library sorts otherwise than when the indexes were built."""

from __future__ import annotations

from collections.abc import Iterator

from knockwood.integrity.check import NotChecked, Outcome, Subject, Weight
from knockwood.integrity.databases import in_each_database, rows, sql_beside
from knockwood.model import Finding, Location, Severity
from knockwood.postgres.connection import Connection

_COLLATIONS = sql_beside(__file__)

_DEFAULT = b"""
select d.datcollversion, pg_catalog.pg_database_collation_actual_version(d.oid), d.datcollate,
       d.datlocprovider::text
from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()
"""


class Collations:
    """The version of each collation in use is the one its indexes were built with."""

    name = "collations"
    title = "Collation versions are those the indexes were built with"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        yield from in_each_database(subject, self.name, self._look)

    def _look(self, connection: Connection, database: str) -> Iterator[Outcome]:
        if connection.info.server_version >= 150000:
            yield from self._default(connection, database)
        else:
            yield from self._default_unknown(connection, database)
        for name, recorded, actual, dependents in rows(connection, _COLLATIONS):
            yield self._finding(
                database,
                f"collation {name}",
                recorded,
                actual,
                f"REINDEX the indexes that use it, then ALTER COLLATION {name} REFRESH VERSION;",
                {"collation": name, "dependents": dependents},
            )

    def _default(self, connection: Connection, database: str) -> Iterator[Outcome]:
        [(recorded, actual, locale, provider)] = rows(connection, _DEFAULT)
        if recorded is None and actual is not None:
            yield NotChecked(
                self.name,
                f"database {database}: the version of its default collation was never recorded;"
                " REINDEX, then ALTER DATABASE ... REFRESH COLLATION VERSION",
            )
        elif recorded != actual:
            quoted = database.replace('"', '""')
            yield self._finding(
                database,
                f"the default collation ({locale})",
                recorded,
                actual,
                f'REINDEX DATABASE "{quoted}"; ALTER DATABASE "{quoted}" REFRESH COLLATION VERSION;',
                {"collation": "default", "locale": locale, "provider": provider},
            )

    def _default_unknown(self, connection: Connection, database: str) -> Iterator[Outcome]:
        [(locale,)] = rows(
            connection,
            b"select datcollate from pg_catalog.pg_database where datname = pg_catalog.current_database()",
        )
        if locale not in ("C", "POSIX"):
            yield NotChecked(
                self.name,
                f"database {database}: PostgreSQL 14 does not record the version of the default collation",
            )

    def _finding(
        self,
        database: str,
        what: str,
        recorded: str | None,
        actual: str | None,
        remedy: str,
        evidence: dict[str, object],
    ) -> Finding:
        return Finding(
            check=self.name,
            severity=Severity.HIGH,
            location=Location(database=database),
            summary=f"{what} was version {recorded}, the library now is {actual}",
            meaning="indexes on text may be sorted wrongly: lookups miss rows, unique keys let duplicates in",
            remedy=remedy,
            evidence={**evidence, "recorded": recorded, "actual": actual},
        )


CHECK = Collations()
