"""A session that repairs: extensions that it makes and takes back, the lock, the buffers.

Everything happens in one transaction that ends in ROLLBACK. Extensions that the database lacks are made in it
and are gone afterwards; so is the lock, also when we are killed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

import psycopg
from psycopg import sql

from knockwood.errors import RefusedError
from knockwood.host import clock
from knockwood.integrity.check import Subject
from knockwood.postgres.connection import Connection, connect, translated, with_words
from knockwood.postgres.pages import decode_header
from knockwood.recover.pages_facts import Target
from knockwood.recover.plan.pages import InBuffers, ServerFactsForPages

EXTENSIONS: Final = ("pg_buffercache", "pageinspect", "amcheck")
_SCHEMA: Final = "knockwood_repair"
_EVICTIONS: Final = 50
_PAUSE: Final = 0.02
_AT_ONCE: Final = 256
"""Pages that are asked for with one question: 2 MB."""
_LAX: Final = ("zero_damaged_pages", "ignore_checksum_failure")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a lock at a time, how often to try, and how long to stand back in between.

    While a lock is waited for, everybody who comes after waits behind it: so the waits are short.
    """

    lock: timedelta = timedelta(milliseconds=300)
    attempts: int = 60
    pause: timedelta = timedelta(milliseconds=500)


