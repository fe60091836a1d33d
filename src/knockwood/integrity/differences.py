"""From 'these blocks differ' to the rows: which row, which column, both values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import psycopg

from knockwood.integrity.databases import rows
from knockwood.integrity.fingerprint import Blocks, Column, Snapshot, Totals, Types, hashable
from knockwood.integrity.primary_state import Chunk
from knockwood.integrity.tables import Table, open_pinned, types_of
from knockwood.model import Finding, Location, Severity
from knockwood.postgres.connection import Connection

NAMED: Final = 20
"""Rows of a table that become a finding of their own; the rest is counted."""

_SHOWN: Final = 200

Kind = Literal["changed", "missing", "extra", "blocks"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A row version that differs, or (`blocks`) a range whose totals do. `multixact`: what may explain it."""

    kind: Kind
    ctid: str = ""
    multixact: int | None = None
    blocks: Blocks | None = None
    ours: Totals | None = None
    theirs: Totals | None = None

    @classmethod
    def of_blocks(cls, chunk: Chunk, theirs: Totals) -> Difference:
        return cls("blocks", blocks=chunk.blocks, ours=chunk.totals, theirs=theirs)

    @property
    def where(self) -> str:
        """The place in words."""
        if self.blocks is None:
            return f"ctid {self.ctid}"
        return (
            f"blocks {self.blocks.start} to {'the end' if self.blocks.end is None else self.blocks.end - 1}"
        )


@dataclass(frozen=True, slots=True)
class Copies:
    """The two sides of one database, and how the primary's was read."""

    database: str
    primary_dsn: str | None
    copy_dsn: str
    snapshot: Snapshot
    method: str


def name_differences(
    copies: Copies, table: Table, differences: list[Difference]
) -> tuple[list[Finding], list[str]]:
    """Findings that name the rows, and reasons for what could be neither named nor ruled out.

    Rows are matched by version: the same ctid and writer hold the same content on every copy of a
    cluster, whatever happened since. Raises what psycopg and the connections raise.
    """
    findings: list[Finding] = []
    unknown: list[str] = []
    if copies.primary_dsn is None:
        sure = [difference for difference in differences if difference.multixact is None]
        if len(sure) < len(differences):
            unknown.append("rows that several transactions held are missing; the primary cannot be asked why")
        return [_by_place(copies, table, difference) for difference in sure[:NAMED]], unknown
    with (
        open_pinned(copies.primary_dsn, copies.database) as primary,
        open_pinned(copies.copy_dsn, copies.database) as copy,
    ):
        describe = _Describer(copies, table, primary, copy)
        for difference in differences:
            if len(findings) >= NAMED:
                break
            if difference.kind == "blocks":
                named = list(_rows_of(describe, difference, NAMED - len(findings)))
                findings += named or [_by_place(copies, table, difference)]
            elif difference.multixact is not None and _explained(
                primary, difference.multixact, copies.snapshot
            ):
                continue
            else:
                findings.append(describe.row(difference.kind, difference.ctid))
    return findings, unknown


def _explained(primary: Connection, multixact: int, snapshot: Snapshot) -> bool:
    """Whether a member of the multixact changed or deleted the row after the snapshot was taken."""
    try:
        members = rows(
            primary,
            "select xid::text::bigint, mode"
            " from pg_catalog.pg_get_multixact_members(%s::text::pg_catalog.xid)",
            multixact,
        )
    except psycopg.Error:
        return False  # not a multixact after all: then its xmax was too old to have deleted the row
    return any(mode in ("upd", "nokeyupd") and snapshot.may_miss(xid) for xid, mode in members)


def _rows_of(describe: _Describer, difference: Difference, most: int) -> Iterator[Finding]:
    """The rows that make a range differ: changed in place, lost, or on the copy only.

    A row on the copy only may just have been deleted on the primary since; it counts when the copy had
    more rows than the primary at the position itself.
    """
    assert difference.blocks is not None
    assert difference.ours is not None
    assert difference.theirs is not None
    extra: list[str] = []
    count = 0
    for kind, ctid in _merged(describe, difference.blocks):
        if kind == "extra":
            extra.append(ctid)
            continue
        yield describe.row(kind, ctid)
        count += 1
        if count >= most:
            return
    surplus = difference.theirs.count - difference.ours.count
    if count == 0 and surplus > 0 and len(extra) <= surplus:
        for ctid in extra[:most]:
            yield describe.row("extra", ctid)


def _merged(describe: _Describer, blocks: Blocks) -> Iterator[tuple[Kind, str]]:
    """Both sides in the order of ctid. Rows that the primary wrote since the position are passed over."""
    ours = _versions(describe.primary, describe.table, blocks, describe.copies.snapshot.horizon)
    theirs = _versions(describe.copy, describe.table, blocks, describe.copies.snapshot.horizon)
    a, b = next(ours, None), next(theirs, None)
    while a is not None or b is not None:
        if b is None or (a is not None and a[0] < b[0]):
            assert a is not None
            if a[3]:
                yield "missing", _tid(a[0])
            a = next(ours, None)
        elif a is None or b[0] < a[0]:
            if b[3]:
                yield "extra", _tid(b[0])
            b = next(theirs, None)
        else:
            if a[1] == b[1] and a[2] != b[2]:
                yield "changed", _tid(a[0])
            a, b = next(ours, None), next(theirs, None)


