"""What a bisection asks of each state: an invariant, any SQL, or a check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final, Literal

import psycopg
from psycopg import conninfo

from knockwood.clone.copies import copy_of
from knockwood.clone.registry import Registry
from knockwood.clone.spawn import Clone
from knockwood.errors import KnockwoodError, UsageError
from knockwood.integrity.check import Budget, Role, Subject
from knockwood.integrity.checks.invariants import COUNTED, breaking_rows
from knockwood.integrity.databases import prepare
from knockwood.integrity.registry import select
from knockwood.integrity.run import reason_of
from knockwood.model import Verdict
from knockwood.operations.cluster import Cluster
from knockwood.operations.examination import ABOUT_THE_SERVER, examine
from knockwood.postgres.connection import connect, server_facts

SHOWN: Final = 10
"""Rows that an answer shows of those that break the rule."""

Kind = Literal["invariant", "check", "sql"]


@dataclass(frozen=True, slots=True)
class Question:
    """Bad is: `sql` returns a row, or the check `name` finds something. `database` is where the SQL runs."""

    kind: Kind
    name: str
    sql: str | None = None
    database: str = "postgres"
    timeout: timedelta = timedelta(minutes=5)

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "sql": self.sql,
            "database": self.database if self.sql else None,
        }


@dataclass(frozen=True, slots=True)
class Seen:
    """What a state answered: with BROKEN how many rows or findings and the first of them, with NOT_CHECKED why."""

    verdict: Verdict
    count: int = 0
    examples: tuple[dict[str, Any], ...] = ()
    reason: str = ""


def question(
    cluster: Cluster,
    *,
    invariant: str | None = None,
    check: str | None = None,
    sql: str | None = None,
    database: str | None = None,
    timeout: timedelta | None = None,
) -> Question:
    """The one thing asked; UsageError unless it is exactly one, and known."""
    if sum(given is not None for given in (invariant, check, sql)) != 1:
        raise UsageError(
            "say one thing to look for",
            hint="knockwood bisect --invariant NAME, or --check NAME, or --sql 'select ... the bad rows'",
        )
    home = database or database_of(cluster.dsn)
    limit = timeout or timedelta(minutes=5)
    if sql is not None:
        if not sql.strip().rstrip(";").strip():
            raise UsageError("the SQL is empty", hint="write a query that returns the bad rows")
        return Question("sql", "the SQL given", sql, home, limit)
    if check is not None:
        chosen = select([check])[0].name
        if chosen in ABOUT_THE_SERVER:
            raise UsageError(f"{chosen} asks how the server is run; the past cannot answer that")
        return Question("check", chosen, timeout=limit)
    return _of_invariant(cluster, invariant or "", database, limit)


def _of_invariant(cluster: Cluster, name: str, database: str | None, limit: timedelta) -> Question:
    known = {each.name: each for each in cluster.invariants()}
    if name not in known:
        listed = ", ".join(sorted(known)) or "none"
        raise UsageError(f"no invariant is called {name!r}", hint=f"the settings hold: {listed}")
    found = known[name]
    home = database or found.database or database_of(cluster.dsn)
    return Question("invariant", name, found.sql, home, limit)


def database_of(dsn: str) -> str:
    try:
        words = conninfo.conninfo_to_dict(dsn)
    except psycopg.Error:
        return "postgres"
    return str(words.get("dbname") or words.get("user") or "postgres")


def ask(asked: Question, clone: Clone, cluster: Cluster, registry: Registry) -> Seen:
    """Look at a clone; what fails in the question itself is NOT_CHECKED. The clone stays where it stands.

    A check is run on a copy opened for writes, since PostgreSQL refuses half of them in recovery.
    """
    if asked.sql is not None:
        return _rows(asked, clone, cluster.name)
    if clone.promoted:
        return _findings(asked, clone, cluster)
    copy, _ = copy_of(clone, f"bisect: {asked.name}", registry=registry)
    with copy:
        copy.replay()
        return _findings(asked, copy, cluster)


def _rows(asked: Question, clone: Clone, name: str) -> Seen:
    assert asked.sql is not None
    try:
        with connect(clone.dsn("template1")) as connection:
            facts = server_facts(connection)
        budget = Budget(statement_timeout=asked.timeout)
        subject = Subject(name, clone.dsn(), facts, Role.CLONE, budget=budget)
        with subject.connect(asked.database) as connection:
            prepare(connection)
            connection.execute("reset search_path")  # the query was written for the role's own
            columns, found = breaking_rows(connection, asked.sql)
    except (KnockwoodError, psycopg.Error) as error:
        if not clone.server.running:
            raise
        return Seen(Verdict.NOT_CHECKED, reason=reason_of(error))
    if not found:
        return Seen(Verdict.HELD)
    return Seen(Verdict.BROKEN, len(found), _examples(columns, found))


def _examples(columns: Sequence[str], rows: Sequence[tuple[str | None, ...]]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(columns, row, strict=True)) for row in rows[:SHOWN])


def _findings(asked: Question, clone: Clone, cluster: Cluster) -> Seen:
    report = examine(
        clone,
        [asked.name],
        cluster=cluster.name,
        repository=clone.repository,
        invariants=tuple(
            replace(each, database=each.database or database_of(cluster.dsn)) for each in cluster.invariants()
        ),
    )
    if report.findings:
        shown = tuple(found.as_json() for found in report.findings[:SHOWN])
        return Seen(Verdict.BROKEN, len(report.findings), shown)
    if report.verdict is Verdict.NOT_CHECKED:
        return Seen(Verdict.NOT_CHECKED, reason="; ".join(gap.reason for gap in report.not_checked[:3]))
    return Seen(Verdict.HELD)


def shown_count(seen: Seen) -> str:
    """How many rows or findings, for people."""
    return f"{COUNTED} or more" if seen.count >= COUNTED else str(seen.count)
