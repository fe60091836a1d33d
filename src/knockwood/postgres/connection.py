"""Connections, with errors that say what is wrong and what mends it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import conninfo

from knockwood.errors import (
    AuthenticationError,
    MissingPrivilegeError,
    PostgresError,
    ServerDownError,
    UnsupportedVersionError,
    WrongSystemError,
)
from knockwood.model.wal import Lsn, Timeline
from knockwood.postgres.binaries import SUPPORTED
from knockwood.postgres.bytetext import keep_bytes

Connection = psycopg.Connection[tuple[Any, ...]]


def connect(
    dsn: str, *, application_name: str = "knockwood", autocommit: bool = True, **extra: Any
) -> Connection:
    """Open a connection; raises ServerDownError, AuthenticationError or another PostgresError.

    Text comes as UTF-8 whatever the database's encoding, and byte by byte where it has none (`bytetext`).
    """
    words: dict[str, Any] = {"client_encoding": "UTF8", "connect_timeout": 10, **extra}
    with translated(dsn):
        made = psycopg.connect(dsn, autocommit=autocommit, application_name=application_name, **words)
        keep_bytes(made)
        return made


@contextmanager
def translated(dsn: str | None = None) -> Iterator[None]:
    """Turn psycopg's errors into ours; a connection string is shown without its password."""
    where = _shown(dsn) if dsn else None
    try:
        yield
    except psycopg.errors.InsufficientPrivilege as error:
        raise MissingPrivilegeError(_line(error), where=where, hint=grant(_line(error), dsn)) from error
    except (psycopg.errors.InvalidPassword, psycopg.errors.InvalidAuthorizationSpecification) as error:
        raise AuthenticationError(
            _line(error), where=where, hint="is the role right, and its password in ~/.pgpass or PGPASSWORD?"
        ) from error
    except psycopg.OperationalError as error:
        raise _operational(error, where) from error
    except psycopg.Error as error:
        raise PostgresError(_line(error), where=where) from error


def _operational(error: psycopg.OperationalError, where: str | None) -> PostgresError:
    text = _line(error)
    if re.search(r"password|authentication failed|pg_hba\.conf|role \"[^\"]*\" does not exist", text):
        unknown = re.search(r'role "([^"]*)" does not exist', text)
        if unknown:
            return AuthenticationError(
                text,
                where=where,
                hint=f"make the role with the SQL that `knockwood init` shows (CREATE ROLE {unknown[1]} ...),"
                " or name another in the dsn",
            )
        return AuthenticationError(
            text,
            where=where,
            hint="is the role right, its password in ~/.pgpass, and pg_hba.conf open to it?",
        )
    if "FATAL:" in text and not re.search(
        r"starting up|shutting down|in recovery mode|too many clients", text
    ):
        return PostgresError(text, where=where)  # somebody answered
    if error.sqlstate is None or error.sqlstate.startswith(("57P0", "08")):
        return ServerDownError(
            text, where=where, hint="does the server run, and does it listen at this address?"
        )
    return PostgresError(text, where=where)


def _line(error: psycopg.Error) -> str:
    message = error.diag.message_primary or str(error).strip()
    detail = f": {error.diag.message_detail}" if error.diag.message_detail else ""
    # Several addresses make several lines; the questions that libpq adds, indented, are ours to ask.
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.startswith("\t")]
    return lines[-1] + detail if lines else type(error).__name__


def _user(dsn: str | None) -> str:
    """The role that a connection string names, else the one that `knockwood init` makes."""
    try:
        words = conninfo.conninfo_to_dict(dsn or "")
    except psycopg.Error:
        words = {}
    return str(words.get("user") or "knockwood")


