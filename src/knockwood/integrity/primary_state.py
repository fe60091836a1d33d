"""What every table of a primary holds at one position of the WAL: the first half of a comparison.

Two ways to tie rows to a position, chosen per database:

- *exact*: a temporary logical slot exports the snapshot of exactly the commits before its LSN
  (wal_level=logical; one database, since each slot has an LSN of its own).
- *versions* (any wal_level): an ordinary snapshot S, then a position X read after it, and only then the
  rows. A copy replayed to X holds every version that S sees: what S sees was committed before X, and
  while S is open nothing it sees can be pruned. Copies of one cluster are the same to the byte, so a
  version (ctid, xmin) that both see must be equal, and one that only one side sees must be explained by
  a transaction that ended between S and X; since rows are read after X, such a transaction has left
  its id in the row's xmax. Versions that nobody has touched since S are settled and only counted,
  xored and summed; the few others are listed one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal

import psycopg

from knockwood.errors import KnockwoodError, PostgresError
from knockwood.host import clock
from knockwood.integrity.databases import rows
from knockwood.integrity.fingerprint import (
    Blocks,
    RowVersion,
    Snapshot,
    Totals,
    split,
    totals_query,
    versions_query,
)
from knockwood.integrity.run import reason_of
from knockwood.integrity.tables import Sequence, Table, open_pinned, sequences_of, tables_of
from knockwood.model import Lsn, Timeline
from knockwood.postgres.connection import Connection, current_insert_lsn, server_facts, translated
from knockwood.postgres.replication import ReplicationConnection

Method = Literal["exact", "versions"]
Report = Callable[[str, int, int], None]
"""Called with a table's name, the chunks done and the chunks of its database."""

MAX_LISTED: Final = 200_000
"""Row versions of one chunk that may be listed one by one; with more, the table is not checked."""

