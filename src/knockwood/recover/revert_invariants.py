"""The invariants of the settings, asked inside a transaction that may still be rolled back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import psycopg

from knockwood.errors import RefusedError
from knockwood.integrity.check import Invariant
from knockwood.postgres.connection import Connection

LIMIT: Final = 100_000
"""Breaking rows that are compared one by one; an invariant with more cannot be held against what was before."""

Breaking = frozenset[tuple[str | None, ...]]


def breaking(connection: Connection, invariants: Sequence[Invariant]) -> dict[str, Breaking]:
    """The rows that break each invariant, within the connection's open transaction.

    Raises RefusedError where one cannot be asked or is broken by more than `LIMIT` rows.
    """
    return {invariant.name: _rows(connection, invariant) for invariant in invariants}


def worsened(before: Mapping[str, Breaking], after: Mapping[str, Breaking]) -> list[str]:
    """What is broken that was not: an invariant broken before may get better, never worse."""
    problems = []
    for name, rows in after.items():
        new = rows - before.get(name, frozenset())
        if new:
            example = ", ".join(str(value) for value in min(new, key=str))
            problems.append(
                f'invariant "{name}" would be broken by {len(new)} row(s) more, such as ({example})'
            )
    return problems


def _rows(connection: Connection, invariant: Invariant) -> Breaking:
    statement = invariant.sql.strip().rstrip(";").encode()
    try:
        with _read_only(connection):
            connection.execute(b"declare knockwood_invariant no scroll cursor for " + statement, prepare=True)
            cursor: psycopg.Cursor[Any] = connection.execute(
                f"fetch forward {LIMIT + 1} from knockwood_invariant".encode()
            )
            result = cursor.pgresult
            assert result is not None
            found = [
                tuple(_text(result.get_value(row, column)) for column in range(result.nfields))
                for row in range(result.ntuples)
            ]
    except (psycopg.errors.DeadlockDetected, psycopg.errors.LockNotAvailable):
        raise
    except psycopg.Error as error:
        raise RefusedError(
            f'invariant "{invariant.name}" could not be asked: {error.diag.message_primary or error}',
            hint="mend it in the settings, or take it out; a revert does not commit what it could not check",
        ) from error
    if len(found) > LIMIT:
        raise RefusedError(
            f'invariant "{invariant.name}" is broken by more than {LIMIT} rows: whether it gets worse is unknown'
        )
    return frozenset(found)


@contextmanager
def _read_only(connection: Connection) -> Iterator[None]:
    """A savepoint in which nothing can be written, under the role's own search_path; undone at its end."""
    connection.execute("savepoint knockwood_invariant")
    try:
        connection.execute("set local transaction_read_only = on")
        # The query was written for the role's own.
        connection.execute("set local search_path to default")
        yield
    finally:
        if not connection.closed:
            connection.execute("rollback to savepoint knockwood_invariant")


def _text(value: bytes | None) -> str | None:
    return None if value is None else bytes(value).decode("utf-8", "replace")
