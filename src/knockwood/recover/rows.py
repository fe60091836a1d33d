"""Bring changes that a page has lost over as rows, where no good image of the present page exists.

A clone stopped before the lost changes and again before the first record after the damage tells what they did.
In one transaction: the table is locked against writers, rows that are back from the dead are deleted, the
indexes made anew (their entries point at places that were used again), and the other rows put right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from knockwood.errors import RefusedError
from knockwood.host import clock
from knockwood.integrity.check import Subject
from knockwood.postgres.connection import Connection, connect, translated, with_words
from knockwood.recover.evidence import Keep
from knockwood.recover.pages_facts import Target, target_of
from knockwood.recover.plan.lost_rows import Change, Key, Mend, Merged, Row, merge_lost

_SHOWN: Final = 5
_CHUNK: Final = 500


@dataclass(frozen=True, slots=True)
class Shape:
    """A table's columns in order, without generated ones; `key` are positions of the primary key's columns.

    Names are quoted for SQL.
    """

    name: str
    columns: tuple[str, ...]
    types: tuple[str, ...]
    key: tuple[int, ...]

    def key_of(self, row: Row) -> Key:
        return tuple(row[at] for at in self.key)


_COLUMNS: Final = """
select pg_catalog.quote_ident(a.attname), pg_catalog.format_type(a.atttypid, a.atttypmod),
       coalesce(array_position(i.indkey::int2[], a.attnum), -1)
from pg_catalog.pg_attribute a
left join pg_catalog.pg_index i on i.indrelid = a.attrelid and i.indisprimary and i.indisvalid
where a.attrelid = %s and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
order by a.attnum
"""


def shape_of(connection: Connection, target: Target) -> Shape:
    """The table's shape; raises RefusedError without a primary key."""
    with translated():
        rows = connection.execute(_COLUMNS, [target.oid]).fetchall()
    key = tuple(at for at, row in enumerate(rows) if row[2] >= 0)
    if target.kind != "r" or not key:
        raise RefusedError(
            "the lost changes cannot be brought over as rows: rows are matched by a primary key,"
            " and there is none",
            where=target.name,
            hint="restore the table beside the live one, and compare",
        )
    return Shape(target.name, tuple(row[0] for row in rows), tuple(row[1] for row in rows), key)


def _settle(connection: Connection) -> None:
    """Texts that mean the same on every server."""
    with translated():
        for name, value in (
            ("search_path", "pg_catalog"),
            ("datestyle", "ISO, YMD"),
            ("intervalstyle", "postgres"),
            ("timezone", "UTC"),
            ("extra_float_digits", "3"),
            ("bytea_output", "hex"),
        ):
            connection.execute("select pg_catalog.set_config(%s, %s, false)", [name, value])


def rows_of_block(connection: Connection, shape: Shape, block: int) -> dict[str, Row]:
    """The rows that the block shows, by ctid."""
    return _rows(connection, shape, f"ctid >= '({block},0)'::tid and ctid < '({block + 1},0)'::tid", [])


def rows_of_keys(connection: Connection, shape: Shape, keys: Collection[Key]) -> dict[str, Row]:
    """The rows with these keys by ctid, found without any index: an index may be wrong."""
    with translated():
        for method in ("indexscan", "indexonlyscan", "bitmapscan"):
            connection.execute(f"set enable_{method} = off".encode())
    found: dict[str, Row] = {}
    wanted = sorted(keys, key=repr)
    for start in range(0, len(wanted), _CHUNK):
        chunk = wanted[start : start + _CHUNK]
        columns = ", ".join(f"{shape.columns[at]}::text" for at in shape.key)
        marks = ", ".join("(" + ", ".join(["%s"] * len(shape.key)) + ")" for _ in chunk)
        values = [value for key in chunk for value in key]
        found |= _rows(connection, shape, f"({columns}) in ({marks})", values)
    return found


def _rows(connection: Connection, shape: Shape, condition: str, values: Sequence[object]) -> dict[str, Row]:
    columns = ", ".join(f"{column}::text" for column in shape.columns)
    query = f"select ctid::text, {columns} from only {shape.name} where {condition}"
    with translated():
        rows = connection.execute(query.encode(), list(values)).fetchall()
    return {row[0]: tuple(row[1:]) for row in rows}


