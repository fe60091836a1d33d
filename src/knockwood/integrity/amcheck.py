"""Calls of amcheck's functions, and what their errors and rows say about where the damage is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from knockwood.integrity.budget import pace
from knockwood.integrity.catalog import Relation
from knockwood.integrity.check import Subject
from knockwood.postgres.connection import Connection
from knockwood.postgres.pages import PAGE_BYTES

_PIECE_BLOCKS = 131072
"""Blocks one statement looks at (1 GB): short statements leave room for the load budget and its timeout."""

_UNREADABLE = re.compile(
    r"(?:invalid page in block|could not read blocks?) (\d+)(?:\.\.\d+)?"
    r" (?:of relation|in file) \"?([^\"\s:]+)"
)
# From 18 on several pages are read at once, and the detail names the first bad one.
_SEVERAL = re.compile(r"invalid pages among blocks \d+\.\.\d+ of relation \"?([^\"\s:]+)")
_FIRST = re.compile(r"Block (\d+) held the first")
_INDEX_BLOCK = re.compile(r"(?:[Bb]lock[= ]|tid=\()(\d+)")
_LACKING = re.compile(r"heap tuple (\(\d+,\d+\))")
_DAMAGE = (psycopg.errors.DataCorrupted, psycopg.errors.IndexCorrupted)


@dataclass(frozen=True, slots=True)
class HeapDamage:
    """What is wrong on one block of a table; `path` is another relation's if the trouble is there."""

    block: int | None
    messages: tuple[str, ...]
    path: str | None = None


def is_damage(error: psycopg.Error) -> bool:
    """Whether the server says that data or an index is corrupted (and not that it is busy or forbids it)."""
    return isinstance(error, _DAMAGE) or unreadable_block(error) is not None


def unreadable_block(error: psycopg.Error) -> tuple[str, int] | None:
    """The path (of the fork's first file) and block that could not be read, if that is the error."""
    text = error.diag.message_primary or str(error)
    match = _UNREADABLE.search(text)
    if match is not None:
        # With another segment than the first the file's name has its number; the block counts from the start.
        return re.sub(r"\.\d+\Z", "", match[2]), int(match[1])
    several = _SEVERAL.search(text)
    first = _FIRST.search(error.diag.message_detail or "")
    return (several[1], int(first[1])) if several and first else None


def index_block(error: psycopg.Error) -> int | None:
    """The first index block that amcheck's detail names."""
    match = _INDEX_BLOCK.search(error.diag.message_detail or "")
    return int(match[1]) if match else None


def row_without_entry(error: psycopg.Error) -> str | None:
    """The ctid of the row that has no entry in the index, if that is the error."""
    match = _LACKING.search(error.diag.message_primary or "")
    return match[1] if match else None


def is_gone(connection: Connection, relation: Relation) -> bool:
    """Whether the relation was dropped in the meantime."""
    row = connection.execute("select from pg_catalog.pg_class where oid = %s", [relation.oid]).fetchone()
    return row is None


def verify_heap(
    subject: Subject, connection: Connection, schema: str, relation: Relation
) -> Iterator[HeapDamage]:
    """Everything `verify_heapam` finds in a table, past pages that cannot be read.

    It stops at the first unreadable page and loses what it found before, so the range is cut around
    that page and read again. psycopg's errors other than damage pass through.
    """
    call = _HeapCall(connection, schema, relation)
    start = 0
    while True:
        blocks = call.blocks()
        if start >= blocks:
            return
        pace(subject)
        yield from call.verify(start, min(start + _PIECE_BLOCKS, blocks) - 1)
        start += _PIECE_BLOCKS


@dataclass(frozen=True, slots=True)
class _HeapCall:
    connection: Connection
    schema: str
    relation: Relation

    def blocks(self) -> int:
        row = self.connection.execute(
            "select pg_catalog.pg_relation_size(%s::oid::regclass)", [self.relation.oid]
        ).fetchone()
        return int(row[0]) // PAGE_BYTES if row and row[0] is not None else 0

    def verify(self, first: int, last: int) -> Iterator[HeapDamage]:
        follow_toast = True
        while first <= last:
            try:
                found = self._rows(first, last, follow_toast)
            except psycopg.errors.InvalidParameterValue:
                if last < self.blocks():  # not because the table became shorter
                    raise
                last = self.blocks() - 1
                continue
            except psycopg.Error as error:
                place = unreadable_block(error) if is_damage(error) else None
                if place is None:
                    raise
                path, block = place
                if path == self.relation.path and first <= block <= last:
                    # What precedes the page is known to be readable now.
                    yield from (
                        self._grouped(self._rows(first, block - 1, follow_toast)) if block > first else ()
                    )
                    yield HeapDamage(block, (_line(error),))
                    first, follow_toast = block + 1, True
                    continue
                if not follow_toast:
                    raise
                yield HeapDamage(None, (_line(error),), path)
                follow_toast = False
                continue
            yield from self._grouped(found)
            return

    def _rows(self, first: int, last: int, follow_toast: bool) -> list[tuple[Any, ...]]:
        query = sql.SQL(
            "select blkno, offnum, attnum, msg"
            " from {}.verify_heapam(%s::oid::regclass, false, %s, 'none', %s, %s)"
        ).format(sql.Identifier(self.schema))
        return self.connection.execute(query, [self.relation.oid, follow_toast, first, last]).fetchall()

    def _grouped(self, rows: list[tuple[Any, ...]]) -> Iterator[HeapDamage]:
        by_block: dict[int, list[str]] = {}
        for block, item, column, text in rows:
            where = f"item {item}: " if item is not None else ""
            where += f"column {column}: " if column is not None else ""
            by_block.setdefault(block, []).append(where + text)
        if not by_block:
            return
        # A row may change while it is looked at: only what is said twice counts.
        for block, messages in sorted(by_block.items()):
            again = (
                {text for _, _, _, text in self._rows(block, block, True)} if block < self.blocks() else set()
            )
            kept = [m for m in messages if any(m.endswith(text) for text in again)]
            if kept:
                yield HeapDamage(block, tuple(kept))


def _line(error: psycopg.Error) -> str:
    return error.diag.message_primary or str(error)