_SLOT_TIMEOUT: Final = 60.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of blocks: the totals of its settled rows (exact: of all rows), and the unsettled ones."""

    blocks: Blocks
    totals: Totals
    listed: tuple[RowVersion, ...] = ()


@dataclass(frozen=True, slots=True)
class TableState:
    """A table's fingerprint. `problem` says why there is none, `damaged` that reading it failed as damage."""

    table: Table
    chunks: tuple[Chunk, ...] = ()
    problem: str | None = None
    damaged: bool = False

    @property
    def rows(self) -> int:
        return sum(chunk.totals.count + len(chunk.listed) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class DatabaseState:
    """A database's tables under one snapshot, and its sequences from before it."""

    name: str
    method: Method
    snapshot: Snapshot
    tables: tuple[TableState, ...]
    sequences: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class PrimaryState:
    """What a copy must hold that was replayed to `lsn` of `timeline`: all commits whose record starts before
    it, and no commit from there on. `seconds` is what hashing took; `skipped` are databases that could not be
    read. `mark` lies just before the record of a commit of our own: whatever ends before it is too short."""

    lsn: Lsn
    timeline: Timeline
    databases: tuple[DatabaseState, ...]
    taken_at: datetime
    seconds: float
    skipped: dict[str, str] = field(default_factory=dict)
    mark: Lsn | None = None

    @property
    def tables(self) -> tuple[TableState, ...]:
        return tuple(table for database in self.databases for table in database.tables)


@dataclass(slots=True)
class _Held:
    """A database whose snapshot is held open by `connection`."""

    name: str
    connection: Connection
    method: Method
    exported: str
    snapshot: Snapshot
    sequences: tuple[Sequence, ...]


def primary_state(
    dsn: str,
    *,
    databases: tuple[str, ...] | None = None,
    workers: int = 2,
    method: Method | None = None,
    progress: Report | None = None,
    on_mark: Callable[[Lsn], None] | None = None,
) -> PrimaryState:
    """Fingerprint the tables of a primary (all databases that take connections, if None).

    The database of `dsn` is read exactly where the server can (see the module); `method="versions"`
    never makes a slot, `method="exact"` raises PostgresError where it cannot. Writes one empty
    transaction, so that the WAL has a commit after everything the snapshots see. The snapshots are
    held only while hashing; `on_mark` is told the position before that begins. Raises ServerDownError and
    its like, PostgresError where the server was restarted or another took its place meanwhile; a database
    that cannot be read is in `skipped`.
    """
    with ExitStack() as stack:
        main = stack.enter_context(open_pinned(dsn, None))
        with translated():
            [(main_name, recovering, level)] = rows(
                main,
                "select pg_catalog.current_database(), pg_catalog.pg_is_in_recovery(),"
                " pg_catalog.current_setting('wal_level')",
            )
            if recovering:
                raise PostgresError("this server is a standby", hint="name the primary in the dsn")
            names = databases or tuple(
                name
                for (name,) in rows(main, "select datname from pg_catalog.pg_database where datallowconn")
            )
        exact = main_name in names and (method == "exact" or (method is None and level == "logical"))
        held, skipped = _hold_ordinary(stack, dsn, sorted(set(names) - {main_name} if exact else set(names)))
        main_sequences = tuple(sequences_of(main)) if exact else ()
        lsn, mark = _mark(main)
        if exact:
            try:
                lsn, last = _hold_exact(stack, dsn, main_name, main_sequences)
            except (KnockwoodError, psycopg.Error) as error:
                if method == "exact":
                    raise
                skipped_reason = reason_of(error)
                more, missing = _hold_ordinary(stack, dsn, [main_name])
                skipped |= {name: f"{reason}; {skipped_reason}" for name, reason in missing.items()}
                held, (lsn, mark) = held + more, _mark(main)
            else:
                held.append(last)
        if on_mark:
            on_mark(lsn)
        started = clock.monotonic()
        states = tuple(_fingerprint(dsn, database, workers, progress) for database in held)
        # That this session still lives says that all was read from one server.
        timeline = server_facts(main).timeline
        return PrimaryState(lsn, timeline, states, clock.now(), clock.monotonic() - started, skipped, mark)


def _mark(connection: Connection) -> tuple[Lsn, Lsn | None]:
    """A position after everything that was committed so far, and, if we may write, one that lies before the
    record of an empty commit of our own.

    On an idle server the last commit may lie long before values that sequences have handed out.
    """
    mark = None
    with translated():
        try:
            [(text,)] = rows(
                connection,
                "select pg_catalog.pg_logical_emit_message(true, 'knockwood', 'compare')::pg_catalog.text",
            )
            mark = Lsn.parse(text)
        except psycopg.Error:
            pass
    return current_insert_lsn(connection), mark


def _hold_ordinary(stack: ExitStack, dsn: str, names: list[str]) -> tuple[list[_Held], dict[str, str]]:
    held, skipped = [], {}
    for name in names:
        try:
            connection = stack.enter_context(open_pinned(dsn, name))
            sequences = tuple(sequences_of(connection))
            connection.execute("begin isolation level repeatable read, read only")
            held.append(_hold(name, connection, "versions", sequences))
        except (KnockwoodError, psycopg.Error) as error:
            skipped[name] = reason_of(error)
    return held, skipped


def _hold(name: str, connection: Connection, method: Method, sequences: tuple[Sequence, ...]) -> _Held:
    [(exported, shown)] = rows(
        connection, "select pg_catalog.pg_export_snapshot(), pg_catalog.pg_current_snapshot()::text"
    )
    return _Held(name, connection, method, exported, Snapshot.parse(shown), sequences)


def _hold_exact(stack: ExitStack, dsn: str, name: str, sequences: tuple[Sequence, ...]) -> tuple[Lsn, _Held]:
    connection = stack.enter_context(open_pinned(dsn, name))
    slot = f"knockwood_compare_{connection.info.backend_pid}"
    option = "(SNAPSHOT 'export')" if connection.info.server_version >= 150000 else "EXPORT_SNAPSHOT"
    with ReplicationConnection(dsn, database=True, application_name="knockwood compare") as replication:
        # It waits for every transaction that runs now; one that never ends must not keep us.
        replication.rows(f"SET statement_timeout = {int(_SLOT_TIMEOUT * 1000)}")
        [(_, position, exported, _)] = replication.rows(
            f"CREATE_REPLICATION_SLOT {slot} TEMPORARY LOGICAL pgoutput {option}"
        )
        connection.execute("begin isolation level repeatable read, read only")
        connection.execute(f"set transaction snapshot '{exported}'".encode())
        held = _hold(name, connection, "exact", sequences)
    _wait_until_ended(dsn, held.snapshot)
    return Lsn.parse(position or ""), held


def _wait_until_ended(dsn: str, snapshot: Snapshot) -> None:
    """Wait until nothing the snapshot sees as committed still counts as running.

    A logical snapshot follows the order of commit records; between its record and its leaving the
    list of running transactions a committed one would be taken for aborted, and hint bits set so.
    """
    with open_pinned(dsn, None) as connection:
        while True:
            [(shown,)] = rows(connection, "select pg_catalog.pg_current_snapshot()::text")
            running = Snapshot.parse(shown).running
            if not any(xid < snapshot.xmax and xid not in snapshot.running for xid in running):
                return
            clock.sleep(0.005)


class Workers:
    """Connections that threads use side by side: one per thread, made by `make` at its first job."""

    def __init__(self, make: Callable[[], Connection]) -> None:
        self._make = make
        self._local = threading.local()
        self._made: list[Connection] = []
        self._lock = threading.Lock()

    def connection(self) -> Connection:
        """This thread's connection; after an error that ended it, a new one."""
        mine: Connection | None = getattr(self._local, "connection", None)
        if mine is None or mine.closed:
            mine = self._make()
            self._local.connection = mine
            with self._lock:
                self._made.append(mine)
        return mine

    def close(self) -> None:
        for connection in self._made:
            connection.close()


@contextmanager
def pool(workers: int, make: Callable[[], Connection]) -> Iterator[tuple[ThreadPoolExecutor, Workers]]:
    """Threads with a connection each; all of it is closed at the end."""
    connections = Workers(make)
    executor = ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="compare")
    try:
        yield executor, connections
    finally:
        executor.shutdown(cancel_futures=True)
        connections.close()


