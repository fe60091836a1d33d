"""What a check is: a name, a weight, and a function from a subject to findings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from knockwood.model import Finding, Severity, Verdict
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.postgres.connection import Connection, ServerFacts, connect, translated, with_words
from knockwood.repository.repository import Repository


class Weight(StrEnum):
    """Light checks run on a primary; heavy ones read so much that they belong on a clone."""

    LIGHT = "light"
    HEAVY = "heavy"


class Role(StrEnum):
    PRIMARY = "primary"
    STANDBY = "standby"
    CLONE = "clone"


@dataclass(frozen=True, slots=True)
class Invariant:
    """A query of the user's that returns the rows that break it."""

    name: str
    sql: str
    database: str | None = None
    severity: Severity = Severity.HIGH


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of a production server checks may take.

    `max_load` is the load average per core above which a check waits between pieces of work.
    """

    max_load: float | None = None
    statement_timeout: timedelta = timedelta(minutes=5)
    lock_timeout: timedelta = timedelta(milliseconds=500)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often backups are to be taken, and how long a proof counts; the settings' own defaults."""

    full: timedelta = timedelta(weeks=1)
    incremental: timedelta | None = None
    proof: timedelta = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Subject:
    """The server under examination. `data_directory` is None without local reach; then what needs files is
    not checked. `repository` and `programs` are None where there is none. `state` is the folder where this
    machine remembers what need not be looked at twice; without it everything is."""

    cluster: str
    dsn: str
    facts: ServerFacts
    role: Role = Role.PRIMARY
    data_directory: Path | None = None
    repository: Repository | None = None
    programs: Programs | None = None
    invariants: tuple[Invariant, ...] = ()
    budget: Budget = field(default_factory=Budget)
    state: Path | None = None
    schedule: Schedule = field(default_factory=Schedule)

    @property
    def server_programs(self) -> Programs:
        """PostgreSQL's programs of the server's version: those named, or found. Raises ProgramsMissingError."""
        return self.programs or find_programs(self.facts.major)

    def connect(self, database: str | None = None) -> Connection:
        """A connection under the budget's timeouts, with a fixed search_path; close it yourself."""
        dsn = with_words(self.dsn, dbname=database) if database else self.dsn
        connection = connect(dsn, application_name="knockwood check")
        with translated():
            connection.execute(
                "select pg_catalog.set_config('statement_timeout', %s, false),"
                " pg_catalog.set_config('lock_timeout', %s, false),"
                " pg_catalog.set_config('search_path', 'pg_catalog', false)",
                [
                    str(int(self.budget.statement_timeout.total_seconds() * 1000)),
                    str(int(self.budget.lock_timeout.total_seconds() * 1000)),
                ],
            )
        return connection

    def databases(self) -> list[str]:
        """The databases that take connections, template1 and postgres included, by name."""
        with connect(self.dsn) as connection, translated():
            rows = connection.execute(
                "select datname from pg_catalog.pg_database where datallowconn order by datname"
            ).fetchall()
        return [row[0] for row in rows]


@dataclass(frozen=True, slots=True)
class NotChecked:
    """Something a check could not look at, and why."""

    check: str
    reason: str

    def as_json(self) -> dict[str, str]:
        return {"check": self.check, "reason": self.reason}


Outcome = Finding | NotChecked


class Check(Protocol):
    """One kind of damage looked for. `run` yields what it finds; an error it raises becomes NotChecked."""

    name: str
    title: str
    weight: Weight

    def run(self, subject: Subject) -> Iterator[Outcome]: ...


@dataclass(frozen=True, slots=True)
class CheckResult:
    """How one check ended."""

    name: str
    findings: tuple[Finding, ...]
    not_checked: tuple[NotChecked, ...]
    seconds: float

    @property
    def verdict(self) -> Verdict:
        if self.findings:
            return Verdict.BROKEN
        return Verdict.NOT_CHECKED if self.not_checked else Verdict.HELD