@dataclass(slots=True)
class Session:
    """An open transaction with its tools. `schemas` tells where each extension is that could be had."""

    subject: Subject
    connection: Connection
    schemas: dict[str, str] = field(default_factory=dict)

    # --- what the server is -------------------------------------------------------------------------

    def server(self) -> ServerFactsForPages:
        """What the server offers to a repair, asked now."""
        names = ["data_checksums", "full_page_writes", *_LAX]
        with translated():
            row = self.connection.execute(
                "select pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('is_superuser') = 'on',"
                " array(select pg_catalog.current_setting(n) = 'on' from pg_catalog.unnest(%s::text[]) as n),"
                " array(select distinct pg_catalog.split_part(c, '=', 1) from pg_catalog.pg_db_role_setting,"
                " pg_catalog.unnest(setconfig) as c where pg_catalog.split_part(c, '=', 1) = any(%s)"
                " and pg_catalog.lower(pg_catalog.split_part(c, '=', 2)) not in ('off', 'false', 'no', '0'))",
                [names, list(_LAX)],
            ).fetchone()
        assert row is not None
        on = dict(zip(names, row[2], strict=True))
        sees = "pg_buffercache" in self.schemas and "pageinspect" in self.schemas
        return ServerFactsForPages(
            checksums=on["data_checksums"],
            full_page_writes=on["full_page_writes"],
            superuser=row[1],
            in_recovery=row[0],
            can_evict=sees and self.subject.facts.major >= 17,
            sees_buffers=sees,
            # Set for some role or database, it lets their sessions read what ours cannot.
            lax=tuple(name for name in _LAX if on[name] or name in row[3]),
        )

    # --- buffers ------------------------------------------------------------------------------------

    def cached(self, target: Target, blocks: Collection[int]) -> dict[int, tuple[int, bool]]:
        """The blocks that valid buffers hold now: buffer id and whether it is dirty."""
        space, database, filenode = target.node
        query = sql.SQL(
            "select relblocknumber::int8, bufferid, isdirty from {}.pg_buffercache"
            " where relfilenode = %s and reltablespace = %s and reldatabase = %s and relforknumber = 0"
            " and relblocknumber = any(%s)"
        ).format(sql.Identifier(self.schemas["pg_buffercache"]))
        with translated():
            rows = self.connection.execute(query, [filenode, space, database, sorted(blocks)]).fetchall()
        return {block: (buffer, dirty) for block, buffer, dirty in rows}

    def buffer_image(self, target: Target, block: int) -> bytes | None:
        """The page in the server's buffers; it is read into them if it is not there. None: it cannot be."""
        query = sql.SQL("select {}.get_raw_page(%s, 'main', %s)").format(
            sql.Identifier(self.schemas["pageinspect"])
        )
        try:
            with self.connection.transaction():
                row = self.connection.execute(query, [target.name, block], binary=True).fetchone()
        except (psycopg.errors.DataCorrupted, psycopg.errors.IndexCorrupted, psycopg.errors.IoError):
            return None
        return bytes(row[0]) if row else None

    def buffer_images(self, target: Target, blocks: Collection[int]) -> dict[int, bytes | None]:
        """The same of many blocks: some hundred with one question, one by one only where some cannot be read."""
        query = sql.SQL(
            "select block, {}.get_raw_page(%s, 'main', block) from pg_catalog.unnest(%s::int8[]) as block"
        ).format(sql.Identifier(self.schemas["pageinspect"]))
        found: dict[int, bytes | None] = {}
        for some in _batches(blocks):
            try:
                with self.connection.transaction():
                    rows = self.connection.execute(query, [target.name, some], binary=True).fetchall()
            except psycopg.Error:
                found |= {block: self.buffer_image(target, block) for block in some}
            else:
                found |= {block: bytes(page) for block, page in rows}
        return found

    def buffers(self, target: Target, blocks: Collection[int]) -> Mapping[int, InBuffers]:
        """What the buffers hold of the blocks; nothing is read in that was not there."""
        if "pg_buffercache" not in self.schemas or "pageinspect" not in self.schemas:
            return {block: self._probed(target, block) for block in blocks}
        cached = self.cached(target, blocks)
        return {block: self._seen(target, block, cached.get(block)) for block in blocks}

    def _seen(self, target: Target, block: int, cached: tuple[int, bool] | None) -> InBuffers:
        if cached is None:
            return InBuffers("absent")
        image = self.buffer_image(target, block)
        if image is None:  # it left the buffers in the meantime, and the disk's cannot be read
            return InBuffers("absent")
        zero = not any(image)
        return InBuffers("present", None if zero else decode_header(image).lsn, zero, cached[1])

    def _probed(self, target: Target, block: int) -> InBuffers:
        """Without the extensions: a page that cannot be read is in no buffer; of another nobody knows."""
        try:
            with self.connection.transaction():
                self.connection.execute(
                    f"select 1 from only {target.name} where ctid = '({block},1)'::tid".encode()
                ).fetchall()
        except (psycopg.errors.DataCorrupted, psycopg.errors.IndexCorrupted, psycopg.errors.IoError):
            return InBuffers("absent")
        return InBuffers("unknown")

    def evict(self, target: Target, blocks: Collection[int]) -> None:
        """Drop the blocks from the buffers, what is dirty being written first; raises RefusedError if one
        stays (it is pinned, or this version has no way to)."""
        for _ in range(_EVICTIONS):
            cached = self.cached(target, blocks)
            if not cached:
                return
            if self.subject.facts.major < 17:
                break
            call = sql.SQL("select {}.pg_buffercache_evict(%s)").format(
                sql.Identifier(self.schemas["pg_buffercache"])
            )
            for buffer, _ in cached.values():
                with translated():
                    self.connection.execute(call, [buffer])
            clock.sleep(_PAUSE)
        raise RefusedError(
            f"the buffers keep blocks {sorted(self.cached(target, blocks))}",
            where=target.name,
            hint="restart the server and try again at once"
            if self.subject.facts.major < 17
            else "something reads the table in spite of the lock (autoprewarm?): try again",
        )

    # --- verification -------------------------------------------------------------------------------

    def verify_heap(self, target: Target, blocks: Collection[int]) -> list[str] | None:
        """What amcheck says of some blocks; None where amcheck cannot be had."""
        schema = self.schemas.get("amcheck")
        if schema is None:
            return None
        query = sql.SQL(
            "select blkno, offnum, msg from pg_catalog.unnest(%s::int8[]) as block,"
            " lateral {}.verify_heapam(%s::oid::regclass, false, false, 'none', block, block)"
        ).format(sql.Identifier(schema))
        with translated():
            rows = [
                row
                for some in _batches(blocks)
                for row in self.connection.execute(query, [some, target.oid]).fetchall()
            ]
        return [f"block {block} item {item}: {message}" for block, item, message in rows]

    # --- the lock -----------------------------------------------------------------------------------

    def lock(self, target: Target, mode: str, patience: Patience) -> None:
        """Lock the table that the blocks belong to; raises RefusedError if it is not to be had.

        A TOAST table cannot be named in LOCK TABLE, and autovacuum cares for it apart from its table: an
        ALTER TABLE that changes nothing takes SHARE UPDATE EXCLUSIVE on it, which keeps vacuum away.
        """
        statements = [f"lock table only {target.owner} in {mode.lower()} mode"]
        if target.kind == "t":
            statements.append(f"alter table only {target.owner} reset (toast.autovacuum_enabled)")
        with translated():
            self.connection.execute(
                "select pg_catalog.set_config('lock_timeout', %s, true)",
                [f"{max(int(patience.lock.total_seconds() * 1000), 1)}ms"],
            )
        for attempt in range(patience.attempts):
            if attempt:
                clock.sleep(patience.pause.total_seconds())
            try:
                with self.connection.transaction():
                    for statement in statements:
                        self.connection.execute(statement.encode())
                return
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                continue
            except psycopg.Error:
                with translated():
                    raise
        raise RefusedError(
            f"the lock {mode} was not free in {patience.attempts} attempts",
            where=target.owner,
            hint="end long transactions on the table, or try again when it is quieter",
        )


