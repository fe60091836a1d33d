"""What a revert is decided from, and what it is decided to be: rows, tables, conflicts, operations. Pure values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from knockwood.history.transaction import ColumnValue, RowChange, TableId

Row = Mapping[str, ColumnValue]

Cell = bytes | str | None
RowKey = tuple[Cell, ...]
"""Key columns (of a table without a key: all columns) by their images; text where a type has none."""

ChangeId = tuple[int, int]
"""A change by its transaction's xid and its position in that transaction's changes."""

OperationKind = Literal["set", "insert", "delete"]


def cell(value: ColumnValue) -> Cell:
    """What identifies a value: its image, its text where the type has no image, None for NULL."""
    return value.text if value.image is None else value.image


class Mode(StrEnum):
    """What is done about conflicts."""

    STRICT = "strict"
    SKIP = "skip-conflicts"
    CASCADE = "cascade"
    FORCE = "force"


class ConflictKind(StrEnum):
    """Why a change cannot be taken back without touching somebody else's work."""

    CHANGED = "changed since"
    GONE = "gone since"
    INSERT_CHANGED = "inserted row changed since"
    KEY_REUSED = "key reused"
    AMBIGUOUS = "cannot be told apart"
    SCHEMA = "table altered since"
    PARENT_MISSING = "referenced row is gone"
    CHILDREN = "other rows reference it"
    UNIQUE = "unique value taken"
    REVERTED_BEFORE = "reverted before"


@dataclass(frozen=True, slots=True)
class TableFacts:
    """A table as the live server has it. Names are as stored, not quoted.

    `columns` are those that can be written, in the table's order; `key` those of the primary key or else of
    the replica identity's index, empty where there is neither; `nullable` those that may be NULL.
    `partitioned` tables are reached through their root. `writers` names what else acts on writes: enabled
    triggers of the user's and rules; `always` those that act even under the replication role.
    """

    table: TableId
    columns: tuple[str, ...]
    key: tuple[str, ...] = ()
    generated: frozenset[str] = frozenset()
    nullable: frozenset[str] = frozenset()
    partitioned: bool = False
    writers: tuple[str, ...] = ()
    always: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UniqueKey:
    """A unique index over plain columns and all rows. `nulls` tells that NULLs count as equal."""

    name: str
    table: TableId
    columns: tuple[str, ...]
    operators: tuple[str, ...]
    deferrable: bool = False
    nulls: bool = False


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """A foreign key. `operators` compare parent with child, column by column.

    `on_update` and `on_delete` are pg_constraint's letters: a no action, r restrict, c cascade, n set null,
    d set default. `period`: the last columns are ranges to be covered.
    """

    name: str
    child: TableId
    parent: TableId
    columns: tuple[str, ...]
    referenced: tuple[str, ...]
    operators: tuple[str, ...]
    on_update: str = "a"
    on_delete: str = "a"
    deferrable: bool = False
    full: bool = False
    period: bool = False
    child_partitioned: bool = False
    parent_partitioned: bool = False


@dataclass(frozen=True, slots=True)
class Schema:
    """The tables touched, and the keys that bind them to each other and to others."""

    tables: Mapping[TableId, TableFacts]
    foreign: tuple[ForeignKey, ...] = ()
    unique: tuple[UniqueKey, ...] = ()
    unread: tuple[str, ...] = ()
    """Unique indexes and exclusion constraints that only the server can judge (expressions, predicates)."""


@dataclass(frozen=True, slots=True)
class Found:
    """A row as it is now. `place` is `tableoid:ctid`, `xmin` who wrote this version: together they never
    mean another version while the row is not vacuumed away and rewritten."""

    place: str
    xmin: int
    values: Row


@dataclass(frozen=True, slots=True)
class Current:
    """The rows of now that were looked for, by table and by the key that was asked for.

    A table with a key has at most one row for each; one without has all that are equal in every byte.
    """

    rows: Mapping[TableId, Mapping[RowKey, tuple[Found, ...]]] = field(default_factory=dict)

    def at(self, table: TableId, key: RowKey) -> tuple[Found, ...]:
        return self.rows.get(table, {}).get(key, ())


@dataclass(frozen=True, slots=True)
class Conflict:
    """A change that is not taken back, and what stands against it.

    `xid` is the transaction to be reverted, `writers` the raw xmin of the rows in the way, `count` how many.
    """

    kind: ConflictKind
    table: TableId
    key: Mapping[str, str | None]
    xid: int
    columns: tuple[str, ...] = ()
    detail: str = ""
    writers: tuple[int, ...] = ()
    count: int = 1
    changes: tuple[ChangeId, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": str(self.kind),
            "table": str(self.table),
            "key": dict(self.key),
            "xid": self.xid,
            "columns": list(self.columns),
            "detail": self.detail,
            "writers": list(self.writers),
            "count": self.count,
        }


@dataclass(frozen=True, slots=True)
class Operation:
    """One row's repair, all reverted transactions taken together.

    `found` is the row as it is (None for an insert), `final` as it will be (None for a delete), `columns`
    what is set. `deltas` are of counters: what is added, as text; the sum is in `final`.
    """

    kind: OperationKind
    table: TableId
    found: Found | None
    final: Row | None
    columns: tuple[str, ...] = ()
    deltas: Mapping[str, str] = field(default_factory=dict)
    changes: tuple[ChangeId, ...] = ()

    def key(self, columns: tuple[str, ...]) -> dict[str, str | None]:
        """The row's key as it is now (for an insert: as it will be), as text, for people."""
        row = self.found.values if self.found else self.final or {}
        return {name: row[name].text for name in columns or tuple(row) if name in row}


@dataclass(frozen=True, slots=True)
class Merge:
    """The outcome of merging. `already` counts changes that were reverted before or have nothing left to take
    back, `later` holds the writers of rows whose later edits are kept."""

    operations: tuple[Operation, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    already: int = 0
    later: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Culprit:
    """A transaction to be reverted, and the rows it changed."""

    xid: int
    changes: tuple[RowChange, ...]