_Place = tuple[int, int]


def _versions(
    connection: Connection, table: Table, blocks: Blocks, horizon: int
) -> Iterator[tuple[_Place, int, int, bool]]:
    """Place, xmin, hash, and whether it was written before the horizon, in the order of ctid."""
    query = (
        f"select t.ctid::text, t.xmin::text::bigint, {table.hashed},"
        f" pg_catalog.age(t.xmin) > (select pg_catalog.age('{horizon}'::pg_catalog.xid))"
        f" from only {table.name} t where {blocks.where}"
    )
    with connection.transaction(), connection.cursor(name=f"rows_{id(blocks)}") as cursor:
        cursor.itersize = 20_000
        cursor.execute(query.encode())
        for ctid, xmin, hashed, old in cursor:
            block, offset = ctid[1:-1].split(",")
            yield (int(block), int(offset)), xmin, hashed, old


def _tid(place: _Place) -> str:
    return f"({place[0]},{place[1]})"


class _Describer:
    """Shows a row of both sides, column by column."""

    def __init__(self, copies: Copies, table: Table, primary: Connection, copy: Connection) -> None:
        self.copies = copies
        self.table = table
        self.primary = primary
        self.copy = copy
        self.types: Types = types_of(primary)

    def row(self, kind: Kind, ctid: str) -> Finding:
        """A finding for the row version at `ctid`."""
        ours, theirs = self._values(self.primary, ctid), self._values(self.copy, ctid)
        if kind == "missing":
            theirs = None
        elif kind == "extra":
            ours = None
        either = ours or theirs or {}
        key = ", ".join(f"{name}={either[name][0]}" for name in self.table.key if name in either)
        changed = {
            name: {"primary": ours[name][0], "copy": theirs[name][0]}
            for name in either
            if ours and theirs and ours[name][1] != theirs[name][1]
        }
        columns = f": column {', '.join(changed)}" if changed else ""
        words = {
            "changed": f"differs between primary and copy{columns}",
            "missing": "is missing from the copy",
            "extra": "is on the copy only",
            "blocks": "differs",
        }
        return Finding(
            check="compare",
            severity=Severity.CRITICAL,
            location=Location(
                database=self.copies.database,
                relation=self.table.name,
                block=int(ctid[1:-1].split(",")[0]),
                key=key or f"ctid={ctid}",
            ),
            summary=f"row {key or ctid} of {self.table.name} {words[kind]}",
            meaning="one side was changed outside PostgreSQL: by a disk, memory, or a lost write",
            remedy="find out which side is right before you rely on either",
            evidence={
                "kind": kind,
                "ctid": ctid,
                "columns": changed,
                "primary": {name: value[0] for name, value in ours.items()} if ours and not changed else None,
                "copy": {name: value[0] for name, value in theirs.items()}
                if theirs and not changed
                else None,
            },
        )

    def _values(self, connection: Connection, ctid: str) -> dict[str, tuple[str | None, Any]] | None:
        shown = [f"pg_catalog.left({_text(column)}, {_SHOWN})" for column in self.table.columns]
        exact = [
            f"pg_catalog.hash_record_extended(row({hashable(column, self.types)}), 0)"
            for column in self.table.columns
        ]
        query = f"select {', '.join(shown + exact)} from only {self.table.name} t where t.ctid = '{ctid}'"
        found = rows(connection, query)
        if not found:
            return None
        names = [column.name for column in self.table.columns]
        half = len(names)
        return {name: (found[0][i], found[0][half + i]) for i, name in enumerate(names)}


def _text(column: Column) -> str:
    return f"t.{column.name}::pg_catalog.text"


def _by_place(copies: Copies, table: Table, difference: Difference) -> Finding:
    """A finding for what cannot be named by its row."""
    ours, theirs = difference.ours, difference.theirs
    counts = f" ({ours.count} and {theirs.count} settled rows)" if ours and theirs else ""
    blocks = difference.blocks
    return Finding(
        check="compare",
        severity=Severity.CRITICAL,
        location=Location(
            database=copies.database,
            relation=table.name,
            block=blocks.start if blocks else int(difference.ctid[1:-1].split(",")[0]),
            key=None if blocks else f"ctid={difference.ctid}",
        ),
        summary=f"{table.name} differs between primary and copy in {difference.where}{counts}",
        meaning="one side was changed outside PostgreSQL; its rows have changed since",
        remedy="find out which side is right before you rely on either",
        evidence={"kind": difference.kind, "where": difference.where},
    )
