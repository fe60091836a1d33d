"""Repairs that are one statement of PostgreSQL's own: rebuild or drop an index, raise a sequence, validate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import psycopg

from knockwood.errors import LockHeldError, ObjectMissingError, RefusedError
from knockwood.host import clock
from knockwood.integrity.check import Subject
from knockwood.model.recovery import Outcome, Step, StepResult
from knockwood.postgres.connection import Connection, connect, translated, with_words
from knockwood.recover import indexes
from knockwood.recover.journal import StepJournal

_FIRST_NORMAL_OID: Final = 16384
_TRIES: Final = 30
_LOCK_WAIT: Final = "1s"

Subjects = Callable[[], Subject]


class _Statement:
    """What these handlers share: nothing they do has to be taken back."""

    kind: str

    def __init__(self, subject: Subjects) -> None:
        self._subject = subject

    def roll_back(self, step: Step, journal: StepJournal) -> StepResult:
        return StepResult(step.kind, step.title, Outcome.ROLLED_BACK, f"nothing is taken back: {step.undo}")

    def _connect(self, step: Step) -> Connection:
        connection = connect(
            with_words(self._subject().dsn, dbname=step.arguments["database"]),
            application_name="knockwood repair",
        )
        with translated():
            connection.execute("set search_path = pg_catalog")
            connection.execute("set statement_timeout = 0")
        return connection


class RebuildIndex(_Statement):
    """Makes an index anew from its table, beside its users unless it is a catalog's."""

    kind = "rebuild-index"

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        subject = self._subject()
        database = step.arguments["database"] or "postgres"
        name = str(step.arguments["index"])
        concurrently = bool(step.arguments["concurrently"])
        with connect(with_words(subject.dsn, dbname=database)) as connection:
            index = indexes.index_named(connection, database, name)
        if concurrently and index.table_oid < _FIRST_NORMAL_OID:
            raise RefusedError("the index of a system catalog cannot be rebuilt beside its users", where=name)
        if "filenode" not in journal.notes:
            journal.note("filenode", index.filenode)
        done = indexes.reindex(
            subject, database, name, journal.notes["filenode"], journal.note, concurrently=concurrently
        )
        return StepResult(step.kind, step.title, Outcome.DONE if done else Outcome.ALREADY_DONE)


_INVALID = """
select i.indisvalid, i.indisprimary or exists (
           select from pg_constraint k where k.conindid = i.indexrelid),
       exists (select from pg_stat_progress_create_index p where p.relid = i.indrelid)
from pg_index i
where i.indexrelid = to_regclass(%s)
"""


class DropIndex(_Statement):
    """Drops an index that is not valid and that nothing rests on."""

    kind = "drop-index"

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        name = str(step.arguments["index"])
        with self._connect(step) as connection:
            with translated():
                row = connection.execute(_INVALID, [name]).fetchone()
            if row is None:
                return StepResult(step.kind, step.title, Outcome.ALREADY_DONE, "it is gone")
            valid, needed, building = row
            if valid or needed or building:
                why = "is valid now" if valid else "holds a constraint" if needed else "is being built"
                raise RefusedError(f"the index {why}", where=name)
            with translated():
                connection.execute(f"drop index concurrently if exists {name}".encode())
        return StepResult(step.kind, step.title, Outcome.DONE)


class RaiseSequence(_Statement):
    """Sets a sequence past what its columns hold; never lowers it.

    PostgreSQL has no compare-and-set for sequences. ALTER SEQUENCE, here to what it is already, waits for
    everyone who has drawn a number in an open transaction and keeps all others from drawing one until the
    commit: so nobody can be given a number between the look and the setting.
    """

    kind = "setval"

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        sequence = str(step.arguments["sequence"])
        with self._connect(step) as connection:
            increment = _increment(connection, sequence)
            with _locked(connection, sequence, increment):
                began = clock.monotonic()
                before = _next(connection, sequence, increment)
                furthest = _furthest(connection, step, increment)
                behind = furthest is not None and (
                    before <= furthest if increment > 0 else before >= furthest
                )
                if behind:
                    with translated():
                        connection.execute("select setval(to_regclass(%s), %s)", [sequence, furthest])
            blocked = round(clock.monotonic() - began, 3)
        if furthest is None or not behind:
            return StepResult(step.kind, step.title, Outcome.ALREADY_DONE, "it is ahead of its columns")
        following = furthest + increment
        return StepResult(
            step.kind,
            step.title,
            Outcome.DONE,
            f"it would have given {before}, and gives {following} next",
            blocked_seconds=blocked,
            values={"before": before, "next": following},
        )


