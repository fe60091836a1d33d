"""Fingerprints of tables: count, xor and sum of one 64-bit hash per row, whatever the rows' order.

Rows are hashed by what is stored, not by what compares as equal: `1.0` and `1.00`, `0.0` and `-0.0`,
`1 day` and `24 hours` differ. A type whose own hash tells every stored value apart is hashed by it
(2.6 to 5 million rows a second on one core); any other goes through its send function, which gives its
bytes, and one without a send function through its text. Xor alone would lose pairs of equal rows, so
count and sum go with it. Enums and `reg*` types count by OID: right between physical copies only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

PINNED: Final = {
    "search_path": "pg_catalog",
    "TimeZone": "UTC",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "row_security": "off",
    # Parallelism comes from several connections; a plan with workers of its own would take more than asked.
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
    # Snapshots are held by sessions that wait for others.
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}
"""Settings of every session that hashes or shows rows."""

CHUNK_BLOCKS: Final = 4096
"""Blocks that are hashed as one: 32 MiB."""

_MULTIXACT_SLACK: Final = 1_000_000
"""Multixacts that may be made while a chunk is read."""

_TEXT, _BPCHAR, _VARCHAR = 25, 1042, 1043

# bool bytea "char" name int8 int2 int4 oid date time timestamp timestamptz timetz uuid macaddr macaddr8
# inet cidr pg_lsn: equal to their hash function means equal in every byte.
_DISTINCT: Final = frozenset(
    {16, 17, 18, 19, 20, 21, 23, 26, 1082, 1083, 1114, 1184, 1266, 2950, 829, 774, 869, 650, 3220}
)


@dataclass(frozen=True, slots=True)
class Type:
    """A row of pg_type. `name` is quoted and qualified, `send` its send function's name or None.

    `base` is a domain's base type, `element` an array's element type, `parts` a composite's column types.
    """

    oid: int
    name: str
    kind: str
    base: int
    element: int
    send: str | None
    parts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Column:
    """A stored column; `name` is quoted. `deterministic` is False where different texts may be equal."""

    name: str
    type: int
    typmod: int
    deterministic: bool = True


Types = Mapping[int, Type]


def hashable(column: Column, types: Types) -> str:
    """The expression over `t.column` that goes into the row's hash; the module's text says how."""
    value = f"t.{column.name}"
    kind = types[column.type]
    typmod = column.typmod
    while kind.kind == "d":
        kind = types[kind.base]
        typmod = -1
        value = f"t.{column.name}::{kind.name}"
    if kind.kind == "e" or kind.oid in _DISTINCT:
        return value
    if kind.oid in (_TEXT, _VARCHAR) and column.deterministic:
        return value
    if kind.oid == _BPCHAR and typmod > 0 and column.deterministic:
        return value  # padded to its length when stored: nothing is left to tell apart
    if _sendable(kind, types):
        return f"{kind.send}({value})"
    return f"({value})::pg_catalog.text"


def _sendable(kind: Type, types: Types) -> bool:
    if kind.send is None:
        return False
    inner = [oid for oid in (kind.base, kind.element, *kind.parts) if oid]
    return all(oid in types and _sendable(types[oid], types) for oid in inner)


def row_hash(columns: Iterable[Column], types: Types) -> str:
    """The expression for one row's 64-bit hash, over the table alias `t`."""
    values = ", ".join(hashable(column, types) for column in columns)
    return f"pg_catalog.hash_record_extended(row({values}), 0)"


