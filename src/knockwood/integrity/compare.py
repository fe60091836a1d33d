"""The second half of a comparison: a copy of the cluster against what its primary held at that position.

The copy must stand still at the position of the primary's state: before the first commit record from there
on. Equal totals settle a range of blocks; where they differ, the rows are read
again on both sides and matched by version, so that a changed byte is named by table, key and column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg

from knockwood.errors import KnockwoodError
from knockwood.host import clock
from knockwood.integrity.databases import rows
from knockwood.integrity.differences import Copies, Difference, name_differences
from knockwood.integrity.fingerprint import RowVersion, Snapshot, precedes, totals_query, versions_query
from knockwood.integrity.primary_state import (
    Chunk,
    DatabaseState,
    Failure,
    PrimaryState,
    Report,
    TableState,
    Workers,
    failure_of,
    pool,
    read_chunk,
)
from knockwood.integrity.run import reason_of
from knockwood.integrity.tables import Sequence, Table, open_pinned, sequences_of, tables_of
from knockwood.model import Finding, Location, Lsn, Severity, Verdict, worst

NAME = "compare"
_FIRST_NORMAL_OID = 16384
_IN_WORDS = "the copy and the primary do not hold the same at this position"
_REMEDY = "find out which side is right before you rely on either: knockwood check --cluster on both"


@dataclass(frozen=True, slots=True)
class TableResult:
    """How one table (or sequence, or a database's schema) compared. `rows` were compared on the primary's
    side; `outside`: no physical backup holds its rows, so there is nothing to compare."""

    database: str
    table: str
    verdict: Verdict
    rows: int = 0
    reason: str = ""
    outside: bool = False
    findings: tuple[Finding, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "database": self.database,
            "table": self.table,
            "verdict": str(self.verdict),
            "rows": self.rows,
            "reason": self.reason,
            "findings": [finding.as_json() for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every table's result. `lsn` is the position compared at, `seconds` what the copy's half took."""

    lsn: Lsn
    tables: tuple[TableResult, ...]
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """Tables that no physical backup holds say nothing about the copy."""
        return worst(table.verdict for table in self.tables if not table.outside)

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(finding for table in self.tables for finding in table.findings)

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables)


def compare(
    primary: PrimaryState,
    copy_dsn: str,
    *,
    primary_dsn: str | None = None,
    workers: int = 2,
    progress: Report | None = None,
) -> Comparison:
    """Compare a copy that was replayed to `primary.lsn` with what the primary held there.

    With `primary_dsn` differing rows are read again on the primary and named; without it a difference is
    named by its blocks. Raises ServerDownError and its like if the copy does not answer.
    """
    started = clock.monotonic()
    results: list[TableResult] = []
    with open_pinned(copy_dsn, None) as connection:
        present = {name for (name,) in rows(connection, "select datname from pg_catalog.pg_database")}
    for name, reason in primary.skipped.items():
        results.append(
            TableResult(name, "", Verdict.NOT_CHECKED, reason=f"not read on the primary: {reason}")
        )
    for database in primary.databases:
        if database.name not in present:
            results.append(_missing_database(database))
            continue
        results += _Comparer(database, copy_dsn, primary_dsn, workers).run(progress)
    return Comparison(primary.lsn, tuple(results), clock.monotonic() - started)


def _missing_database(database: DatabaseState) -> TableResult:
    finding = Finding(
        check=NAME,
        severity=Severity.CRITICAL,
        location=Location(database=database.name),
        summary=f"database {database.name} is missing from the copy",
        meaning=_IN_WORDS,
        remedy=_REMEDY,
    )
    return TableResult(database.name, "", Verdict.BROKEN, findings=(finding,))


