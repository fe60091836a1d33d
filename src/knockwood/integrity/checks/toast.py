"""Every value that is stored out of line is fetched, without any extension."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

import psycopg
from psycopg import sql

from knockwood.integrity.amcheck import is_damage
from knockwood.integrity.budget import pace
from knockwood.integrity.check import Outcome, Subject, Weight
from knockwood.integrity.databases import attempt, in_each_database
from knockwood.model import Finding, Location, Severity
from knockwood.postgres.connection import Connection
from knockwood.postgres.pages import PAGE_BYTES

_PIECE_BLOCKS: Final = 16384
_MOST_BLOCKS: Final = 100
"""Damaged blocks of a table that are named one by one; where there are more, the last finding says so."""

_TABLES: Final = """
select t.oid::int8, n.nspname, t.relname, pg_catalog.format('%I.%I', n.nspname, t.relname),
       pg_catalog.pg_relation_filepath(t.oid),
       array(select attname::text from pg_catalog.pg_attribute
             where attrelid = t.oid and attnum > 0 and not attisdropped and attlen = -1
               and attstorage <> 'p' order by attnum)
from pg_catalog.pg_class t
join pg_catalog.pg_namespace n on n.oid = t.relnamespace
where t.relkind in ('r', 'm')
  and t.reltoastrelid <> 0
  and t.relpersistence <> 't'
  and not (t.relpersistence = 'u' and pg_catalog.pg_is_in_recovery())
  and pg_catalog.pg_relation_size(t.reltoastrelid) > 0
order by t.oid
"""


class Toast:
    """Reads every TOAST value through its row; a block with one that cannot be read is named."""

    name = "toast"
    title = "Values stored out of line (TOAST), fetched one by one"
    weight = Weight.HEAVY

    def run(self, subject: Subject) -> Iterator[Outcome]:
        def look(connection: Connection, database: str) -> Iterator[Outcome]:
            for oid, schema, name, shown, path, columns in connection.execute(_TABLES).fetchall():
                table = sql.Identifier(schema, name)
                where = Location(database=database, relation=shown, file=path)
                scan = _Scan(subject, connection, oid, table, list(columns), where)
                yield from attempt(self.name, f"database {database}, table {shown}", partial(_all, scan))

        yield from in_each_database(subject, self.name, look)


def _all(scan: _Scan) -> Iterator[Finding]:
    yield from scan.run()


class _Scan:
    def __init__(
        self,
        subject: Subject,
        connection: Connection,
        oid: int,
        table: sql.Identifier,
        columns: list[str],
        where: Location,
    ) -> None:
        self.subject = subject
        self.connection = connection
        self.oid = oid
        self.where = where
        self.found = 0
        # A length alone is known from the pointer; a hash needs the value.
        hashes = [sql.SQL("count(hashtext({}::text))").format(sql.Identifier(column)) for column in columns]
        self.query = sql.SQL(
            "select {} from only {} where ctid >= format('(%%s,0)', %s::int8)::tid"
            " and ctid < format('(%%s,0)', %s::int8)::tid"
        ).format(sql.SQL(", ").join(hashes), table)

    def run(self) -> Iterator[Finding]:
        start = 0
        while start < self._blocks() and self.found < _MOST_BLOCKS:
            pace(self.subject)
            yield from self._range(start, start + _PIECE_BLOCKS)
            start += _PIECE_BLOCKS

    def _blocks(self) -> int:
        row = self.connection.execute("select pg_catalog.pg_relation_size(%s::oid)", [self.oid]).fetchone()
        return int(row[0]) // PAGE_BYTES if row and row[0] is not None else 0

    def _range(self, first: int, end: int) -> Iterator[Finding]:
        """Read blocks `first` up to `end`; where that fails, halve the range down to the block."""
        if self.found >= _MOST_BLOCKS:
            return
        try:
            self.connection.execute(self.query, [first, end])
            return
        except psycopg.Error as error:
            # "missing chunk number" is an internal error before it became one of damage.
            if not (is_damage(error) or isinstance(error, psycopg.errors.InternalError_)):
                raise
            if self.connection.closed:
                raise
            message = error.diag.message_primary or str(error)
        if end - first > 1:
            middle = (first + end) // 2
            yield from self._range(first, middle)
            yield from self._range(middle, end)
            return
        self.found += 1
        yield self._finding(first, message)

    def _finding(self, block: int, message: str) -> Finding:
        place = Location(
            database=self.where.database, relation=self.where.relation, file=self.where.file, block=block
        )
        last = self.found == _MOST_BLOCKS
        return Finding(
            Toast.name,
            Severity.CRITICAL,
            place,
            f"a value on this block cannot be read: {message}" + ("; more blocks may follow" if last else ""),
            "a large value of a row is lost to the server, and every query that reads it fails",
            "bring the TOAST table's page back from the newest clean backup and the WAL: knockwood recover",
            {"message": message},
        )


CHECK = Toast()
