"""How one table is built and what it holds, read from its catalog, to be built again under another name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Self

from knockwood.errors import ObjectMissingError, RefusedError, UsageError
from knockwood.integrity.fingerprint import PINNED
from knockwood.postgres.connection import Connection, translated

_PART: Final = re.compile(r'"((?:[^"]|"")+)"|([^".]+)')

_TABLE = """
select c.oid, c.relkind::text, c.relispartition
from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where n.nspname = %s and c.relname = %s
"""

_COLUMNS = """
select pg_catalog.quote_ident(a.attname),
       pg_catalog.format_type(a.atttypid, a.atttypmod),
       case when a.attcollation <> 0 and a.attcollation <> t.typcollation
            then pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(l.collname) end,
       a.attnotnull and not exists (
           select from pg_catalog.pg_constraint k
           where k.conrelid = a.attrelid and k.contype = 'n' and k.conkey[1] = a.attnum and not k.convalidated)
from pg_catalog.pg_attribute a
join pg_catalog.pg_type t on t.oid = a.atttypid
left join pg_catalog.pg_collation l on l.oid = a.attcollation
left join pg_catalog.pg_namespace n on n.oid = l.collnamespace
where a.attrelid = %s and a.attnum > 0 and not a.attisdropped
order by a.attnum
"""

_CONSTRAINTS = """
select pg_catalog.pg_get_constraintdef(oid) from pg_catalog.pg_constraint
where conrelid = %s and contype in ('p', 'u', 'x', 'c') order by contype = 'c', conname
"""

# Up to USING the definition holds the index's and the table's name; what follows fits any table.
_INDEXES = """
select pg_catalog.pg_get_indexdef(i.indexrelid), i.indisunique,
       pg_catalog.quote_ident(x.relname),
       pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname)
from pg_catalog.pg_index i
join pg_catalog.pg_class x on x.oid = i.indexrelid
join pg_catalog.pg_class c on c.oid = i.indrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where i.indrelid = %s and i.indisvalid
  and not exists (select from pg_catalog.pg_constraint k where k.conindid = i.indexrelid and k.conrelid = i.indrelid)
order by x.relname
"""

_LEFT_OUT = """
select label || ' ' || pg_catalog.quote_ident(name) from (
    select 'foreign key' label, conname name from pg_catalog.pg_constraint where conrelid = %(oid)s and contype = 'f'
    union all
    select 'trigger', tgname from pg_catalog.pg_trigger where tgrelid = %(oid)s and not tgisinternal
    union all
    select 'policy', polname from pg_catalog.pg_policy where polrelid = %(oid)s
    union all
    select 'default of', a.attname from pg_catalog.pg_attrdef d
    join pg_catalog.pg_attribute a on a.attrelid = d.adrelid and a.attnum = d.adnum where d.adrelid = %(oid)s
) found order by 1
"""


@dataclass(frozen=True, slots=True)
class TableName:
    """A table of a cluster, names as they are stored."""

    database: str
    schema: str
    table: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `DB.SCHEMA.TABLE`, each part quoted if it holds a dot; raises UsageError."""
        parts, position = [], 0
        while match := _PART.match(text, position):
            parts.append(match[1].replace('""', '"') if match[1] is not None else match[2])
            position = match.end() + 1
            if text[match.end() : position] != ".":
                break
        if len(parts) != 3 or position <= len(text):
            raise UsageError(
                f"not a table: {text!r}", hint="write DATABASE.SCHEMA.TABLE, as in shop.public.orders"
            )
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.database}.{self.schema}.{self.table}"


@dataclass(frozen=True, slots=True)
class Column:
    """A column: name, type and collation (None: the type's own) as SQL writes them."""

    name: str
    type: str
    collation: str | None
    required: bool


