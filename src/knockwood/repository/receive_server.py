"""The server's side of receiving: its slot, its timelines, and the pg_receivewal process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import conninfo, pq

from knockwood.errors import (
    KnockwoodError,
    NoSpaceError,
    PostgresError,
    ProgramFailedError,
    SlotLostError,
)
from knockwood.host import processes
from knockwood.model.wal import Lsn, Timeline, TimelineHistory
from knockwood.postgres.binaries import Programs
from knockwood.postgres.connection import Connection, connect, translated, with_words

# In a message of the server, in whatever language: the name of the segment it no longer has. Our own
# program's messages about local files hold such names in quotes.
_REMOVED = re.compile(r"(?<![\"'/0-9A-F])([0-9A-F]{24})(?![\"'./0-9A-F])")


@dataclass(frozen=True, slots=True)
class Slot:
    """A physical replication slot. `restart` is None while it reserves nothing."""

    name: str
    restart: Lsn | None
    lost: bool
    active_pid: int | None


@dataclass(frozen=True, slots=True)
class ServerPosition:
    """Where the server is: its timeline with the ancestry, and its flush position."""

    system_identifier: int
    history: TimelineHistory
    flush: Lsn

    @property
    def timeline(self) -> Timeline:
        return self.history.timeline


def find_slot(connection: Connection, name: str) -> Slot | None:
    """The slot, or None. Raises PostgresError if it is a logical one."""
    with translated(connection.info.dsn):
        row = connection.execute(
            "select slot_type, restart_lsn::text, wal_status, active_pid"
            " from pg_catalog.pg_replication_slots where slot_name = %s",
            [name],
        ).fetchone()
    if row is None:
        return None
    kind, restart, status, pid = row
    if kind != "physical":
        raise PostgresError(
            f"the replication slot {name} is a {kind} one", hint="choose another name for the receiver's slot"
        )
    # A lost slot of some versions keeps its restart_lsn, of others it does not.
    return Slot(name, Lsn.parse(restart) if restart else None, status == "lost", pid)


def create_slot(connection: Connection, name: str) -> Slot:
    """Make a permanent physical slot that reserves WAL from the last checkpoint on."""
    with translated(connection.info.dsn):
        connection.execute("select pg_catalog.pg_create_physical_replication_slot(%s, true)", [name])
    slot = find_slot(connection, name)
    if slot is None:
        raise PostgresError(f"the replication slot {name} was dropped right after it was made")
    return slot


def drop_slot(connection: Connection, name: str) -> None:
    with translated(connection.info.dsn):
        connection.execute("select pg_catalog.pg_drop_replication_slot(%s)", [name])


def identify(dsn: str) -> ServerPosition:
    """Ask over the replication protocol: right at once after a promotion, unlike the control file."""
    with connect(with_words(dsn, replication="true"), application_name="knockwood identify") as connection:
        system, timeline, flush = _command(connection, "IDENTIFY_SYSTEM")[:3]
        current = Timeline(int(timeline))
        history = TimelineHistory(current)
        if current > 1:
            _name, text = _command(connection, f"TIMELINE_HISTORY {current}")[:2]
            try:
                history = TimelineHistory.parse(current, text)
            except ValueError as error:
                raise PostgresError(f"the server's history of timeline {current}: {error}") from error
        return ServerPosition(int(system), history, Lsn.parse(flush))


def _command(connection: Connection, command: str) -> list[str]:
    # The replication protocol knows simple queries only, psycopg's execute sends extended ones.
    with translated(connection.info.dsn):
        result = connection.pgconn.exec_(command.encode())
    if result.status != pq.ExecStatus.TUPLES_OK or result.ntuples != 1:
        raise PostgresError(f"{command} failed: {result.error_message.decode(errors='replace').strip()}")
    values = (result.get_value(0, column) for column in range(result.nfields))
    return [value.decode("utf-8", "surrogateescape") if value is not None else "" for value in values]


@dataclass(frozen=True, slots=True)
class Progress:
    """What the server says: how far its WAL is flushed, and how far our receiver wrote it.

    `timeline` is None on a standby, which does not tell it reliably in SQL.
    """

    timeline: Timeline | None
    flush: Lsn
    written: Lsn | None


_PROGRESS = """
select case when pg_catalog.pg_is_in_recovery()
            then coalesce(pg_catalog.pg_last_wal_receive_lsn(), pg_catalog.pg_last_wal_replay_lsn())
            else pg_catalog.pg_current_wal_flush_lsn() end::text,
       (select r.write_lsn::text from pg_catalog.pg_stat_replication r
          join pg_catalog.pg_replication_slots s on s.active_pid = r.pid where s.slot_name = %s),
       case when not pg_catalog.pg_is_in_recovery()
            then pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_flush_lsn()), 8) end
