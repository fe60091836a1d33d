"""Indexes of methods without a checker: is every row found through the index?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import psycopg

from knockwood.integrity.amcheck import is_damage, is_gone, unreadable_block
from knockwood.integrity.budget import pace
from knockwood.integrity.catalog import Relation, relations, stake
from knockwood.integrity.check import NotChecked, Outcome, Subject, Weight
from knockwood.integrity.databases import attempt, in_each_database, sql_beside
from knockwood.model import Finding
from knockwood.postgres.connection import Connection

_SHOWN: Final = 20

# The outer scan may not be helped by an index (OFFSET 0 keeps conditions out of it), the inner one must
# be: LIMIT 1 keeps it a lookup of its own.
_EACH_ROW: Final = """
select o.kw_ctid::text, pg_catalog.left(o.kw_key::text, 100)
from (select ctid as kw_ctid, ({key}) as kw_key, ({predicate}) as kw_in from only {table} offset 0) o
left join lateral (
    select 1 as hit from only {table}
    where ({key}) {operator} o.kw_key and ctid = o.kw_ctid and ({predicate}) limit 1) h on true
where o.kw_in and o.kw_key is not null and o.kw_key {operator} o.kw_key {not_empty} and h.hit is null
"""

# A summary speaks of a range of blocks: its least and its greatest key must lead there.
_BLOCK: Final = "((ctid::text::pg_catalog.point)[0]::int8 / {pages})"
_EACH_RANGE: Final = f"""
select pg_catalog.format('(%s,1)', o.kw_range * {{pages}}), pg_catalog.left(o.kw_key::text, 100)
from (select kw_range, pg_catalog.unnest({{keys}}) as kw_key
      from (select {_BLOCK} as kw_range, ({{key}}) as kw_key, ({{predicate}}) as kw_in
            from only {{table}} offset 0) r
      where kw_in and kw_key is not null group by kw_range offset 0) o
left join lateral (
    select 1 as hit from only {{table}}
    where ({{key}}) {{operator}} o.kw_key and {_BLOCK} = o.kw_range and ({{predicate}}) limit 1) h on true
where h.hit is null
"""


@dataclass(frozen=True, slots=True)
class _Index:
    oid: int
    table_oid: int
    method: str
    table: str
    name: str
    key: str
    predicate: str
    operator: str | None
    pages: int
    minmax: bool
    array: bool

    def query(self) -> str:
        if self.method == "brin":
            keys = "array[min(kw_key), max(kw_key)]" if self.minmax else "(array_agg(kw_key))[1:1]"
            return _EACH_RANGE.format(
                table=self.table,
                key=self.key,
                predicate=self.predicate,
                operator=self.operator,
                pages=self.pages,
                keys=keys,
            )
        return _EACH_ROW.format(
            table=self.table,
            key=self.key,
            predicate=self.predicate,
            operator=self.operator,
            # An empty array names no entry: it would be looked for in all of them.
            not_empty="and pg_catalog.cardinality(o.kw_key) > 0"
            if self.array and self.method == "gin"
            else "",
        )


class IndexAgainstHeap:
    """Looks every row up through each hash, GiST, GIN, SP-GiST and BRIN index.

    One statement, so one snapshot, reads the table from end to end and looks each key up through the
    index: what concurrent transactions do is the same for both sides.
    """

    name = "index_against_heap"
    title = "Every row is found through its hash, GiST, GIN, SP-GiST and BRIN indexes"
    weight = Weight.HEAVY

    def run(self, subject: Subject) -> Iterator[Outcome]:
        def look(connection: Connection, database: str) -> Iterator[Outcome]:
            for name, value in _FORCED.items():
                connection.execute(f"set {name} = {value}".encode())
            known = {relation.oid: relation for relation in relations(connection, database)}
            for row in connection.execute(sql_beside(__file__)).fetchall():
                index = _Index(*row)
                relation = known.get(index.oid)
                if relation is None or (relation.persistence == "u" and subject.facts.in_recovery):
                    continue
                pace(subject)
                what = f"database {database}, index {relation.name}"
                yield from attempt(self.name, what, partial(_one, connection, relation, index))

        yield from in_each_database(subject, self.name, look)


_FORCED: Final = {
    "enable_seqscan": "off",
    "enable_tidscan": "off",
    "enable_indexonlyscan": "off",
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
}


def _one(connection: Connection, relation: Relation, index: _Index) -> Iterator[Outcome]:
    if index.operator is None:
        yield NotChecked(
            IndexAgainstHeap.name,
            f"index {relation.name}: no operator of its class compares a key with itself",
        )
        return
    query = index.query()
    try:
        if not _used(connection, query, index.name):
            yield NotChecked(
                IndexAgainstHeap.name,
                f"index {relation.name}: the planner prefers another index on the same column",
            )
            return
        missing = connection.execute(query.encode()).fetchmany(_SHOWN + 1)
    except psycopg.Error as error:
        if connection.closed or is_gone(connection, relation):
            if connection.closed:
                raise
            return
        if not (is_damage(error) or isinstance(error, psycopg.errors.InternalError_)):
            raise
        yield _broken(relation, error)
        return
    if missing:
        yield _missed(relation, index, missing)


def _used(connection: Connection, query: str, name: str) -> bool:
    """Whether the plan looks rows up through this index and no other."""
    row = connection.execute(b"explain (format json) " + query.encode()).fetchone()
    plan = row[0] if row else []
    found: set[str] = set()

    def collect(node: Any) -> None:
        if isinstance(node, dict):
            if "Index Name" in node:
                found.add(node["Index Name"])
            for value in node.values():
                collect(value)
        elif isinstance(node, list):
            for value in node:
                collect(value)

    collect(json.loads(plan) if isinstance(plan, str) else plan)
    return found == {name}


def _missed(relation: Relation, index: _Index, missing: list[tuple[Any, ...]]) -> Finding:
    what = stake(relation, "main")
    ctid, key = missing[0]
    many = f"{len(missing)} rows" if len(missing) <= _SHOWN else f"more than {_SHOWN} rows"
    return Finding(
        IndexAgainstHeap.name,
        what.severity,
        relation.location(relation.path, key=f"{index.key}={key} (ctid {ctid})"),
        f"{many} of the table are not found through the index",
        what.meaning,
        what.remedy,
        {"method": index.method, "rows": [{"ctid": c, "key": k} for c, k in missing[:_SHOWN]]},
    )


def _broken(relation: Relation, error: psycopg.Error) -> Finding:
    what = stake(relation, "main")
    message = error.diag.message_primary or str(error)
    place = unreadable_block(error)
    block = place[1] if place and place[0] == relation.path else None
    return Finding(
        IndexAgainstHeap.name,
        what.severity,
        relation.location(relation.path, block),
        f"a query through the index fails: {message}",
        what.meaning,
        what.remedy,
        {"message": message},
    )


CHECK = IndexAgainstHeap()
