"""The replication protocol: what the server is, slots, and base backups as a stream of events."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NoReturn, Self

import psycopg
from psycopg import pq

from knockwood.errors import MissingPrivilegeError, PostgresError, ServerDownError, UnsupportedVersionError
from knockwood.host.files import Chunk
from knockwood.model import Lsn, Timeline
from knockwood.postgres.binaries import SUPPORTED
from knockwood.postgres.connection import grant, translated, with_words

_MAIN_ARCHIVE = "base.tar"


@dataclass(frozen=True, slots=True)
class SystemIdentity:
    """What IDENTIFY_SYSTEM answers. `lsn` is the flushed position."""

    system_identifier: int
    timeline: Timeline
    lsn: Lsn


@dataclass(frozen=True, slots=True)
class TablespaceInfo:
    """A tablespace of a base backup; `oid` and `location` are None for the data directory itself.

    `bytes` is the server's estimate, rounded to kilobytes.
    """

    oid: int | None
    location: str | None
    bytes: int


@dataclass(frozen=True, slots=True)
class BackupStarted:
    """The first event: replay must begin at `lsn`."""

    lsn: Lsn
    timeline: Timeline
    tablespaces: tuple[TablespaceInfo, ...]

    @property
    def bytes(self) -> int:
        return sum(tablespace.bytes for tablespace in self.tablespaces)


@dataclass(frozen=True, slots=True)
class ArchiveStarted:
    """A tar archive begins: of the tablespace `oid`, or of the data directory (None)."""

    oid: int | None


@dataclass(frozen=True, slots=True)
class ManifestStarted:
    """The backup manifest begins."""


@dataclass(frozen=True, slots=True)
class BackupEnded:
    """The last event: the backup is consistent once `lsn` is replayed."""

    lsn: Lsn
    timeline: Timeline


Event = BackupStarted | ArchiveStarted | ManifestStarted | BackupEnded | memoryview
"""A memoryview is the next bytes of what was started last; it is valid as long as it is referenced."""

Row = tuple[str | None, ...]


class ReplicationConnection:
    """A connection that speaks the replication protocol. One command at a time; not for several threads.

    With `database` it also takes SQL. Raises ServerDownError, AuthenticationError, MissingPrivilegeError
    or PostgresError.
    """

    def __init__(self, dsn: str, *, database: bool = False, application_name: str = "knockwood") -> None:
        mode = "database" if database else "true"
        full = with_words(dsn, replication=mode, application_name=application_name, connect_timeout=10)
        if "keepalives" not in dsn:
            # A server that vanished without a word would otherwise be waited for two hours.
            full = with_words(full, keepalives_idle=30, keepalives_interval=10, keepalives_count=6)
        self._dsn = dsn
        self._connection = pq.PGconn.connect(full.encode())
        if self._connection.status != pq.ConnStatus.OK:
            message = self._connection.get_error_message().strip()
            self._connection.finish()
            _raise_refusal(message, dsn)
        self._poll = select.poll()
        self._poll.register(self._connection.socket, select.POLLIN)
        if self.major not in SUPPORTED:
            self.close()
            raise UnsupportedVersionError(
                f"PostgreSQL {self.major} is not supported",
                hint=f"versions {SUPPORTED[0]} to {SUPPORTED[-1]} are",
            )

    @property
    def major(self) -> int:
        return self._connection.server_version // 10000

    @property
    def version(self) -> int:
        """As in server_version_num: 150018, 180006."""
        return self._connection.server_version

    def close(self) -> None:
        self._connection.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- small commands --------------------------------------------------------------------------

    def rows(self, command: str) -> list[Row]:
        """Run a replication command (or SQL, with `database`) and return its last result's rows."""
        return self._execute(command)

    def identify_system(self) -> SystemIdentity:
        """The server's system identifier, timeline and flushed position."""
        system, timeline, lsn, *_ = self._execute("IDENTIFY_SYSTEM")[0]
        return SystemIdentity(int(system or 0), Timeline(int(timeline or 0)), Lsn.parse(lsn or ""))

    def create_physical_slot(self, name: str, *, reserve_wal: bool = True) -> None:
        """Make a permanent physical slot; it holds WAL from now on with `reserve_wal`."""
        words = " RESERVE_WAL" if reserve_wal else ""
        self._execute(f"CREATE_REPLICATION_SLOT {_identifier(name)} PHYSICAL{words}")

    def drop_slot(self, name: str) -> None:
        self._execute(f"DROP_REPLICATION_SLOT {_identifier(name)}")

    def read_slot(self, name: str) -> tuple[Lsn | None, Timeline | None] | None:
        """(restart LSN, its timeline) of a physical slot, or None if there is no such slot. From 15 on."""
        if self.major < 15:
            raise UnsupportedVersionError("READ_REPLICATION_SLOT exists from PostgreSQL 15 on")
        kind, lsn, timeline, *_ = self._execute(f"READ_REPLICATION_SLOT {_identifier(name)}")[0]
        if kind is None:
            return None
        return Lsn.parse(lsn) if lsn else None, Timeline(int(timeline)) if timeline else None

    # --- base backups ----------------------------------------------------------------------------

    def upload_manifest(self, chunks: Iterable[Chunk]) -> None:
        """Tell the server which backup the next incremental one builds on. From 17 on."""
        self._require_incremental()
        self._send("UPLOAD_MANIFEST")
        self._next(pq.ExecStatus.COPY_IN)
        with translated(self._dsn):
            for chunk in chunks:
                self._connection.put_copy_data(bytes(chunk))
            self._connection.put_copy_end()
        while (result := self._result()) is not None:
            self._check(result, pq.ExecStatus.COMMAND_OK)

    def _require_incremental(self) -> None:
        if self.major < 17:
            raise UnsupportedVersionError(
                f"PostgreSQL {self.major} cannot take incremental backups",
                hint="they exist from 17 on; take a full backup",
            )

    def base_backup(
        self,
        label: str,
        *,
        incremental: bool = False,
        checkpoint: Literal["fast", "spread"] = "fast",
        manifest_checksums: Literal["NONE", "CRC32C", "SHA256"] = "CRC32C",
    ) -> Iterator[Event]:
        """Stream a base backup without its WAL, in bounded memory.

        The server neither verifies page checksums (it would report the first few only) nor waits
        until the WAL is archived: both are the caller's. Abandoning the iterator leaves the
        connection unusable: close it.
        """
        if incremental:
            self._require_incremental()
        self._send(_base_backup_command(self.major, label, incremental, checkpoint, manifest_checksums))
        position = _rows(self._next(pq.ExecStatus.TUPLES_OK))[0]
        spaces = [_tablespace(row) for row in _rows(self._next(pq.ExecStatus.TUPLES_OK))]
        yield BackupStarted(Lsn.parse(position[0] or ""), Timeline(int(position[1] or 0)), tuple(spaces))
        if self.major >= 15:
            yield from self._single_copy(spaces)
        else:
            yield from self._copy_per_tablespace(spaces)
        end = _rows(self._next(pq.ExecStatus.TUPLES_OK))[0]
        while (result := self._result()) is not None:
            self._check(result, pq.ExecStatus.COMMAND_OK)
        # Only now: the server reports a failure at the very end (a tablespace gone, say) here.
        yield BackupEnded(Lsn.parse(end[0] or ""), Timeline(int(end[1] or 0)))

    def _single_copy(self, spaces: list[TablespaceInfo]) -> Iterator[Event]:
        self._next(pq.ExecStatus.COPY_OUT)
        for message in self._copy_messages():
            kind = message[0]
            if kind == 0x64:  # d: data of what was started last
                yield message[1:]
            elif kind == 0x6E:  # n: a new archive, its name, the tablespace's location
                name, _, _ = bytes(message[1:]).partition(b"\0")
                yield ArchiveStarted(_archive_oid(name.decode()))
            elif kind == 0x6D:  # m
                yield ManifestStarted()
            # p: progress; we count ourselves

    def _copy_per_tablespace(self, spaces: list[TablespaceInfo]) -> Iterator[Event]:
        for space in spaces:
            self._next(pq.ExecStatus.COPY_OUT)
            yield ArchiveStarted(space.oid)
            yield from self._copy_messages()
        self._next(pq.ExecStatus.COPY_OUT)
        yield ManifestStarted()
        yield from self._copy_messages()

    def _copy_messages(self) -> Iterator[memoryview]:
        get, consume = self._connection.get_copy_data, self._connection.consume_input
        with translated(self._dsn):
            while True:
                size, data = get(1)
                if size > 0:
                    yield data
                elif size < 0:
                    return
                else:
                    self._wait()
                    consume()

    # --- results ---------------------------------------------------------------------------------

    def _wait(self) -> None:
        # libpq's own waiting holds the interpreter: no other thread (a lease's renewal, say) would run.
        # With TLS some input may lie decrypted in libpq while the socket is empty: look now and then.
        self._poll.poll(100)

    def _result(self) -> pq.abc.PGresult | None:
        while self._connection.is_busy():
            self._wait()
            self._connection.consume_input()
        return self._connection.get_result()

    def _send(self, command: str) -> None:
        with translated(self._dsn):
            self._connection.send_query(command.encode())

    def _next(self, wanted: pq.ExecStatus) -> pq.abc.PGresult:
        with translated(self._dsn):
            result = self._result()
        if result is None:
            raise ServerDownError("the server ended its answer too early")
        return self._check(result, wanted)

    def _check(self, result: pq.abc.PGresult, wanted: pq.ExecStatus) -> pq.abc.PGresult:
        if result.status == wanted:
            return result
        if result.status in (pq.ExecStatus.FATAL_ERROR, pq.ExecStatus.BAD_RESPONSE):
            error = psycopg.errors.error_from_result(result)
            text = result.get_error_message()
            if "summariz" in text or "summaries" in text:
                raise PostgresError(
                    text.strip().splitlines()[0].removeprefix("ERROR:").strip(),
                    hint="incremental backups need summarize_wal = on since before the backup they build on: "
                    "ALTER SYSTEM SET summarize_wal = on, reload, then take a full backup",
                )
            if isinstance(error, psycopg.errors.InsufficientPrivilege) and "replication" in text.lower():
                raise MissingPrivilegeError(
                    text.strip().splitlines()[0].removeprefix("ERROR:").strip(),
                    hint=grant(text, self._dsn),
                )
            with translated(self._dsn):
                raise error
        name = pq.ExecStatus(result.status).name
        raise PostgresError(f"the server answered {name} where {wanted.name} was expected")

    def _execute(self, command: str) -> list[Row]:
        self._send(command)
        rows: list[Row] = []
        with translated(self._dsn):
            while (result := self._result()) is not None:
                if result.status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
                    self._drain_after(result)
                if result.status == pq.ExecStatus.TUPLES_OK:
                    rows = _rows(result)
        return rows

    def _drain_after(self, result: pq.abc.PGresult) -> None:
        with contextlib.suppress(psycopg.Error):
            while self._result() is not None:
                pass
        self._check(result, pq.ExecStatus.TUPLES_OK)