@contextmanager
def session(subject: Subject, database: str, extensions: Collection[str] = EXTENSIONS) -> Iterator[Session]:
    """A repair session in a database; all that it made in SQL is rolled back at the end."""
    dsn = with_words(subject.dsn, dbname=database)
    connection = connect(dsn, application_name="knockwood repair", autocommit=False)
    try:
        with translated():
            connection.execute("set local search_path = pg_catalog")
            connection.execute("set local statement_timeout = '10min'")
            connection.execute("set local lock_timeout = '2s'")
            connection.execute("set local idle_in_transaction_session_timeout = '5min'")
        made = Session(subject, connection)
        if subject.facts.is_superuser:
            with translated():
                # No trigger of the user's may run because of what we make and take back.
                connection.execute("set local session_replication_role = replica")
            _provide(made, extensions)
        yield made
    finally:
        if not connection.closed:
            try:
                connection.rollback()
            except psycopg.Error:
                pass  # the connection is lost, and with it the transaction
        connection.close()


def _batches(blocks: Collection[int]) -> Iterator[list[int]]:
    ordered = sorted(blocks)
    for start in range(0, len(ordered), _AT_ONCE):
        yield ordered[start : start + _AT_ONCE]


def _provide(made: Session, extensions: Collection[str]) -> None:
    """Find the extensions, and make those that are missing for the length of the transaction."""
    connection = made.connection
    with translated():
        rows = connection.execute(
            "select e.extname, n.nspname from pg_catalog.pg_extension e"
            " join pg_catalog.pg_namespace n on n.oid = e.extnamespace where e.extname = any(%s)",
            [list(extensions)],
        ).fetchall()
    made.schemas.update(dict(rows))
    missing = [name for name in extensions if name not in made.schemas]
    if not missing or connection.info.server_version < 150000 or _in_recovery(connection):
        return
    for name in missing:
        try:
            with connection.transaction():
                connection.execute(sql.SQL("create schema if not exists {}").format(sql.Identifier(_SCHEMA)))
                connection.execute(
                    sql.SQL("create extension {} schema {}").format(
                        sql.Identifier(name), sql.Identifier(_SCHEMA)
                    )
                )
            made.schemas[name] = _SCHEMA
        except psycopg.Error:
            continue  # the server has no such extension: what needs it is refused with that reason


def _in_recovery(connection: Connection) -> bool:
    row = connection.execute("select pg_catalog.pg_is_in_recovery()").fetchone()
    return bool(row and row[0])