class _locked:  # noqa: N801 -- used as a statement
    """A transaction in which nobody else can draw from the sequence; tried for a while, never waited for long."""

    def __init__(self, connection: Connection, sequence: str, increment: int) -> None:
        self._connection = connection
        self._sequence = sequence
        self._increment = increment

    def __enter__(self) -> None:
        # Whoever wants a number queues behind us while we wait, so we wait briefly and often.
        statement = f"alter sequence {self._sequence} increment by {self._increment}".encode()
        with translated():
            self._connection.execute(f"set lock_timeout = '{_LOCK_WAIT}'".encode())
        for _ in range(_TRIES):
            try:
                self._connection.execute("begin")
                self._connection.execute(statement)
                return
            except psycopg.errors.LockNotAvailable:
                self._connection.execute("rollback")
                clock.sleep(0.5)
            except psycopg.Error as error:
                self._connection.execute("rollback")
                with translated():
                    raise error
        raise LockHeldError(
            "transactions that have drawn from the sequence do not end",
            where=self._sequence,
            hint="end them, then go on with --resume",
        )

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with translated():
            self._connection.execute("rollback" if error else "commit")


def _increment(connection: Connection, sequence: str) -> int:
    with translated():
        row = connection.execute(
            "select seqincrement from pg_sequence where seqrelid = to_regclass(%s)", [sequence]
        ).fetchone()
    if row is None:
        raise ObjectMissingError("there is no such sequence", where=sequence)
    return int(row[0])


def _next(connection: Connection, sequence: str, increment: int) -> int:
    with translated():
        row = connection.execute(f"select last_value, is_called from {sequence}".encode()).fetchone()
    assert row is not None
    return int(row[0]) + (increment if row[1] else 0)


def _furthest(connection: Connection, step: Step, increment: int) -> int | None:
    """The value that is used and furthest along; None when the columns are empty."""
    function = "max" if increment > 0 else "min"
    found: list[Any] = []
    for place in step.arguments["columns"]:
        _require_column(connection, place["table"], place["column"])
        query = f"select {function}({place['column']})::numeric from {place['table']}"
        with translated():
            row = connection.execute(query.encode()).fetchone()
        if row and row[0] is not None:
            found.append(row[0])
    if not found:
        return None
    return int(max(found) if increment > 0 else min(found))


def _require_column(connection: Connection, table: str, column: str) -> None:
    """The names go into a statement as they are: they must be those of a table and its column."""
    with translated():
        row = connection.execute(
            "select from pg_attribute where attrelid = to_regclass(%s) and quote_ident(attname) = %s"
            " and not attisdropped",
            [table, column],
        ).fetchone()
    if row is None:
        raise ObjectMissingError(f"there is no column {column}", where=table)


_CONSTRAINT = """
select k.convalidated, k.contypid <> 0
from pg_constraint k
where quote_ident(k.conname) = %(name)s
  and (k.conrelid = to_regclass(%(relation)s) or (k.contypid <> 0 and k.contypid = to_regtype(%(relation)s)))
"""


class ValidateConstraint(_Statement):
    """Has PostgreSQL check all rows against a constraint; changes no row."""

    kind = "validate-constraint"

    def run(self, step: Step, journal: StepJournal) -> StepResult:
        relation, name = str(step.arguments["relation"]), str(step.arguments["constraint"])
        with self._connect(step) as connection:
            with translated():
                row = connection.execute(_CONSTRAINT, {"name": name, "relation": relation}).fetchone()
            if row is None:
                raise RefusedError(f"there is no constraint {name} any more", where=relation)
            if row[0]:
                return StepResult(step.kind, step.title, Outcome.ALREADY_DONE, "it is valid")
            what = "domain" if row[1] else "table"
            try:
                connection.execute(f"set lock_timeout = '{_LOCK_WAIT}'".encode())
                connection.execute(f"alter {what} {relation} validate constraint {name}".encode())
            except psycopg.errors.IntegrityError as error:
                raise RefusedError(
                    f"rows break the constraint: {error.diag.message_primary}",
                    where=relation,
                    hint=error.diag.message_detail
                    or "find them with the checks foreign_keys and row_constraints",
                ) from error
            except psycopg.Error as error:
                with translated():
                    raise error
        return StepResult(step.kind, step.title, Outcome.DONE)


def handlers(subject: Subjects) -> tuple[RebuildIndex, DropIndex, RaiseSequence, ValidateConstraint]:
    """A handler for each of these kinds of step."""
    return RebuildIndex(subject), DropIndex(subject), RaiseSequence(subject), ValidateConstraint(subject)
