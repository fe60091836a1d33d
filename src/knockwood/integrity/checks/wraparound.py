"""How near the cluster is to running out of transaction and multixact numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from knockwood.integrity.check import Outcome, Subject, Weight
from knockwood.integrity.databases import rows
from knockwood.model import Finding, Location, Severity

WARN_AGE: Final = 500_000_000
CRITICAL_AGE: Final = 1_600_000_000

_AGES = b"""
select datname, pg_catalog.age(datfrozenxid), pg_catalog.mxid_age(datminmxid), datallowconn
from pg_catalog.pg_database order by datname
"""


def severity_of(age: int) -> Severity | None:
    """How bad an age in transactions is; None while it is harmless."""
    if age > CRITICAL_AGE:
        return Severity.CRITICAL
    return Severity.HIGH if age > WARN_AGE else None


class Wraparound:
    """No database's oldest transaction or multixact is near the two billion at which writes stop."""

    name = "wraparound"
    title = "Transaction and multixact age"
    weight = Weight.LIGHT

    def run(self, subject: Subject) -> Iterator[Outcome]:
        with subject.connect() as connection:
            found = rows(connection, _AGES)
        for database, xid_age, multixact_age, connectable in found:
            for kind, age in (("transaction", xid_age), ("multixact", multixact_age)):
                severity = severity_of(age)
                if severity is not None:
                    yield self._finding(database, kind, age, severity, connectable)

    def _finding(self, database: str, kind: str, age: int, severity: Severity, connectable: bool) -> Finding:
        return Finding(
            check=self.name,
            severity=severity,
            location=Location(database=database),
            summary=f"the oldest {kind} id of database {database} is {age:,} old",
            meaning="at about 2.1 billion the server takes no more writes, so that no row becomes invisible",
            remedy="end old transactions, prepared ones and unused slots; then VACUUM (FREEZE)"
            + ("" if connectable else " (allow connections to this database first)"),
            evidence={"kind": kind, "age": age},
        )


CHECK = Wraparound()
