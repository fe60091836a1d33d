"""Looking into every database of a cluster: what fails in one is 'not checked' there, the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from knockwood.errors import KnockwoodError
from knockwood.integrity.budget import pace
from knockwood.integrity.check import NotChecked, Outcome, Role, Subject
from knockwood.integrity.run import reason_of
from knockwood.postgres.connection import Connection

Look = Callable[[Connection, str], Iterator[Outcome]]

EXAMPLES = 5
"""Rows a finding shows as evidence."""


def sql_beside(module_file: str) -> bytes:
    """The query in the `.sql` file beside a module, ready for `execute`."""
    return Path(module_file).with_suffix(".sql").read_bytes()


def in_each_database(subject: Subject, check: str, look: Look) -> Iterator[Outcome]:
    """What `look` yields for each database that takes connections.

    Rows are read whole or not at all: row security that would hide some makes the query fail, which is
    NotChecked with the database's name.
    """
    for database in subject.databases():
        pace(subject)
        yield from attempt(check, f"database {database}", partial(_look, subject, database, look))


def _look(subject: Subject, database: str, look: Look) -> Iterator[Outcome]:
    with subject.connect(database) as connection:
        prepare(connection)
        yield from look(connection, database)


def prepare(connection: Connection) -> None:
    """Policies may not hide rows without an error."""
    connection.execute("set row_security = off")


def attempt(
    check: str, what: str, work: Callable[[], Iterator[Outcome]], connection: Connection | None = None
) -> Iterator[Outcome]:
    """The outcomes of `work`; an error becomes NotChecked for `what`. Raises it if `connection` was lost."""
    try:
        yield from work()
    except (KnockwoodError, psycopg.Error) as error:
        if connection is not None and connection.closed:
            raise
        yield NotChecked(check, f"{what}: {reason_of(error)}")


def heap_only(connection: Connection) -> None:
    """Make the queries that follow read tables from end to end: an index may be what is wrong."""
    for setting in ("enable_indexscan", "enable_indexonlyscan", "enable_bitmapscan"):
        connection.execute(f"set {setting} = off".encode())


def rows(connection: Connection, query: bytes | str, *values: Any) -> list[tuple[Any, ...]]:
    """All rows; `values` fill `%s`. Without values a `%` in the query is only a `%`."""
    raw = query.encode() if isinstance(query, str) else query
    return connection.execute(raw, values or None).fetchall()


def about_the_server(subject: Subject, check: str) -> Iterator[Outcome]:
    """NotChecked on a clone, for checks that ask how a production server is run."""
    if subject.role is Role.CLONE:
        yield NotChecked(check, "it asks how the production server is run; a clone cannot answer")