@dataclass(frozen=True, slots=True)
class TableDefinition:
    """What is needed to build a table again: its columns, keys, checks and indexes, and what stays behind.

    `source` is what rows are read from. Defaults, generated columns' expressions, foreign keys, triggers
    and policies are not rebuilt: the copy holds the values that were there, and does nothing of its own.
    """

    source: str
    columns: tuple[Column, ...]
    constraints: tuple[str, ...]
    indexes: tuple[tuple[bool, str], ...]
    left_out: tuple[str, ...]

    @property
    def column_list(self) -> str:
        return ", ".join(column.name for column in self.columns)

    def create(self, name: str) -> str:
        """The CREATE TABLE statement under another (quoted, qualified) name."""
        lines = []
        for column in self.columns:
            collation = f" collate {column.collation}" if column.collation else ""
            lines.append(f"{column.name} {column.type}{collation}{' not null' if column.required else ''}")
        return f"create table {name} ({', '.join(lines)})"

    def complete(self, name: str) -> list[str]:
        """The statements that give the loaded table its constraints and indexes, under names of their own."""
        statements = [f"alter table {name} add {constraint}" for constraint in self.constraints]
        statements += [
            f"create {'unique ' if unique else ''}index on {name} {rest}" for unique, rest in self.indexes
        ]
        return statements


def pin(connection: Connection) -> None:
    """Make a session write values and names the same way on every server."""
    for name, value in PINNED.items():
        if name != "max_parallel_workers_per_gather":
            connection.execute("select pg_catalog.set_config(%s, %s, false)", [name, value])


def read_definition(connection: Connection, name: TableName) -> TableDefinition:
    """Read a table's definition in its database; the session must be pinned.

    Raises ObjectMissingError if there is no such table, RefusedError for what is no table.
    """
    with translated():
        row = connection.execute(_TABLE, [name.schema, name.table]).fetchone()
        if row is None:
            raise ObjectMissingError(
                f"there is no table {name} at that point",
                hint="was it created later, or dropped before? Choose another point in time",
            )
        oid, kind, _ = row
        if kind not in ("r", "p"):
            raise RefusedError(
                f"{name} is not a table", hint="views and sequences hold no rows to bring back"
            )
        quoted = _quoted(connection, name.schema, name.table)
        return TableDefinition(
            source=f"only {quoted}" if kind == "r" else quoted,
            columns=tuple(Column(*values) for values in connection.execute(_COLUMNS, [oid])),
            constraints=tuple(values[0] for values in connection.execute(_CONSTRAINTS, [oid])),
            indexes=tuple(_index(*values) for values in connection.execute(_INDEXES, [oid])),
            left_out=tuple(values[0] for values in connection.execute(_LEFT_OUT, {"oid": oid})),
        )


def _index(definition: str, unique: bool, index: str, table: str) -> tuple[bool, str]:
    head = f"CREATE {'UNIQUE ' if unique else ''}INDEX {index} ON "
    rest = definition.removeprefix(head).removeprefix("ONLY ").removeprefix(f"{table} ")
    if not rest.startswith("USING "):
        raise RefusedError(f"cannot read the definition of index {index}: {definition}")
    return unique, rest


def fingerprint(connection: Connection, definition: TableDefinition, source: str) -> tuple[int, int]:
    """Count and sum of one 64-bit hash per row, whatever their order; the session must be pinned."""
    with translated():
        row: Any = connection.execute(
            "select pg_catalog.count(*), coalesce(pg_catalog.sum(pg_catalog.hashtextextended("
            f"row({definition.column_list})::text, 0)), 0) from {source}".encode()
        ).fetchone()
    return int(row[0]), int(row[1])


def _quoted(connection: Connection, schema: str, table: str) -> str:
    row: Any = connection.execute(
        "select pg_catalog.format('%%I.%%I', %s::text, %s::text)", [schema, table]
    ).fetchone()
    return str(row[0])


def destination(connection: Connection, schema: str, table: str) -> str:
    """A quoted, qualified name."""
    with translated():
        return _quoted(connection, schema, table)