def _raise_refusal(message: str, dsn: str) -> NoReturn:
    lines = [line for line in message.splitlines() if not line.startswith(("DETAIL:", "HINT:"))]
    if "REPLICATION attribute" in message or "must be superuser or replication role" in message:
        raise MissingPrivilegeError(lines[-1].rpartition("FATAL:")[2].strip(), hint=grant(message, dsn))
    with translated(dsn):
        raise psycopg.OperationalError(lines[-1] if lines else message)
    raise ServerDownError(message)


def _base_backup_command(
    major: int, label: str, incremental: bool, checkpoint: str, manifest_checksums: str
) -> str:
    if major < 15:
        fast = " FAST" if checkpoint == "fast" else ""
        return (
            f"BASE_BACKUP LABEL {_literal(label)} PROGRESS{fast} NOWAIT TABLESPACE_MAP NOVERIFY_CHECKSUMS"
            f" MANIFEST 'yes' MANIFEST_CHECKSUMS {_literal(manifest_checksums)}"
        )
    options = [
        f"LABEL {_literal(label)}",
        "PROGRESS",
        f"CHECKPOINT {_literal(checkpoint)}",
        "WAIT false",
        "WAL false",
        "TABLESPACE_MAP",
        "VERIFY_CHECKSUMS false",
        "MANIFEST 'yes'",
        f"MANIFEST_CHECKSUMS {_literal(manifest_checksums)}",
    ]
    if incremental:
        options.append("INCREMENTAL")
    return f"BASE_BACKUP ({', '.join(options)})"


def _archive_oid(name: str) -> int | None:
    return None if name == _MAIN_ARCHIVE else int(name.removesuffix(".tar"))


def _tablespace(row: Row) -> TablespaceInfo:
    oid, location, kilobytes = row
    return TablespaceInfo(int(oid) if oid else None, location or None, int(kilobytes or 0) * 1024)


def _rows(result: pq.abc.PGresult) -> list[Row]:
    return [
        tuple(_text(result.get_value(row, column)) for column in range(result.nfields))
        for row in range(result.ntuples)
    ]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