"""


def progress(connection: Connection, slot: str) -> Progress:
    with translated(connection.info.dsn):
        row = connection.execute(_PROGRESS, [slot]).fetchone()
    assert row is not None
    flush, written, timeline = row
    return Progress(
        Timeline(int(timeline, 16)) if timeline else None,
        Lsn.parse(flush),
        Lsn.parse(written) if written else None,
    )


def flushed(dsn: str) -> Progress:
    """How far the server's WAL is flushed now: every commit acknowledged before lies below it."""
    with connect(dsn, application_name="knockwood flush") as connection:
        return progress(connection, "")


class Stream:
    """One run of pg_receivewal into the spool. It ends when its connection does."""

    def __init__(
        self, programs: Programs, dsn: str, spool: Path, *, slot: str, name: str, synchronous: bool
    ) -> None:
        words, environment = _without_password(dsn)
        command: list[str | Path] = [
            programs.path("pg_receivewal"),
            *("--directory", spool, "--slot", slot, "--no-loop", "--no-password"),
            *("--status-interval", "1"),
            *("--dbname", conninfo.make_conninfo("", **words, application_name=name)),
        ]
        if synchronous:
            command.append("--synchronous")
        # Ends with us, however we end: two of them in one spool would be one too many.
        self._child = processes.start(
            command, env=environment, stderr=subprocess.PIPE, death_signal=signal.SIGKILL
        )

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child.poll() is None

    def stop(self) -> None:
        """End it and wait; harmless if it has ended."""
        processes.stop(self._child)
        if self._child.stderr is not None:
            self._child.stderr.close()

    def failure(self) -> StreamEnded:
        """Why it ended. Call it once it has."""
        text = b""
        if self._child.stderr is not None:
            text = self._child.stderr.read()
            self._child.stderr.close()
        return StreamEnded.of(self._child.wait(), text.decode(errors="replace"))


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """How pg_receivewal ended. `removed` names the segment that the server no longer has."""

    error: KnockwoodError
    removed: str | None

    @classmethod
    def of(cls, status: int, text: str) -> StreamEnded:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        shown = " / ".join(
            line.removeprefix("pg_receivewal: ").removeprefix("error: ") for line in lines[-3:]
        )
        if "No space left on device" in text or "Disk quota exceeded" in text:
            return cls(
                NoSpaceError(
                    f"the disk of the spool is full: {shown}",
                    hint="free some space there; the slot keeps the WAL on the server meanwhile",
                ),
                None,
            )
        removed = [match[1] for line in lines for match in _REMOVED.finditer(line)]
        if removed:
            return cls(SlotLostError(f"the server no longer has the WAL needed: {shown}"), removed[-1])
        return cls(ProgramFailedError(shown or f"ended with status {status}", where="pg_receivewal"), None)


def _without_password(dsn: str) -> tuple[dict[str, str], Mapping[str, str]]:
    """Connection words for the command line, which anybody can read, and the environment for the rest."""
    try:
        words = {key: str(value) for key, value in conninfo.conninfo_to_dict(dsn).items()}
    except psycopg.ProgrammingError as error:
        raise PostgresError("not a connection string") from error
    environment = {**os.environ, "LC_ALL": "C"}
    for word, variable in (("password", "PGPASSWORD"), ("sslpassword", None)):
        secret = words.pop(word, None)
        if secret is not None and variable is not None:
            environment[variable] = secret
        elif secret is not None:
            raise PostgresError(
                f"{word} in the connection string would be shown to every account of this machine",
                hint="use a key without a password, readable by this account only",
            )
    for word in ("application_name", "replication", "dbname", "fallback_application_name"):
        words.pop(word, None)
    # A peer that vanished is noticed within half a minute.
    alive = {"keepalives_idle": "10", "keepalives_interval": "5", "keepalives_count": "3"}
    return {"connect_timeout": "10", **alive, **words}, environment
