"""Indexes made anew, what a killed attempt left cleared away, and indexes compared with their tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import sql

from knockwood.errors import ObjectMissingError, PostgresError, RefusedError
from knockwood.integrity.amcheck import is_damage
from knockwood.integrity.check import Subject
from knockwood.model import Verdict
from knockwood.postgres.connection import Connection, connect, translated, with_words
from knockwood.recover.pages_session import session

_LOCK_TIMEOUT: Final = "10min"
"""How long a REINDEX CONCURRENTLY waits for old transactions to end; nobody waits behind it."""


@dataclass(frozen=True, slots=True)
class Index:
    """An index by its names as SQL wants them. `exclusion` indexes cannot be made anew concurrently."""

    database: str
    oid: int
    schema: str
    bare: str
    table_oid: int
    table: str
    method: str
    valid: bool
    exclusion: bool
    filenode: int

    @property
    def name(self) -> str:
        return f"{_quoted(self.schema)}.{_quoted(self.bare)}"


_INDEX: Final = """
select c.oid::int8, n.nspname, c.relname, i.indrelid::int8,
       pg_catalog.format('%%I.%%I', tn.nspname, t.relname), a.amname, i.indisvalid, i.indisexclusion,
       pg_catalog.pg_relation_filenode(c.oid)::int8
from pg_catalog.pg_index i
join pg_catalog.pg_class c on c.oid = i.indexrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
join pg_catalog.pg_class t on t.oid = i.indrelid
join pg_catalog.pg_namespace tn on tn.oid = t.relnamespace
join pg_catalog.pg_am a on a.oid = c.relam
where c.relkind = 'i' and {}
order by c.oid
"""


def index_named(connection: Connection, database: str, name: str) -> Index:
    """The index of this name, quoted as SQL wants it; raises ObjectMissingError."""
    found = _indexes(connection, database, "c.oid = pg_catalog.to_regclass(%s)", name)
    if not found:
        raise ObjectMissingError(f"there is no index {name}", where=f"database {database}")
    return found[0]


def indexes_of(connection: Connection, database: str, table_oid: int) -> list[Index]:
    """The indexes of a table, also the invalid ones."""
    return _indexes(connection, database, "i.indrelid = %s", table_oid)


def _indexes(connection: Connection, database: str, condition: str, value: object) -> list[Index]:
    with translated():
        rows = connection.execute(_INDEX.format(condition).encode(), [value]).fetchall()
    return [Index(database, *row) for row in rows]


def reindex(
    subject: Subject,
    database: str,
    name: str,
    filenode: int,
    note: Callable[[str, Any], None],
    *,
    concurrently: bool = True,
) -> bool:
    """Make an index anew, beside its users where `concurrently`; False if that had been done already.

    `filenode` is the file that the damaged index lies in: one of another file was made since. Invalid indexes
    that an attempt left (`_ccnew`, `_ccold`) are dropped first. Raises RefusedError while somebody else builds
    on the table, PostgresError (safe to try again) where it fails.
    """
    with connect(with_words(subject.dsn, dbname=database), application_name="knockwood repair") as connection:
        with translated():
            connection.execute("select pg_catalog.set_config('lock_timeout', %s, false)", [_LOCK_TIMEOUT])
            connection.execute("set statement_timeout = 0")
            connection.execute("set maintenance_work_mem = '256MB'")
        index = index_named(connection, database, name)
        clear_leftovers(connection, index)
        if index.filenode != filenode and index.valid:
            return False
        note("reindex", {"index": name, "filenode": index.filenode})
        how = "concurrently " if concurrently and not index.exclusion else ""
        with translated():
            connection.execute(f"reindex index {how}{name}".encode())
        now = index_named(connection, database, name)
        if not now.valid or now.filenode == filenode:
            raise PostgresError("the index is not valid after REINDEX", where=name, hint="run it again")
    return True


def clear_leftovers(connection: Connection, index: Index) -> list[str]:
    """Drop invalid copies of this index that a killed REINDEX CONCURRENTLY left; their names.

    Raises RefusedError while an index of the table is being built: its copy looks the same.
    """
    left = [
        each
        for each in indexes_of(connection, index.database, index.table_oid)
        if not each.valid and _is_copy(each.bare, index.bare) and each.schema == index.schema
    ]
    if not left:
        return []
    with translated():
        busy = connection.execute(
            "select pid from pg_catalog.pg_stat_progress_create_index where relid = %s", [index.table_oid]
        ).fetchall()
    if busy:
        raise RefusedError(
            f"process {busy[0][0]} is building an index of the table",
            where=index.table,
            hint="wait for its end",
        )
    for each in left:
        with translated():
            connection.execute(f"drop index concurrently if exists {each.name}".encode())
    return [each.name for each in left]


def _is_copy(name: str, original: str) -> bool:
    """PostgreSQL names the copies `<name>_ccnew` and `_ccold`, with a number if taken, shortened to 63 bytes."""
    for suffix in ("_ccnew", "_ccold"):
        base, found, rest = name.rpartition(suffix)
        if found and (not rest or rest.isdigit()) and original.startswith(base):
            return base == original or len(name.encode()) >= 60
    return False


@dataclass(frozen=True, slots=True)
class Verified:
    """How comparing an index with its table ended; `detail` is what amcheck said, or why it was not asked."""

    index: Index
    verdict: Verdict
    detail: str = ""


def verify_indexes(subject: Subject, database: str, table_oid: int) -> list[Verified]:
    """Compare every valid index of a table with its rows (amcheck, heapallindexed). Reads the whole table.

    Only B-trees can be compared; of the others the answer is *not checked*.
    """
    found: list[Verified] = []
    with session(subject, database, ("amcheck",)) as tools:
        schema = tools.schemas.get("amcheck")
        for index in indexes_of(tools.connection, database, table_oid):
            if not index.valid:
                found.append(Verified(index, Verdict.BROKEN, "the index is invalid"))
            elif schema is None:
                found.append(Verified(index, Verdict.NOT_CHECKED, "amcheck is not installed"))
            elif index.method != "btree":
                found.append(Verified(index, Verdict.NOT_CHECKED, f"no check for {index.method} indexes"))
            else:
                found.append(_compare(tools.connection, schema, index))
    return found


def mend_indexes(
    subject: Subject, database: str, table_oid: int, note: Callable[[str, Any], None]
) -> list[str]:
    """Make anew every index of a table that lacks rows, or of which nobody can tell; their names.

    While a page was empty or old, index scans that met it marked its entries as dead. GIN and BRIN do not.
    """
    mended = []
    for each in verify_indexes(subject, database, table_oid):
        unknown = each.verdict is Verdict.NOT_CHECKED and each.index.method not in ("gin", "brin")
        if each.verdict is Verdict.BROKEN or unknown:
            reindex(subject, database, each.index.name, each.index.filenode, note)
            mended.append(each.index.name)
    return mended


def _compare(connection: Connection, schema: str, index: Index) -> Verified:
    query = sql.SQL("select {}.bt_index_check(%s::oid::regclass, true)").format(sql.Identifier(schema))
    try:
        with connection.transaction():
            connection.execute(query, [index.oid])
    except psycopg.Error as error:
        text = error.diag.message_primary or str(error)
        return Verified(index, Verdict.BROKEN if is_damage(error) else Verdict.NOT_CHECKED, text)
    return Verified(index, Verdict.HELD)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
