"""Carry out a revert: one transaction, rows locked and held against the plan again, nothing half-done.

Killed before its commit, nothing has happened. Killed after it, the journal holds the transaction's id, and
the server knows whether that was committed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import psycopg

from knockwood.errors import PostgresError, RefusedError, ServerDownError
from knockwood.host import clock
from knockwood.integrity.check import Invariant
from knockwood.integrity.databases import rows
from knockwood.integrity.tables import open_pinned
from knockwood.model.recovery import Outcome, Step, StepResult
from knockwood.postgres.connection import Connection, connect, translated
from knockwood.recover.journal import StepJournal
from knockwood.recover.plan.order import Schedule
from knockwood.recover.plan.rows import Culprit, Mode
from knockwood.recover.revert_again import changed_keys, decide_again
from knockwood.recover.revert_evidence import keep, keep_some, kept
from knockwood.recover.revert_examine import Examined, Request, examine
from knockwood.recover.revert_invariants import Breaking, breaking, worsened
from knockwood.recover.revert_keys import broken_keys
from knockwood.recover.revert_plan import KIND
from knockwood.recover.revert_rows import read_versions
from knockwood.recover.revert_spool import load
from knockwood.recover.revert_write import lock_rows, write

LABEL: Final = "knockwood revert of"
"""How the label of a revert's own transaction begins; the xids follow."""

_ATTEMPTS: Final = 4
_ROUNDS: Final = 5
_SETTLE_SECONDS: Final = 60.0
_ADVISORY: Final = 0x6B6E6F636B  # "knock"
_PASSING = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)

Reached = Callable[[str], None]
AdjustedBefore = Callable[[Sequence[int]], str | None]


