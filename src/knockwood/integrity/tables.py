"""The tables, types and sequences of a database, as a snapshot sees them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psycopg

from knockwood.integrity.databases import rows
from knockwood.integrity.fingerprint import PINNED, Column, Type, Types, row_hash
from knockwood.postgres.connection import Connection, connect, translated, with_words

_TABLES = Path(__file__).with_suffix(".sql").read_bytes()

# A send function may be of another type than the one that has it (a refcursor's is textsend), and then takes
# no value of it; pseudo-types stand for any type of their family, and domains go by their base.
_TYPES = b"""
select y.oid::bigint, pg_catalog.format('%I.%I', n.nspname, y.typname), y.typtype::text,
       y.typbasetype::bigint,
       case when y.typcategory = 'A' and y.typlen = -1 then y.typelem else 0 end::bigint,
       (select pg_catalog.format('%I.%I', pn.nspname, p.proname) from pg_catalog.pg_proc p
        join pg_catalog.pg_namespace pn on pn.oid = p.pronamespace
        join pg_catalog.pg_type taken on taken.oid = p.proargtypes[0]
        where p.oid = y.typsend and (taken.oid = y.oid or taken.typtype = 'p' or y.typtype = 'd')),
       case when y.typtype = 'c' then y.typrelid else 0 end::bigint
from pg_catalog.pg_type y join pg_catalog.pg_namespace n on n.oid = y.typnamespace
"""

_PARTS = b"""
select a.attrelid::bigint, a.atttypid::bigint
from pg_catalog.pg_attribute a join pg_catalog.pg_class c on c.oid = a.attrelid
where c.relkind in ('c', 'r', 'p', 'v', 'm', 'f') and a.attnum > 0 and not a.attisdropped
"""

_RANGES = b"select rngtypid::bigint, rngsubtype::bigint, rngmultitypid::bigint from pg_catalog.pg_range"

_SEQUENCES = b"""
select c.oid::bigint, pg_catalog.format('%I.%I', n.nspname, c.relname), q.seqincrement, q.seqcycle,
       pg_catalog.has_sequence_privilege(c.oid, 'select')
from pg_catalog.pg_sequence q
join pg_catalog.pg_class c on c.oid = q.seqrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where c.relpersistence = 'p' order by 2
"""


@dataclass(frozen=True, slots=True)
class Table:
    """A table to compare. `name` is quoted and qualified, `hashed` the expression for one row's hash.

    `problem` says why its rows cannot be compared; `outside` that no physical backup holds them at all.
    """

    database: str
    oid: int
    name: str
    filenode: int
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    hashed: str
    problem: str | None = None
    outside: bool = False


@dataclass(frozen=True, slots=True)
class Sequence:
    """A sequence and its value. `last` is None where it may not be read."""

    name: str
    increment: int
    cycles: bool
    last: int | None


def open_pinned(dsn: str, database: str | None, lock_timeout_ms: int = 5000) -> Connection:
    """A connection with the settings under which rows hash and print alike everywhere."""
    connection = connect(
        with_words(dsn, dbname=database) if database else dsn, application_name="knockwood compare"
    )
    with translated():
        settings = PINNED | {"lock_timeout": str(lock_timeout_ms), "statement_timeout": "0"}
        for name, value in settings.items():
            connection.execute("select pg_catalog.set_config(%s, %s, false)", [name, value])
    return connection


def types_of(connection: Connection) -> dict[int, Type]:
    """Every type of the database by OID."""
    parts: dict[int, list[int]] = defaultdict(list)
    for relation, part in rows(connection, _PARTS):
        parts[relation].append(part)
    inner: dict[int, tuple[int, ...]] = {}
    for rng, subtype, multi in rows(connection, _RANGES):
        inner[rng], inner[multi] = (subtype,), (rng,)
    return {
        oid: Type(oid, name, kind, base, element, send, inner.get(oid) or tuple(parts.get(relation, ())))
        for oid, name, kind, base, element, send, relation in rows(connection, _TYPES)
    }


def tables_of(connection: Connection, database: str) -> list[Table]:
    """The tables of the connection's database, by name, as its snapshot sees them."""
    types = types_of(connection)
    return [_table(database, row, types) for row in rows(connection, _TABLES)]


def _table(database: str, row: tuple[object, ...], types: Types) -> Table:
    oid, name, kind, persistence, method, filenode, readable, columns, key = row
    assert isinstance(columns, list)
    stored = tuple(Column(*column) for column in columns)
    problem, outside = None, False
    if kind == "f":
        problem, outside = "a foreign table: its rows are on another server", True
    elif persistence == "u":
        problem, outside = "unlogged: no physical backup holds its rows", True
    elif not readable:
        problem = f"no privilege to read it (GRANT SELECT ON {name})"
    elif method != "heap":
        problem = f"its access method {method} is not known"
    return Table(
        database=database,
        oid=int(str(oid)),
        name=str(name),
        filenode=int(str(filenode)),
        columns=stored,
        key=tuple(key) if isinstance(key, list) else (),
        hashed=row_hash(stored, types),
        problem=problem,
        outside=outside,
    )


def sequences_of(connection: Connection) -> list[Sequence]:
    """The sequences of the connection's database with their values of this moment."""
    found = []
    for _, name, increment, cycles, readable in rows(connection, _SEQUENCES):
        last = None
        if readable:
            try:
                [(last,)] = rows(connection, f"select last_value from {name}")
            except psycopg.errors.UndefinedTable:
                continue  # dropped in the meantime
        found.append(Sequence(name, increment, cycles, last))
    return found