def grant(text: str, dsn: str | None = None) -> str:
    """The SQL that gives the right which the server's message says is lacking to the role of `dsn`."""
    role = _user(dsn)
    match = re.search(r"permission denied for (function|table|view|sequence|schema|database) (\S+)", text)
    if match:
        right = {
            "function": "EXECUTE ON FUNCTION",
            "schema": "USAGE ON SCHEMA",
            "database": "CONNECT ON DATABASE",
        }
        return f"GRANT {right.get(match[1], 'SELECT ON')} {match[2]} TO {role};"
    if "replication" in text.lower():
        return f"ALTER ROLE {role} REPLICATION;"
    return f"GRANT pg_monitor, pg_read_all_data TO {role};"


def _shown(dsn: str) -> str:
    try:
        words = conninfo.conninfo_to_dict(dsn)
    except psycopg.Error:
        return "connection string"
    words.pop("password", None)
    return " ".join(f"{key}={value}" for key, value in words.items() if value is not None)


def with_words(dsn: str, **words: str | int | None) -> str:
    """The connection string with some words replaced, such as `dbname`."""
    try:
        return conninfo.make_conninfo(dsn, **words)
    except psycopg.ProgrammingError as error:
        raise PostgresError(f"not a connection string: {_line(error)}") from error


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a running server is. `data_directory` is None where the role may not see it."""

    version: int
    system_identifier: int
    timeline: Timeline
    in_recovery: bool
    segment_bytes: int
    checksums: bool
    wal_level: str
    data_directory: Path | None
    is_superuser: bool

    @property
    def major(self) -> int:
        return self.version // 10000


_FACTS = """
select pg_catalog.current_setting('server_version_num')::int,
       (select system_identifier from pg_catalog.pg_control_system()),
       case when pg_catalog.pg_is_in_recovery()
            then (select timeline_id from pg_catalog.pg_control_checkpoint())
            -- Right after a promotion the control file still tells the old one.
            else ('x' || substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8))::bit(32)::int
            end,
       pg_catalog.pg_is_in_recovery(),
       pg_catalog.pg_size_bytes(pg_catalog.current_setting('wal_segment_size')),
       pg_catalog.current_setting('data_checksums') = 'on',
       pg_catalog.current_setting('wal_level'),
       pg_catalog.current_setting('data_directory', true),
       pg_catalog.current_setting('is_superuser') = 'on'
"""


def server_facts(connection: Connection, expected_system: int | None = None) -> ServerFacts:
    """Read what the server is; raises WrongSystemError if it is not the cluster expected."""
    with translated():
        try:
            row = connection.execute(_FACTS).fetchone()
        except psycopg.errors.InsufficientPrivilege:
            # data_directory is shown to pg_read_all_settings only.
            row = connection.execute(
                _FACTS.replace("pg_catalog.current_setting('data_directory', true)", "null")
            ).fetchone()
    assert row is not None
    version, system, timeline, recovering, segment, checksums, level, folder, superuser = row
    if version // 10000 not in SUPPORTED:
        raise UnsupportedVersionError(
            f"PostgreSQL {version // 10000} is not supported",
            hint=f"versions {SUPPORTED[0]} to {SUPPORTED[-1]} are",
        )
    # system_identifier is unsigned, SQL's bigint is not.
    system %= 1 << 64
    if expected_system is not None and system != expected_system:
        raise WrongSystemError(
            f"this server is cluster {system}, the repository belongs to cluster {expected_system}",
            hint="is the dsn right? A new cluster needs a repository of its own",
        )
    return ServerFacts(
        version=version,
        system_identifier=system,
        timeline=Timeline(timeline),
        in_recovery=recovering,
        segment_bytes=segment,
        checksums=checksums,
        wal_level=level,
        data_directory=Path(folder) if folder else None,
        is_superuser=superuser,
    )


def current_insert_lsn(connection: Connection) -> Lsn:
    """The insert position (on a standby the replayed one)."""
    with translated():
        row = connection.execute(
            "select case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn()"
            " else pg_catalog.pg_current_wal_insert_lsn() end::text"
        ).fetchone()
    assert row is not None
    return Lsn.parse(row[0])
