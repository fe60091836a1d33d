"""Rows read on a clone: by place, or a whole table; each column as text and as binary image."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import psycopg

from knockwood.errors import InternalError, PostgresError, RefusedError
from knockwood.history.chains import Place, ctid, parse_place
from knockwood.history.shapes import Catalog, ColumnShape, TableShape
from knockwood.history.transaction import ColumnValue
from knockwood.postgres.connection import Connection, translated

_BATCH: Final = 1000
_BATCH_BYTES: Final = 16 << 20


class Row(NamedTuple):
    """A visible row: where it lies, its raw xmin and xmax, its values in the order of the shape's columns."""

    place: Place
    xmin: int
    xmax: int
    values: list[ColumnValue]


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def qualified(shape: TableShape) -> str:
    return f"{quoted(shape.table.schema)}.{quoted(shape.table.name)}"


# xml is shown, and sent, without its declaration (`<?xml version="1.0"?>`), which the stored text has.
_AS_STORED: Final = {142: "::pg_catalog.text", 143: "::pg_catalog.text[]"}


def _selected(columns: Sequence[ColumnShape]) -> str:
    """Per column its value, and its image where its type has one."""
    parts = ["t.ctid", "t.xmin", "t.xmax"]
    for column in columns:
        value = f"t.{quoted(column.name)}"
        parts.append(value + _AS_STORED.get(column.type_oid, ""))
        if column.send is not None:
            parts.append(f"{column.send}({value})")
    return ", ".join(parts)


class Reader:
    """Reads one table. Raises RefusedError where a transaction in progress at that point locks it.

    `held` are the blocks that the clone has of it, None all of them: what is not there reads as empty, so
    nothing else is ever asked for.
    """

    def __init__(self, catalog: Catalog, shape: TableShape, held: frozenset[int] | None) -> None:
        self._connection = catalog.connection
        self._shape = shape
        self._held = held
        self._from = f"from only {qualified(shape)} t"
        self._columns = _selected(shape.columns)

    def at(self, places: Iterable[Place]) -> Iterator[Row]:
        """The visible rows among those places; in batches, so that large values do not add up."""
        source = iter(places)
        while batch := list(islice(source, _BATCH)):
            self._require({where >> 16 for where in batch})
            for part in self._by_size(batch) if self._shape.toasted else [batch]:
                yield from self._rows("where t.ctid = any(%s::tid[])", [_tids(part)])

    def all(self) -> Iterator[Row]:
        """Every visible row, block by block."""
        self._require(None)
        step = 64 if self._shape.toasted else 512
        blocks = self._one(
            "select (pg_catalog.pg_relation_size(%s::oid) /"
            " pg_catalog.current_setting('block_size')::bigint)::bigint",
            [self._shape.oid],
        )
        for begin in range(0, blocks, step):
            yield from self._rows(
                "where t.ctid >= %s::tid and t.ctid < %s::tid", [f"({begin},0)", f"({begin + step},0)"]
            )

    def written_by(self, blocks: Collection[int], xids: frozenset[int]) -> Iterator[Place]:
        """Where rows lie in some blocks that the xids wrote."""
        self._require(blocks)
        for block in sorted(blocks):
            found = self._fetch(
                f"select t.ctid {self._from} where t.ctid >= %s::tid and t.ctid < %s::tid"
                " and t.xmin::text::bigint = any(%s::bigint[])",
                [f"({block},0)", f"({block + 1},0)", sorted(xids)],
            )
            yield from (parse_place(_text(row[0])) for row in found)

    def count(self) -> int:
        self._require(None)
        return self._one(f"select pg_catalog.count(*) {self._from}", [])

    def _require(self, blocks: Collection[int] | None) -> None:
        """Raise InternalError unless the clone has these blocks (None: the whole table)."""
        if self._held is not None and (blocks is None or not self._held.issuperset(blocks)):
            raise InternalError(f"the clone does not have all that is asked of {self._shape.table}")

    def _by_size(self, batch: list[Place]) -> Iterator[list[Place]]:
        """Cut so that the stored bytes of a part stay bounded."""
        size = " + ".join(
            f"coalesce(pg_catalog.pg_column_size(t.{quoted(c.name)}), 0)" for c in self._shape.columns
        )
        found = self._fetch(
            f"select t.ctid, ({size or '0'}) {self._from} where t.ctid = any(%s::tid[])", [_tids(batch)]
        )
        part: list[Place] = []
        total = 0
        for where, stored in found:
            if part and total + int(_text(stored)) > _BATCH_BYTES:
                yield part
                part, total = [], 0
            part.append(parse_place(_text(where)))
            total += int(_text(stored))
        if part:
            yield part

    def _rows(self, where: str, values: list[Any]) -> Iterator[Row]:
        for raw in self._fetch(f"select {self._columns} {self._from} {where}", values):
            yield Row(
                parse_place(_text(raw[0])), int(_text(raw[1])), int(_text(raw[2])), self._values(raw, 3)
            )

    def _values(self, raw: Sequence[bytes | None], index: int) -> list[ColumnValue]:
        found: list[ColumnValue] = []
        for column in self._shape.columns:
            value = raw[index]
            text = None if value is None else value.decode("utf-8", "surrogateescape")
            index += 1
            image = None
            if column.send is not None:
                if (sent := raw[index]) is not None:
                    image = bytes.fromhex(sent[2:].decode())
                index += 1
            found.append(ColumnValue(text, image))
        return found

    def _one(self, query: str, values: list[Any]) -> int:
        return int(_text(self._fetch(query, values)[0][0]))

    def _fetch(self, query: str, values: list[Any]) -> list[list[bytes | None]]:
        """The rows as the server prints them, no type's own Python value in between."""
        return fetch_raw(self._connection, query, values, str(self._shape.table))


def fetch_raw(connection: Connection, query: str, values: list[Any], where: str) -> list[list[bytes | None]]:
    """Rows as the server prints them. Raises RefusedError where a lock stands in the way."""
    try:
        with connection.cursor() as cursor:
            cursor.execute(query.encode(), values)
            result = cursor.pgresult
            assert result is not None
            width = range(result.nfields)
            return [[result.get_value(row, column) for column in width] for row in range(result.ntuples)]
    except psycopg.errors.LockNotAvailable as error:
        raise RefusedError(
            "a transaction that was in progress at that point locks the table against everybody",
            where=where,
            hint="choose a point before it began or after it ended",
        ) from error
    except psycopg.Error as error:
        raise PostgresError(str(error).strip().splitlines()[0], where=where) from error


def updaters(connection: Connection, multixacts: Iterable[int]) -> set[int]:
    """The transactions that a multixact in a row's xmax names as the one that changed the row."""
    found: set[int] = set()
    for number in multixacts:
        with translated():
            rows = connection.execute(
                "select xid::text::bigint, mode from pg_catalog.pg_get_multixact_members(%s::text::xid)",
                [number],
            ).fetchall()
        found.update(xid for xid, mode in rows if mode in ("nokeyupd", "upd"))
    return found


def _tids(places: Iterable[Place]) -> str:
    return "{" + ",".join(f'"{ctid(place)}"' for place in places) + "}"


def _text(value: bytes | None) -> str:
    assert value is not None
    return value.decode()