def _fingerprint(dsn: str, held: _Held, workers: int, progress: Report | None) -> DatabaseState:
    with translated():
        tables = tables_of(held.connection, held.name)
        [(multixact,)] = rows(
            held.connection,
            "select oldest_multi_xid::text::bigint from pg_catalog.pg_control_checkpoint()",
        )

    def make() -> Connection:
        connection = open_pinned(dsn, held.name)
        connection.execute("begin isolation level repeatable read, read only")
        connection.execute(f"set transaction snapshot '{held.exported}'".encode())
        return connection

    states: list[TableState] = []
    with pool(workers, make) as (executor, connections):
        pieces = {table.oid: _pieces(held.connection, table) for table in tables}
        total = sum(len(found) for found in pieces.values())
        jobs = {
            oid: [
                executor.submit(_hash_chunk, connections, held, tables_by, blocks, multixact)
                for blocks in found
            ]
            for tables_by, (oid, found) in zip(tables, pieces.items(), strict=True)
        }
        done = 0
        for table in tables:
            results = [job.result() for job in jobs[table.oid]]
            states.append(_state(table, results))
            done += len(results)
            if progress:
                progress(table.name, done, total)
    return DatabaseState(held.name, held.method, held.snapshot, tuple(states), held.sequences)


def _pieces(connection: Connection, table: Table) -> list[Blocks]:
    if table.problem:
        return []
    query = "select pg_catalog.pg_relation_size(%s::oid) / pg_catalog.current_setting('block_size')::bigint"
    [(blocks,)] = rows(connection, query, table.oid)
    return split(blocks or 0)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a chunk could not be read; `damaged` if that is damage itself."""

    reason: str
    damaged: bool


def failure_of(error: psycopg.Error | KnockwoodError) -> Failure:
    """Damage, if the server itself says so (SQLSTATE classes XX and 58); otherwise only not checked."""
    cause = error if isinstance(error, psycopg.Error) else error.__cause__
    state = cause.sqlstate or "" if isinstance(cause, psycopg.Error) else ""
    return Failure(reason_of(error), state.startswith(("XX", "58")))


def _hash_chunk(
    connections: Workers, held: _Held, table: Table, blocks: Blocks, multixact: int
) -> Chunk | Failure:
    connection = None
    try:
        connection = connections.connection()
        if held.method == "exact":
            query = totals_query(table.name, table.hashed, blocks)
        else:
            query = versions_query(table.name, table.hashed, blocks, held.snapshot.horizon, multixact)
        chunk = read_chunk(connection, query, blocks)
        # Our lock is held since the read: whatever rewrote or emptied the table was there before it.
        [(now,)] = rows(connection, "select pg_catalog.pg_relation_filenode(%s::oid)::bigint", table.oid)
        if now != table.filenode:
            return Failure("it was rewritten or truncated while it was read", False)
        return chunk
    except (psycopg.Error, KnockwoodError) as error:
        if connection is not None:
            connection.close()  # its transaction is gone; the next job opens another under the same snapshot
        return failure_of(error)


def read_chunk(connection: Connection, query: str, blocks: Blocks) -> Chunk:
    """Run `totals_query` or `versions_query`. Raises PostgresError where too many versions are unsettled."""
    [(count, xor, total, *more)] = rows(connection, query)
    texts = (more[0] or []) if more else []
    if len(texts) > MAX_LISTED:
        raise PostgresError(
            f"{len(texts)} of its rows were written or locked by transactions that may still run",
            hint="end long transactions, or use wal_level=logical",
        )
    return Chunk(blocks, Totals(count, xor, int(total)), tuple(RowVersion.parse(text) for text in texts))


def _state(table: Table, results: list[Chunk | Failure]) -> TableState:
    failures = [result for result in results if isinstance(result, Failure)]
    if table.problem or failures:
        worst = next((failure for failure in failures if failure.damaged), failures[0] if failures else None)
        return TableState(
            table,
            problem=table.problem or (worst.reason if worst else None),
            damaged=bool(worst and worst.damaged),
        )
    return TableState(table, tuple(result for result in results if isinstance(result, Chunk)))