class _Comparer:
    """One database."""

    def __init__(self, state: DatabaseState, copy_dsn: str, primary_dsn: str | None, workers: int) -> None:
        self.state = state
        self.copy_dsn = copy_dsn
        self.primary_dsn = primary_dsn
        self.workers = workers

    def run(self, progress: Report | None) -> list[TableResult]:
        name = self.state.name
        with open_pinned(self.copy_dsn, name) as connection:
            found = {table.oid: table for table in tables_of(connection, name)}
            [(shown,)] = rows(connection, "select pg_catalog.pg_current_snapshot()::text")
            sequences = {sequence.name: sequence for sequence in sequences_of(connection)}
        self.copy_snapshot = Snapshot.parse(shown)
        results = [self._sequence(sequence, sequences) for sequence in self.state.sequences]
        results += self._extra_tables(found)
        with pool(self.workers, lambda: open_pinned(self.copy_dsn, name)) as (executor, connections):
            jobs = [
                (
                    state,
                    [executor.submit(self._chunk, connections, state.table, chunk) for chunk in state.chunks],
                )
                for state in self.state.tables
            ]
            total, done = sum(len(chunks) for _, chunks in jobs), 0
            for state, chunks in jobs:
                outcomes = [job.result() for job in chunks]
                results.append(self._result(state, found.get(state.table.oid), outcomes))
                done += len(outcomes)
                if progress:
                    progress(state.table.name, done, total)
        return results

    # --- rows ------------------------------------------------------------------------------------

    def _chunk(self, connections: Workers, table: Table, chunk: Chunk) -> Failure | list[Difference]:
        """What differs in one range of blocks."""
        try:
            connection = connections.connection()
            if self.state.method == "exact":
                there = read_chunk(
                    connection, totals_query(table.name, table.hashed, chunk.blocks), chunk.blocks
                )
                return [] if there.totals == chunk.totals else [Difference.of_blocks(chunk, there.totals)]
            query = versions_query(table.name, table.hashed, chunk.blocks, self.state.snapshot.horizon, None)
            return self._versions(connection, table, chunk, read_chunk(connection, query, chunk.blocks))
        except (psycopg.Error, KnockwoodError) as error:
            return failure_of(error)

    def _versions(self, connection: Any, table: Table, ours: Chunk, theirs: Chunk) -> list[Difference]:
        """Settled rows must be the same as a whole; of the others each must be equal or explained."""
        touched = [version for version in ours.listed if version.old]
        still_there = _hashes(connection, table, touched)
        young = {(version.ctid, version.xmin): version.hash for version in theirs.listed}
        differences = []
        for version in ours.listed:
            place = (version.ctid, version.xmin)
            there = still_there.get(place) if version.old else young.pop(place, None)
            if there is None:
                differences += self._missing(version)
            elif there != version.hash:
                differences.append(Difference("changed", version.ctid))
        for ctid, xmin in young:
            if not self.state.snapshot.may_miss(xmin):
                differences.append(Difference("extra", ctid))
        settled = theirs.totals.without(still_there.values())
        if settled != ours.totals:
            differences.append(Difference.of_blocks(ours, settled))
        return differences

    def _missing(self, version: RowVersion) -> list[Difference]:
        """A version that the primary saw and the copy does not: deleted in between, or lost."""
        if version.recent and precedes(version.xmax, self.copy_snapshot.xmax % (1 << 32)):
            return []
        return [Difference("missing", version.ctid, multixact=version.xmax if version.multi else None)]

    def _result(
        self, state: TableState, there: Table | None, outcomes: list[Failure | list[Difference]]
    ) -> TableResult:
        table, name = state.table, self.state.name
        if table.problem or (state.problem and not state.damaged):
            reason = table.problem or state.problem or ""
            return TableResult(name, table.name, Verdict.NOT_CHECKED, reason=reason, outside=table.outside)
        if state.damaged:
            return self._broken(state, f"the primary cannot read {table.name}: {state.problem}", {})
        if there is None:
            return self._absent(state)
        if there.columns != table.columns:
            columns = {
                "primary": [c.name for c in table.columns],
                "copy": [c.name for c in there.columns],
            }
            return self._broken(state, f"{table.name} has other columns on the copy", columns)
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        for failure in failures:
            if failure.damaged:
                return self._broken(state, f"the copy cannot read {table.name}: {failure.reason}", {})
        differences = [d for outcome in outcomes if not isinstance(outcome, Failure) for d in outcome]
        copies = Copies(name, self.primary_dsn, self.copy_dsn, self.state.snapshot, self.state.method)
        try:
            found, unknown = name_differences(copies, table, differences) if differences else ([], [])
        except (psycopg.Error, KnockwoodError) as error:
            blocks = sorted({difference.where for difference in differences})
            evidence = {"where": blocks[:20], "not_named": reason_of(error)}
            return self._broken(state, f"rows of {table.name} differ", evidence)
        if found:
            return TableResult(name, table.name, Verdict.BROKEN, state.rows, findings=tuple(found))
        reasons = [*unknown, *(failure.reason for failure in failures)]
        verdict = Verdict.NOT_CHECKED if reasons else Verdict.HELD
        return TableResult(name, table.name, verdict, state.rows, reason="; ".join(reasons))

    def _absent(self, state: TableState) -> TableResult:
        return self._broken(state, f"table {state.table.name} is missing from the copy", {"rows": state.rows})

    def _broken(self, state: TableState, summary: str, evidence: dict[str, Any]) -> TableResult:
        finding = Finding(
            check=NAME,
            severity=Severity.CRITICAL,
            location=Location(database=self.state.name, relation=state.table.name),
            summary=summary,
            meaning=_IN_WORDS,
            remedy=_REMEDY,
            evidence=evidence,
        )
        return TableResult(self.state.name, state.table.name, Verdict.BROKEN, state.rows, findings=(finding,))

    # --- what is not rows --------------------------------------------------------------------------

    def _extra_tables(self, found: dict[int, Table]) -> list[TableResult]:
        """At the exact position the copy has no table that the primary lacks; otherwise one may be newer."""
        if self.state.method != "exact":
            return []
        known = {state.table.oid for state in self.state.tables}
        return [
            self._broken(TableState(table), f"table {table.name} is on the copy only", {})
            for oid, table in found.items()
            if oid not in known and oid >= _FIRST_NORMAL_OID
        ]

    def _sequence(self, ours: Sequence, there: dict[str, Sequence]) -> TableResult:
        """A copy's sequence may be ahead (values are logged in advance), never behind."""
        theirs = there.get(ours.name)
        name = f"sequence {ours.name}"
        if ours.last is None or (theirs is not None and theirs.last is None):
            return TableResult(self.state.name, name, Verdict.NOT_CHECKED, reason="no privilege to read it")
        if theirs is None or theirs.last is None:
            return self._sequence_gone(ours, name)
        behind = theirs.last < ours.last if ours.increment > 0 else theirs.last > ours.last
        if not behind:
            return TableResult(self.state.name, name, Verdict.HELD)
        if ours.cycles:
            return TableResult(self.state.name, name, Verdict.NOT_CHECKED, reason="it cycles")
        return self._sequence_broken(
            ours, name, f"{name} is at {theirs.last} on the copy and was at {ours.last} on the primary"
        )

    def _sequence_gone(self, ours: Sequence, name: str) -> TableResult:
        if self.state.method == "exact" or self.primary_dsn is None:
            return self._sequence_broken(ours, name, f"{name} is missing from the copy")
        with open_pinned(self.primary_dsn, self.state.name) as connection:
            [(now,)] = rows(connection, "select pg_catalog.to_regclass(%s)::bigint", ours.name)
        if now is None:
            return TableResult(self.state.name, name, Verdict.NOT_CHECKED, reason="it was dropped meanwhile")
        return self._sequence_broken(ours, name, f"{name} is missing from the copy")

    def _sequence_broken(self, ours: Sequence, name: str, summary: str) -> TableResult:
        finding = Finding(
            check=NAME,
            severity=Severity.HIGH,
            location=Location(database=self.state.name, relation=ours.name),
            summary=summary,
            meaning="the copy would hand out numbers that are in use",
            remedy=_REMEDY,
        )
        return TableResult(self.state.name, name, Verdict.BROKEN, findings=(finding,))


def _hashes(connection: Any, table: Table, wanted: list[RowVersion]) -> dict[tuple[str, int], int]:
    """The hashes of those of the versions that the copy's snapshot sees, by ctid and xmin."""
    if not wanted:
        return {}
    places = {(version.ctid, version.xmin) for version in wanted}
    found = connection.execute(
        f"select t.ctid::text, t.xmin::text::bigint, {table.hashed.replace('%', '%%')} from only"
        f" {table.name.replace('%', '%%')} t where t.ctid = any(%s::pg_catalog.tid[])".encode(),
        [[version.ctid for version in wanted]],
    ).fetchall()
    return {(ctid, xmin): hashed for ctid, xmin, hashed in found if (ctid, xmin) in places}