def read_clone(dsn: str, shape: Shape, block: int, keys: Collection[Key] = ()) -> dict[Key, Row]:
    """The rows that a clone shows on the block, and those with `keys` wherever they lie."""
    with connect(dsn, application_name="knockwood repair") as connection:
        _settle(connection)
        found = rows_of_block(connection, shape, block)
        if keys:
            found |= rows_of_keys(connection, shape, keys)
    result: dict[Key, Row] = {}
    for row in found.values():
        key = shape.key_of(row)
        if key in result:
            raise RefusedError(f"the clone shows two rows of key {key}", where=shape.name)
        result[key] = row
    return result


def join(rows: dict[Key, Row], more: Mapping[Key, Row], target: Target) -> None:
    """Put the rows of one more block to those of others; raises RefusedError where a row differs between them."""
    for key, row in more.items():
        if rows.setdefault(key, row) != row:
            raise RefusedError(
                f"key {key} was another row at each of two damaged blocks: it cannot be decided",
                where=target.name,
                hint="restore the table beside the live one, and compare",
            )


def require_ended(dsn: str, target: Target, xids: Collection[int]) -> None:
    """Raise RefusedError if one of these transactions is still open where the clone stands: what it wrote
    cannot be seen there, so that nobody can tell what was lost."""
    with connect(dsn, application_name="knockwood repair") as connection, translated():
        row = connection.execute(
            "select pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::int8"
        ).fetchone()
        assert row is not None
        for xid in sorted(xids):
            # WAL has the lower 32 bits; the number is at most half the circle back.
            whole = row[0] - (row[0] - xid) % (1 << 32)
            status = connection.execute(
                "select pg_catalog.pg_xact_status(%s::text::xid8)", [str(whole)]
            ).fetchone()
            if status is None or status[0] not in ("committed", "aborted"):
                raise RefusedError(
                    f"transaction {xid} was open when the damage was met: its lost rows cannot be seen",
                    where=target.name,
                    hint="restore the table beside the live one, and compare",
                )


@dataclass(frozen=True, slots=True)
class Replaced:
    """What was done. `xid` is the repair's own transaction; None where nothing was to be done."""

    mends: tuple[Mend, ...]
    xid: int | None
    locked_seconds: float


def replace_rows(
    subject: Subject,
    target: Target,
    stale: Mapping[Key, Row],
    true: Mapping[Key, Row],
    blocks: Sequence[int],
    *,
    keep: Keep,
    note: Callable[[str, Any], None],
    lock_timeout: float = 2.0,
) -> Replaced:
    """Merge and apply in one transaction; raises RefusedError, with nothing changed, for any conflict.

    Triggers do not fire (their effects are rows of their own, which were not lost); foreign keys of the rows
    touched are checked before the commit. All damaged blocks of a table go together: the indexes cannot be made
    anew while an old version on another one is back beside the new.
    """
    dsn = with_words(subject.dsn, dbname=target.database)
    with connect(dsn, application_name="knockwood repair", autocommit=False) as connection:
        _settle(connection)
        try:
            with translated():
                connection.execute("set local session_replication_role = replica")
                connection.execute(f"set local lock_timeout = '{int(lock_timeout * 1000)}ms'".encode())
                connection.execute("set local statement_timeout = 0")
                connection.execute(f"lock table only {target.name} in share row exclusive mode".encode())
            began = clock.monotonic()
            now = target_of(connection, target.database, target.oid)
            if now.node != target.node:
                raise RefusedError("the table was rewritten in the meantime", where=target.name)
            shape = shape_of(connection, target)
            merged = _merge(connection, shape, stale, true, blocks)
            if merged.conflicts:
                shown = "; ".join(f"key {c.key}: {c.reason}" for c in merged.conflicts[:_SHOWN])
                raise RefusedError(
                    f"{len(merged.conflicts)} rows cannot be decided: {shown}",
                    where=target.name,
                    hint="restore the table beside the live one, and compare these rows",
                )
            if not merged.mends:
                connection.rollback()
                return Replaced((), None, clock.monotonic() - began)
            keep({f"block-{'-'.join(map(str, blocks[:_SHOWN]))}.rows": _evidence(shape, merged)})
            xid = _apply(connection, shape, target, merged.mends)
            _check_foreign_keys(connection, target, shape, merged.mends)
            note("xid", xid)
            with translated():
                connection.commit()
            return Replaced(merged.mends, xid, clock.monotonic() - began)
        except BaseException:
            if not connection.closed:
                connection.rollback()
            raise


