"""pg_backup_start and pg_backup_stop: a backup of the files whose copying is ours.

The server forgets the backup when the session that began it ends, whoever ends it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from psycopg import sql

from knockwood.errors import MissingPrivilegeError, PostgresError
from knockwood.model import Lsn, Timeline
from knockwood.postgres.connection import Connection, connect, translated, with_words

_FUNCTIONS = ("pg_backup_start(text, boolean)", "pg_backup_stop(boolean)")
_FUNCTIONS_14 = ("pg_start_backup(text, boolean, boolean)", "pg_stop_backup(boolean, boolean)")


def grant_to_begin(major: int) -> str:
    """The SQL that lets a role (`{}`) begin and end backups, in the database that it connects to."""
    names = _FUNCTIONS if major >= 15 else _FUNCTIONS_14
    return f"GRANT EXECUTE ON FUNCTION {', '.join(f'pg_catalog.{name}' for name in names)} TO {{}}"


@dataclass(frozen=True, slots=True)
class Stopped:
    """What the server says at the end: the texts of backup_label and tablespace_map, and what is in them."""

    start: Lsn
    lsn: Lsn
    timeline: Timeline
    label: str
    tablespace_map: str
    tablespaces: Mapping[int, str]


class OnlineBackup:
    """A backup on the server, from `start` to `stop`, in a session of its own. Leaving the block ends it."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        # The session does nothing for as long as the files are copied.
        words: dict[str, str | int] = {
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 6,
        }
        self._connection = connect(
            with_words(dsn, **words) if "keepalives" not in dsn else dsn, application_name="knockwood backup"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    @property
    def _old(self) -> bool:
        return self._connection.info.server_version < 150000

    def start(self, label: str, *, fast: bool) -> Lsn:
        """Begin; where replay must start. Raises MissingPrivilegeError with the grant that mends it."""
        with translated(self._dsn):
            for name in ("idle_session_timeout", "statement_timeout"):
                self._connection.execute("select pg_catalog.set_config(%s, '0', false)", [name])
        call = "pg_start_backup(%s, %s, false)" if self._old else "pg_backup_start(%s, %s)"
        return Lsn.parse(self._row(f"select pg_catalog.{call}::text", [label, fast])[0])

    def check(self) -> None:
        """Raises ServerDownError or PostgresError if the session, and with it the backup, is gone."""
        self._row("select '1'", [])

    def stop(self) -> Stopped:
        """End the backup. It is consistent once WAL is replayed up to `lsn`."""
        call = "pg_stop_backup(false, false)" if self._old else "pg_backup_stop(false)"
        lsn, label, spaces = self._row(f"select lsn::text, labelfile, spcmapfile from pg_catalog.{call}", [])
        start = re.search(r"^START WAL LOCATION: (\S+) ", label, re.MULTILINE)
        timeline = re.search(r"^START TIMELINE: (\d+)$", label, re.MULTILINE)
        if start is None or timeline is None:
            raise PostgresError("the server's backup_label names no start or no timeline")
        return Stopped(
            Lsn.parse(start[1]),
            Lsn.parse(lsn),
            Timeline(int(timeline[1])),
            label,
            spaces or "",
            parse_map(spaces or ""),
        )

    def _row(self, query: str, values: list[object]) -> tuple[str, ...]:
        try:
            with translated(self._dsn):
                row = self._connection.execute(query, values).fetchone()
        except MissingPrivilegeError as error:
            error.hint = grant_to_begin(14 if self._old else 15).format(_role(self._connection)) + ";"
            raise
        assert row is not None
        return row


def may_start(connection: Connection) -> bool:
    """Whether the role may begin and end such backups."""
    old = connection.info.server_version < 150000
    names = _FUNCTIONS_14 if old else _FUNCTIONS
    with translated():
        row = connection.execute(
            "select pg_catalog.bool_and(pg_catalog.has_function_privilege('pg_catalog.' || name, 'execute'))"
            " from pg_catalog.unnest(%s::text[]) as name",
            [list(names)],
        ).fetchone()
    return bool(row and row[0])


def _role(connection: Connection) -> str:
    return sql.Identifier(connection.info.user).as_string(None)


def parse_map(text: str) -> dict[int, str]:
    """The tablespaces of a tablespace_map: oid and folder. A backslash stands before odd characters."""
    found = {}
    for line in re.findall(r"(?:\\.|[^\\\n\r])+", text, re.DOTALL):
        oid, _, place = line.partition(" ")
        found[int(oid)] = re.sub(r"\\(.)", r"\1", place, flags=re.DOTALL)
    return found
