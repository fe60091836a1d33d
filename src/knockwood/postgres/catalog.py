"""What the catalogs say: databases, settings, and which relation lies in which files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from knockwood.errors import KnockwoodError
from knockwood.postgres.connection import Connection, connect, translated, with_words

STANDBY_SETTINGS = (
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
)
"""A server that replays WAL needs at least the primary's values of these."""

RECORDED_SETTINGS = (
    *STANDBY_SETTINGS,
    "block_size",
    "segment_size",
    "wal_segment_size",
    "wal_block_size",
    "data_checksums",
    "wal_level",
    "full_page_writes",
    "wal_log_hints",
    "track_commit_timestamp",
    "shared_preload_libraries",
    "server_version",
)

# A statement here and there lacks a relfilenode: views, partitioned tables, foreign tables.
_RELATIONS = """
select c.oid::int8, n.nspname, c.relname, c.relkind::text, c.relpersistence::text,
       pg_catalog.pg_relation_filepath(c.oid), pg_catalog.pg_relation_filenode(c.oid)::int8,
       coalesce(i.indrelid, t.oid)::int8,
       c.relisshared
  from pg_catalog.pg_class c
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  left join pg_catalog.pg_index i on i.indexrelid = c.oid
  left join pg_catalog.pg_class t on t.reltoastrelid = c.oid and c.relkind = 't'
 where pg_catalog.pg_relation_filenode(c.oid) is not null
   and c.relpersistence <> 't'
 order by c.oid
"""


@dataclass(frozen=True, slots=True)
class Database:
    oid: int
    name: str
    connectable: bool


@dataclass(frozen=True, slots=True)
class RelationRow:
    """A relation that has files. `path` is its main fork's, relative to the data directory.

    `kind` and `persistence` are pg_class's letters. `table` is the oid of the table that an index or a
    TOAST relation belongs to (for a TOAST relation's index: the TOAST relation).
    """

    oid: int
    schema: str
    name: str
    kind: str
    persistence: str
    path: str
    filenode: int
    table: int | None
    shared: bool


@dataclass(frozen=True, slots=True)
class NotRecorded:
    """A database whose relations could not be read, and why."""

    database: str
    reason: str


def databases(connection: Connection) -> list[Database]:
    """Every database, also those that take no connections."""
    with translated():
        rows = connection.execute(
            "select oid::int8, datname, datallowconn from pg_catalog.pg_database order by oid"
        ).fetchall()
    return [Database(*row) for row in rows]


def settings(connection: Connection, names: Sequence[str] = RECORDED_SETTINGS) -> dict[str, str]:
    """Settings as SHOW prints them; those the role may not see or the version lacks are absent."""
    with translated():
        rows = connection.execute(
            "select name, pg_catalog.current_setting(name, true) from pg_catalog.pg_settings"
            " where name = any(%s) order by name",
            [list(names)],
        ).fetchall()
    return {name: value for name, value in rows if value is not None}


def relations(connection: Connection) -> Iterator[RelationRow]:
    """The relations of the connection's database that have files, in bounded memory."""
    with translated(), connection.transaction(), connection.cursor("knockwood_relations") as cursor:
        cursor.itersize = 2000
        cursor.execute(_RELATIONS)
        for row in cursor:
            yield RelationRow(*row)


def relations_everywhere(
    dsn: str, known: Sequence[Database], **words: Any
) -> Iterator[tuple[Database, RelationRow | NotRecorded]]:
    """The relations of each database in turn; what cannot be connected to is told, not left out."""
    for database in known:
        if not database.connectable:
            yield database, NotRecorded(database.name, "the database takes no connections")
            continue
        try:
            with connect(with_words(dsn, dbname=database.name), **words) as connection:
                for row in relations(connection):
                    yield database, row
        except KnockwoodError as error:
            yield database, NotRecorded(database.name, error.what)