def _nowhere(_name: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Work:
    """What is to be done, and under which names the journal knows it."""

    step: Step
    journal: StepJournal
    request: Request
    label: str
    digest: str | None
    note: str


class RevertHandler:
    """Executes steps of the kind `revert`.

    `reached` is told each point that a kill may come at. `max_lock_wait` (seconds) of the step bounds every
    wait for a lock; a deadlock is tried again a few times. `adjusted_before` says why the counters of some
    transactions must not be adjusted, since nothing in the rows tells that they were already. `foreseen` is what
    the plan was made from, if that was just now: the first attempt does not examine the rows again before it
    locks them and holds them against it.
    """

    kind = KIND

    def __init__(
        self,
        dsn: str,
        invariants: Sequence[Invariant] = (),
        *,
        adjusted_before: AdjustedBefore | None = None,
        reached: Reached = _nowhere,
        foreseen: tuple[Request, Examined] | None = None,
    ) -> None:
        self._dsn = dsn
        self._foreseen = foreseen
        self._adjusted_before = adjusted_before
        self._invariants = invariants
        self._reached = reached
        self._default: str | None = None

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        """Revert in one transaction, or find that an earlier run has committed it."""
        arguments = step.arguments
        request = self._foreseen[0] if self._foreseen else request_of(arguments)
        label = f"{LABEL} {', '.join(str(xid) for xid in arguments['xids'])}"
        return self._do(_Work(step, journal, request, label, arguments["digest"], "commit"))

    def roll_back(self, step: Step, journal: StepJournal) -> StepResult:
        """Take a committed revert back, strictly, from the evidence; nothing to do where none was committed."""
        committed = self._committed(step, journal, "commit")
        if committed is None:
            return StepResult(step.kind, step.title, Outcome.ROLLED_BACK, "nothing had been committed")
        own = int(committed["xid"]) & 0xFFFFFFFF
        request = Request((Culprit(own, kept(journal, committed)),))
        work = _Work(step, journal, request, f"{LABEL} {own}", None, "undo")
        result = self._do(work)
        return replace(
            result, outcome=Outcome.ROLLED_BACK, detail=f"transaction {own} taken back: {result.detail}"
        )

    def _do(self, work: _Work) -> StepResult:
        step, journal = work.step, work.journal
        before = self._committed(step, journal, work.note)
        if before is not None:
            detail = f"transaction {before['xid']} was committed by an earlier run"
            return StepResult(
                step.kind,
                step.title,
                Outcome.ALREADY_DONE,
                detail,
                evidence=journal.evidence_paths,
                values=before,
            )
        self._require_first(work)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._attempt(work)
            except _PASSING as error:
                if attempt == _ATTEMPTS:
                    raise RefusedError(
                        f"{attempt} attempts ended in a deadlock or a serialisation failure; nothing was changed",
                        hint=f"try again when fewer sessions write these rows: {error.diag.message_primary}",
                    ) from error
                clock.sleep(0.1 * attempt)
            except psycopg.errors.LockNotAvailable as error:
                wait = step.arguments["max_lock_wait"]
                raise RefusedError(
                    f"a row or table stayed locked for {wait:g} s; nothing was changed",
                    hint="end the transaction that holds it, or allow more with --max-lock-wait",
                ) from error
            except psycopg.errors.IntegrityError as error:
                raise RefusedError(
                    f"a constraint forbids it: {error.diag.message_primary}; nothing was changed",
                    hint=error.diag.message_detail,
                ) from error
            except psycopg.OperationalError as error:
                return self._lost(work, error)
            except (psycopg.Error, PostgresError) as error:
                if isinstance(error, ServerDownError):
                    raise
                message = error.diag.message_primary if isinstance(error, psycopg.Error) else str(error)
                hint = error.hint if isinstance(error, PostgresError) else None
                raise RefusedError(
                    f"the server refuses it: {message}; nothing was changed", hint=hint
                ) from error
        raise AssertionError

    def _require_first(self, work: _Work) -> None:
        """Raise RefusedError where counters may have been adjusted since the plan was made."""
        if work.request.counters and self._adjusted_before is not None:
            reason = self._adjusted_before([culprit.xid for culprit in work.request.culprits])
            if reason:
                raise RefusedError(f"{reason}: counters would be adjusted twice; nothing was changed")

    def _lost(self, work: _Work, error: psycopg.OperationalError) -> StepResult:
        """The connection went while it was under way: whether it was committed is asked anew."""
        after = self._committed(work.step, work.journal, work.note)
        if after is None:
            raise PostgresError(
                f"it ended before the commit, nothing was changed: {error.diag.message_primary or error}"
            ) from error
        return StepResult(
            work.step.kind,
            work.step.title,
            Outcome.DONE,
            f"committed as transaction {after['xid']}; the connection was lost after that",
            evidence=work.journal.evidence_paths,
            values=after,
        )

    def _committed(self, step: Step, journal: StepJournal, note: str) -> Mapping[str, Any] | None:
        """What an earlier run noted before its commit, if that came to pass; waits for one still under way."""
        noted = journal.notes.get(note)
        if not isinstance(noted, Mapping):
            return None
        deadline = clock.monotonic() + _SETTLE_SECONDS
        with open_pinned(self._dsn, step.arguments["database"]) as connection, translated():
            while True:
                status = rows(
                    connection, "select pg_catalog.pg_xact_status(%s::pg_catalog.xid8)", str(noted["xid"])
                )
                if status[0][0] != "in progress":
                    break
                if clock.monotonic() > deadline:
                    raise RefusedError(
                        f"transaction {noted['xid']} of an earlier run is still in progress",
                        hint="wait for it, or end its session with pg_terminate_backend",
                    )
                clock.sleep(0.1)
        if status[0][0] is None:
            raise RefusedError(
                f"whether transaction {noted['xid']} of an earlier run was committed is no longer known",
                hint="show the plan again: rows that were set back are told as reverted already",
            )
        return noted if status[0][0] == "committed" else None

    def _attempt(self, work: _Work) -> StepResult:
        wait = float(work.step.arguments["max_lock_wait"])
        with open_pinned(self._dsn, work.request.database, int(wait * 1000)) as connection:
            examined = self._foresee(connection, work)
            if not examined.operations:
                return StepResult(
                    work.step.kind, work.step.title, Outcome.ALREADY_DONE, "every row is as it was before"
                )
            evidence = keep(work.journal, work.note, examined.operations)
            self._reached("evidence")
            with _transaction(connection, "isolation level repeatable read, read only"):
                before = breaking(connection, self._asked(connection))
            return self._write(connection, work, examined, evidence, before)

    def _foresee(self, connection: Connection, work: _Work) -> Examined:
        """Examine once more without locks, so that little is left to do under them."""
        if self._foreseen is not None:
            examined, self._foreseen = self._foreseen[1], None
            _require_same(work, examined)
            return examined
        with _transaction(connection, "isolation level repeatable read, read only"):
            examined = examine(connection, work.request)
        _require_same(work, examined)
        return examined

    def _write(
        self,
        connection: Connection,
        work: _Work,
        examined: Examined,
        evidence: str,
        before: Mapping[str, Breaking],
    ) -> StepResult:
        began = clock.monotonic()
        with _transaction(connection, "isolation level read committed, read write"):
            self._prepare(connection)
            locked = clock.monotonic()
            examined, names = self._settle(connection, work, examined, evidence)
            order = examined.order
            assert isinstance(order, Schedule)
            _take_role(connection, order.replica)
            written = write(connection, examined, order)
            self._reached("written")
            if order.replica:
                problems = broken_keys(connection, examined.catalog, examined.operations)
                if problems:
                    raise RefusedError(f"{'; '.join(problems)}; nothing was kept")
            problems = worsened(before, breaking(connection, self._asked(connection)))
            if problems:
                raise RefusedError(f"{'; '.join(problems)}; nothing was kept")
            values = self._sign(connection, work, examined, written) | names
            self._reached("checked")
            work.journal.note(work.note, values)
            self._reached("noted")
        ended = clock.monotonic()
        self._reached("committed")
        return StepResult(
            work.step.kind,
            work.step.title,
            Outcome.DONE,
            f"{written} row(s) written in transaction {int(values['xid']) & 0xFFFFFFFF}",
            round(ended - began, 3),
            round(ended - locked, 3),
            work.journal.evidence_paths,
            values,
        )

    def _prepare(self, connection: Connection) -> None:
        """Durable when it says so, and alone among reverts of this database."""
        connection.execute(
            "select pg_catalog.set_config('synchronous_commit', 'on', true)"
            " where pg_catalog.current_setting('synchronous_commit') = 'off'"
        )
        if not rows(connection, "select pg_catalog.pg_try_advisory_xact_lock(%s)", _ADVISORY)[0][0]:
            raise RefusedError("another revert is under way in this database", hint="wait for it to end")

    def _settle(
        self, connection: Connection, work: _Work, examined: Examined, evidence: str
    ) -> tuple[Examined, dict[str, Any]]:
        """Lock the rows and see that they are those examined; where they changed meanwhile, decide anew.

        Also where the evidence is: a file of all rows, and those that put in it what changed since.
        """
        lock_rows(connection, examined)
        later: list[str] = []
        for _ in range(_ROUNDS):
            self._reached("locked")
            changed = changed_keys(
                examined.current, read_versions(connection, examined.catalog, examined.wanted)
            )
            if not changed:
                return examined, {"evidence": evidence, "evidence_later": later}
            again = decide_again(connection, work.request, examined, changed)
            if again is not None:
                examined = again.examined
                later += keep_some(work.journal, work.note, examined.operations, again.positions)
                continue
            examined = examine(connection, work.request)
            _require_same(work, examined)
            evidence, later = keep(work.journal, work.note, examined.operations), []
            lock_rows(connection, examined)
        raise RefusedError(
            "the rows keep changing while they are being locked; nothing was changed", hint="try again"
        )

    def _asked(self, connection: Connection) -> list[Invariant]:
        """The invariants of this database; those of another cannot change by what is written here."""
        if self._default is None and self._invariants:
            with connect(self._dsn) as default:
                self._default = default.info.dbname
        here = connection.info.dbname
        return [each for each in self._invariants if (each.database or self._default) == here]

    def _sign(self, connection: Connection, work: _Work, examined: Examined, written: int) -> dict[str, Any]:
        """Name the transaction in WAL, and say what to note about it."""
        connection.execute("select pg_catalog.pg_logical_emit_message(true, 'knockwood', %s)", [work.label])
        xid = str(rows(connection, "select pg_catalog.pg_current_xact_id()::pg_catalog.text")[0][0])
        counts = {str(table): kinds for table, kinds in examined.counts.items()}
        return {"xid": xid, "rows": written, "tables": counts}


def request_of(arguments: Mapping[str, Any]) -> Request:
    """What a step asks for, its changes read from the file that the plan names. Raises HostError."""
    return Request(
        load(Path(arguments["changes"]), arguments["sha256"]),
        Mode(arguments["mode"]),
        tuple(arguments["counters"]),
    )


@contextmanager
def _transaction(connection: Connection, how: str) -> Iterator[None]:
    """A transaction that is committed at the end, rolled back on an error."""
    connection.execute(f"begin {how}".encode())
    try:
        yield
    except BaseException:
        if not connection.closed:
            connection.execute("rollback")
        raise
    connection.execute("commit")


def _take_role(connection: Connection, replica: bool) -> None:
    """The replication role, or the certainty that the server's own checks are on."""
    if replica:
        connection.execute("set local session_replication_role = replica")
        return
    role = rows(connection, "select pg_catalog.current_setting('session_replication_role')")[0][0]
    if role == "replica":
        raise RefusedError(
            "the session runs under the replication role, where the server checks no foreign key",
            hint="ALTER ROLE ... RESET session_replication_role",
        )


def _require_same(work: _Work, examined: Examined) -> None:
    """Raise RefusedError unless this is what was approved."""
    if examined.conflicts:
        first = examined.conflicts[0]
        raise RefusedError(
            f"{len(examined.conflicts)} conflict(s) now, such as {first.table} {json.dumps(dict(first.key))}:"
            f" {first.kind}; nothing was changed",
            hint="rows were edited since the plan was shown: look at it again",
        )
    if examined.operations and not isinstance(examined.order, Schedule):
        reasons = examined.order.reasons if examined.order else ()
        raise RefusedError(f"{'; '.join(reasons)}; nothing was changed")
    if work.digest is not None and examined.operations and examined.digest != work.digest:
        raise RefusedError(
            "what would be written is no longer what was approved; nothing was changed",
            hint="rows were edited since the plan was shown: look at it again",
        )