@dataclass(frozen=True, slots=True)
class Totals:
    """The fingerprint of a set of rows."""

    count: int = 0
    xor: int = 0
    sum: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.count + other.count, self.xor ^ other.xor, self.sum + other.sum)

    def without(self, hashes: Iterable[int]) -> Totals:
        """The fingerprint once rows of these hashes are taken out."""
        count, xor, total = self.count, self.xor, self.sum
        for value in hashes:
            count, xor, total = count - 1, xor ^ value, total - value
        return Totals(count, xor, total)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Heap blocks from `start` up to, not including, `end`; None: to the end, wherever it is by then."""

    start: int
    end: int | None

    @property
    def where(self) -> str:
        """The condition on `t.ctid`; a range of ctids is read as a range of blocks."""
        lower = f"t.ctid >= '({self.start},0)'::pg_catalog.tid"
        return lower if self.end is None else f"{lower} and t.ctid < '({self.end},0)'::pg_catalog.tid"


def split(blocks: int, size: int = CHUNK_BLOCKS) -> list[Blocks]:
    """Ranges of `size` blocks over a table of `blocks`, the last one open."""
    starts = list(range(0, max(blocks, 1), size))
    ends: list[int | None] = [*starts[1:], None]
    return [Blocks(start, end) for start, end in zip(starts, ends, strict=True)]


def totals_query(table: str, hashed: str, blocks: Blocks) -> str:
    """One row: count, xor, sum over the visible rows of a range of blocks."""
    return (
        "select pg_catalog.count(*), coalesce(pg_catalog.bit_xor(h), 0), coalesce(pg_catalog.sum(h), 0)"
        f" from (select {hashed} as h from only {table} t where {blocks.where} offset 0) s"
    )


def versions_query(
    table: str, hashed: str, blocks: Blocks, horizon: int, oldest_multixact: int | None
) -> str:
    """Count, xor and sum over settled row versions, and an array of the others.

    Settled: written before xid `horizon`, and not locked or deleted since. An xmax that could be a
    multixact (any since `oldest_multixact`) is not settled: its members may be newer. On a copy that
    nobody writes to (`oldest_multixact` None) only the writer counts. The others come as text:
    ctid, xmin, xmax, hash, and the flags `o` (written before the horizon), `x` (xmax not before it),
    `m` (xmax may be a multixact).
    """
    age = f"(select pg_catalog.age('{horizon}'::pg_catalog.xid))"
    old, recent, multi = f"pg_catalog.age(xn) > {age}", "false", "false"
    settled = old
    if oldest_multixact is not None:
        span = f"(select pg_catalog.mxid_age('{oldest_multixact}'::pg_catalog.xid))"
        past = f"pg_catalog.age(xx) <= {age}"
        young = f"pg_catalog.mxid_age(xx) between 0 and {span} + {_MULTIXACT_SLACK}"
        held = "xx <> '0'::pg_catalog.xid"
        recent, multi = f"{held} and {past}", f"{held} and {young}"
        settled = f"{old} and not ({held} and ({past} or {young}))"
    # OFFSET 0 keeps each level apart: a row's xmax is read once, for it may change while we look, and
    # `settled` is worked out once. Each level costs a seventh of the speed, so the flags have none.
    return (
        "select pg_catalog.count(*) filter (where settled),"
        " coalesce(pg_catalog.bit_xor(h) filter (where settled), 0),"
        " coalesce(pg_catalog.sum(h) filter (where settled), 0),"
        " pg_catalog.array_agg(pg_catalog.format('%s %s %s %s %s%s%s', c, xn, xx, h,"
        f" case when {old} then 'o' end, case when {recent} then 'x' end, case when {multi} then 'm' end))"
        " filter (where not settled)"
        f" from (select c, xn, xx, h, {settled} as settled"
        f" from (select t.ctid as c, t.xmin as xn, t.xmax as xx, {hashed} as h"
        f" from only {table} t where {blocks.where} offset 0) a offset 0) s"
    )


@dataclass(frozen=True, slots=True)
class RowVersion:
    """One version of a row: where it lies, who wrote it, who locked or deleted it, its hash.

    `old`: written before the snapshot's oldest running transaction. `recent`: xmax is not before that
    one. `multi`: xmax may be a multixact.
    """

    ctid: str
    xmin: int
    xmax: int
    hash: int
    old: bool
    recent: bool
    multi: bool

    @classmethod
    def parse(cls, text: str) -> RowVersion:
        """Read what `versions_query` wrote."""
        ctid, xmin, xmax, hashed, flags = text.split(" ")
        return cls(ctid, int(xmin), int(xmax), int(hashed), "o" in flags, "x" in flags, "m" in flags)


def precedes(left: int, right: int) -> bool:
    """Whether a 32-bit transaction id is older than another, as PostgreSQL's circle of ids has it."""
    return 0 < (right - left) % (1 << 32) < (1 << 31)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot as `pg_current_snapshot()` prints it; top-level transaction ids only."""

    xmin: int
    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        low, high, running = text.split(":")
        return cls(int(low), int(high), frozenset(int(xid) for xid in running.split(",") if xid))

    @property
    def horizon(self) -> int:
        """The 32-bit id before which every transaction had ended."""
        return self.xmin % (1 << 32)

    def may_miss(self, xid: int) -> bool:
        """Whether the snapshot may not see the transaction with this 32-bit id.

        A subtransaction is not listed: it may belong to any transaction that was running before it began.
        """
        if precedes(xid, self.horizon):
            return False
        if not precedes(xid, self.xmax % (1 << 32)):
            return True
        running = {top % (1 << 32) for top in self.running}
        return xid in running or any(precedes(top, xid) for top in running)
