"""Indexes that PostgreSQL keeps but does not use or trust."""

from __future__ import annotations

from collections.abc import Iterator

from knockwood.integrity.check import NotChecked, Outcome, Role, Subject, Weight
from knockwood.integrity.databases import in_each_database, rows, sql_beside
from knockwood.model import Finding, Location, Severity
from knockwood.postgres.connection import Connection

_INDEXES = sql_beside(__file__)


class InvalidIndexes:
    """Every index is valid, ready and live; one that is being built or dropped now is left out.

    A clone holds those half-built that were being built at its moment, and nothing there tells so.
    """

    name = "invalid_indexes"
    title = "Indexes are valid, ready and live"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        if subject.role is Role.CLONE:
            yield NotChecked(self.name, "a clone cannot tell which indexes were being built; the server can")
            return
        yield from in_each_database(subject, self.name, self._look)

    def _look(self, connection: Connection, database: str) -> Iterator[Outcome]:
        for index, table, valid, ready, live, unique, kind in rows(connection, _INDEXES):
            flags = {"indisvalid": valid, "indisready": ready, "indislive": live, "indisunique": unique}
            missing = ", ".join(
                name[5:] for name in ("indisvalid", "indisready", "indislive") if not flags[name]
            )
            yield Finding(
                check=self.name,
                severity=Severity.HIGH,
                location=Location(database=database, relation=table, index=index),
                summary=f"index {index} is not {missing}",
                meaning="queries do not use it"
                + (", it does not keep its key unique" if unique else "")
                + (", and writes pay for it all the same" if ready else ""),
                remedy="attach or build the missing index of each partition"
                if kind == "I"
                else f"REINDEX INDEX CONCURRENTLY {index}; or DROP INDEX CONCURRENTLY {index};",
                evidence=flags | {"relkind": kind},
            )


CHECK = InvalidIndexes()