def _merge(
    connection: Connection,
    shape: Shape,
    stale: Mapping[Key, Row],
    true: Mapping[Key, Row],
    blocks: Sequence[int],
) -> Merged:
    affected = {key for key in {*stale, *true} if stale.get(key) != true.get(key)}
    found: dict[str, Row] = {}
    for block in blocks:
        found |= rows_of_block(connection, shape, block)
    if affected:
        found |= rows_of_keys(connection, shape, affected)
    current: dict[Key, list[tuple[str, Row]]] = {}
    for place, row in found.items():
        current.setdefault(shape.key_of(row), []).append((place, row))
    return merge_lost(stale, true, current)


def _evidence(shape: Shape, merged: Merged) -> bytes:
    rows = [
        {"change": str(m.change), "key": m.key, "ctid": m.place, "before": m.before, "after": m.after}
        for m in merged.mends
    ]
    told = {"table": shape.name, "columns": shape.columns, "rows": rows}
    return json.dumps(told, indent=1).encode()


def _apply(connection: Connection, shape: Shape, target: Target, mends: Sequence[Mend]) -> int:
    with translated():
        for mend in mends:
            if mend.change is Change.DELETE:
                _one(connection, f"delete from only {shape.name} where ctid = %s::tid", [mend.place])
        connection.execute(f"reindex table {target.name}".encode())
        for mend in mends:
            if mend.change is Change.UPDATE:
                changes = ", ".join(
                    f"{column} = %s::{kind}" for column, kind in zip(shape.columns, shape.types, strict=True)
                )
                query = f"update only {shape.name} set {changes} where ctid = %s::tid"
                _one(connection, query, [*(mend.after or ()), mend.place])
            elif mend.change is Change.INSERT:
                marks = ", ".join(f"%s::{kind}" for kind in shape.types)
                query = (
                    f"insert into {shape.name} ({', '.join(shape.columns)})"
                    f" overriding system value values ({marks})"
                )
                _one(connection, query, list(mend.after or ()))
        row = connection.execute("select pg_catalog.pg_current_xact_id()::text::int8").fetchone()
    assert row is not None
    return int(row[0])


def _one(connection: Connection, query: str, values: Sequence[object]) -> None:
    cursor: psycopg.Cursor[Any] = connection.execute(query.encode(), list(values))
    if cursor.rowcount != 1:
        raise RefusedError(f"{cursor.rowcount} rows were changed where one had to be: nothing was kept")


_FOREIGN: Final = """
select c.conname, c.conrelid = %(oid)s, pg_catalog.format('%%I.%%I', pn.nspname, p.relname),
       pg_catalog.format('%%I.%%I', cn.nspname, t.relname),
       array(select pg_catalog.quote_ident(attname) from pg_catalog.unnest(c.conkey) with ordinality k(n, o)
             join pg_catalog.pg_attribute a on a.attrelid = c.conrelid and a.attnum = k.n order by o),
       array(select pg_catalog.quote_ident(attname) from pg_catalog.unnest(c.confkey) with ordinality k(n, o)
             join pg_catalog.pg_attribute a on a.attrelid = c.confrelid and a.attnum = k.n order by o)
from pg_catalog.pg_constraint c
join pg_catalog.pg_class p on p.oid = c.confrelid join pg_catalog.pg_namespace pn on pn.oid = p.relnamespace
join pg_catalog.pg_class t on t.oid = c.conrelid join pg_catalog.pg_namespace cn on cn.oid = t.relnamespace
where c.contype = 'f' and %(oid)s in (c.conrelid, c.confrelid)
"""


def _check_foreign_keys(connection: Connection, target: Target, shape: Shape, mends: Sequence[Mend]) -> None:
    """Raise RefusedError if a row touched refers to nothing, or something refers to a row that is gone."""
    with translated():
        found = connection.execute(_FOREIGN, {"oid": target.oid}).fetchall()
    for name, outgoing, parent, child, columns, referred in found:
        mine = columns if outgoing else referred
        at = [shape.columns.index(column) for column in mine]
        rows = [m.after if outgoing else m.before for m in mends]
        values = {tuple(row[i] for i in at) for row in rows if row is not None}
        for value in sorted((v for v in values if None not in v), key=repr):
            orphans = " and ".join(f"c.{column}::text = %s" for column in columns)
            matches = " and ".join(f"p.{r} = c.{c}" for r, c in zip(referred, columns, strict=True))
            query = (
                f"select 1 from {child} c where {orphans}"
                f" and not exists (select from {parent} p where {matches}) limit 1"
            )
            with translated():
                bad = connection.execute(query.encode(), list(value)).fetchone()
            if bad:
                raise RefusedError(
                    f"the rows brought over would break the foreign key {name} for {value}: nothing was kept",
                    where=target.name,
                    hint="rows were written since that rely on the damage: mend them by hand, then try again",
                )
