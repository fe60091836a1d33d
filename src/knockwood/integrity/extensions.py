"""Extensions that checks call: where they are, and what to say where they are not."""

from __future__ import annotations

from psycopg import sql

from knockwood.integrity.check import NotChecked, Role, Subject
from knockwood.postgres.connection import Connection, translated

_SCHEMA = "knockwood_check"


def schema_of(subject: Subject, connection: Connection, extension: str) -> str | None:
    """The schema an extension's functions are in; None where it is not installed in this database.

    A clone that takes writes is ours: there it is installed at once.
    """
    with translated():
        row = connection.execute(
            "select n.nspname from pg_catalog.pg_extension e"
            " join pg_catalog.pg_namespace n on n.oid = e.extnamespace where e.extname = %s",
            [extension],
        ).fetchone()
        if row is not None:
            return str(row[0])
        if subject.role is not Role.CLONE or subject.facts.in_recovery or not subject.facts.is_superuser:
            return None
        connection.execute(sql.SQL("create schema if not exists {}").format(sql.Identifier(_SCHEMA)))
        connection.execute(
            sql.SQL("create extension {} schema {}").format(
                sql.Identifier(extension), sql.Identifier(_SCHEMA)
            )
        )
    return _SCHEMA


def absent(check: str, database: str, extension: str) -> NotChecked:
    """That an extension is not installed, with the statement that installs it."""
    return NotChecked(
        check,
        f"database {database}: the extension {extension} is not installed;"
        f" run CREATE EXTENSION {extension} there, on the primary (the server's contrib package has it)",
    )
