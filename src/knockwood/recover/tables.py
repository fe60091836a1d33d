"""A table brought back in place: one transaction, whose number is written down before it commits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import psycopg

from knockwood.clone.spawn import Clone
from knockwood.errors import LockHeldError, RefusedError
from knockwood.host import clock
from knockwood.model.recovery import Outcome, Step, StepResult
from knockwood.postgres.connection import Connection, connect, translated, with_words
from knockwood.recover.journal import StepJournal
from knockwood.recover.plan.table import KIND
from knockwood.recover.table_definition import TableName, pin
from knockwood.recover.tables_create import Create
from knockwood.recover.tables_facts import required_shape
from knockwood.recover.tables_merge import Merge, Merged

_WAIT_SECONDS = 60.0
_XID = "xid"


class TableHandler:
    """Carries out steps of the kind `restore-table`. `clone_for` gives the clone that a step needs.

    All is one transaction, so a kill leaves all of it or nothing; its number, noted before the commit, tells
    which. `lock_timeout` (as PostgreSQL writes it) bounds how long writers queue behind a lock that is not had.
    """

    kind = KIND

    def __init__(
        self,
        live_dsn: str,
        clone_for: Callable[[Step], AbstractContextManager[Clone]],
        lock_timeout: str = "10s",
    ) -> None:
        self._live_dsn = live_dsn
        self._clone_for = clone_for
        self._lock_timeout = lock_timeout

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        """Bring the table back, or find that it was. RefusedError where that is not safe (any more)."""
        table = table_of(step)
        with connect(with_words(self._live_dsn, dbname=table.database)) as live:
            if self._committed(live, journal):
                return StepResult(
                    self.kind,
                    step.title,
                    Outcome.ALREADY_DONE,
                    f"transaction {journal.notes[_XID]} had committed",
                    values=journal.notes.get("done", {}),
                )
            with self._clone_for(step) as clone, connect(clone.dsn(table.database)) as source:
                pin(source)
                done, ended = self._transaction(step, journal, clone, source, live)
        return StepResult(
            self.kind,
            step.title,
            Outcome.DONE,
            "; ".join([f"{done.rows} rows are there", *done.notes]),
            blocked_seconds=round(ended - done.locked_at, 3),
            evidence=journal.evidence_paths,
            values=journal.notes["done"],
        )

    def roll_back(self, step: Step, journal: StepJournal) -> StepResult:
        """Nothing is there to take back unless the transaction committed; then `revert` does that."""
        table = table_of(step)
        with connect(with_words(self._live_dsn, dbname=table.database)) as live:
            if self._committed(live, journal):
                raise RefusedError(
                    f"transaction {journal.notes[_XID]} has committed, and others may have built on it",
                    where=str(table),
                    hint=f"knockwood revert {journal.notes[_XID]}, or drop the table that came back",
                )
        return StepResult(self.kind, step.title, Outcome.ROLLED_BACK, "nothing had been changed")

    def _transaction(
        self, step: Step, journal: StepJournal, clone: Clone, source: Connection, live: Connection
    ) -> tuple[Merged, float]:
        table = table_of(step)
        pin(live)
        with translated(), _Told(table):
            live.execute("select pg_catalog.set_config('lock_timeout', %s, false)", [self._lock_timeout])
            with live.transaction():
                then = required_shape(source, table)
                if step.arguments["how"] == "create":
                    done = Create(clone, source, live, table, then).run()
                else:
                    mode = str(step.arguments["mode"])
                    done = Merge(source, live, table, then, mode, journal.evidence).run()
                row: Any = live.execute("select pg_catalog.pg_current_xact_id()::text").fetchone()
                # In this order: the number alone says that the commit may have happened.
                journal.note("done", done.values() | {"xid": int(row[0])})
                journal.note(_XID, row[0])
            return done, clock.monotonic()

    def _committed(self, live: Connection, journal: StepJournal) -> bool:
        """Whether an earlier run's transaction committed; waits for one that its server still works on."""
        xid = journal.notes.get(_XID)
        if xid is None:
            return False
        deadline = clock.monotonic() + _WAIT_SECONDS
        while True:
            with translated():
                row: Any = live.execute("select pg_catalog.pg_xact_status(%s::xid8)", [xid]).fetchone()
            if row[0] in ("committed", "aborted"):
                return bool(row[0] == "committed")
            if row[0] is None:
                raise RefusedError(f"nobody knows any more whether transaction {xid} committed")
            if clock.monotonic() > deadline:
                raise LockHeldError(f"transaction {xid} of an earlier run has not ended yet")
            clock.sleep(0.1)


def table_of(step: Step) -> TableName:
    """The table that a step is about."""
    return TableName(*(str(step.arguments[name]) for name in ("database", "schema", "table")))


class _Told:
    """Turns what PostgreSQL says where nothing can be done about it into a refusal: nothing was changed."""

    def __init__(self, table: TableName) -> None:
        self._table = table

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, psycopg.errors.LockNotAvailable):
            raise RefusedError(
                "a lock was not had in time; nothing was changed",
                where=str(self._table),
                hint="who holds it? try again at a quieter time",
            ) from error
        if isinstance(error, psycopg.errors.IntegrityError):
            raise RefusedError(
                f"a row of then does not fit what is there now: {error.diag.message_primary}"
                f" ({error.diag.message_detail})",
                where=str(self._table),
                hint="change or remove the row that stands in its way, then run this again",
            ) from error
