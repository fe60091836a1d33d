"""A transaction as the WAL tells it, and the rows it changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from knockwood.model.wal import Lsn, Timeline

Kind = Literal["insert", "update", "delete"]


@dataclass(frozen=True, slots=True, order=True)
class RelationChanges:
    """Row changes of one transaction in one relation, by the numbers WAL uses.

    Counts are of heap tuples. `dropped`: the file is gone with the commit; where another, empty one took
    its place it was `truncated`. `rewritten`: another file with content took its place (a rewrite, or a
    TRUNCATE and new rows), or this is such a file, in which what counts as inserted may be the old rows.
    A file of a relation that is new as well has none of the three. TOAST tables are counted under their
    own number.
    """

    tablespace: int
    database: int
    filenode: int
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    truncated: bool = False
    rewritten: bool = False
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class Transaction:
    """A committed transaction. `xid` is the top-level one, `subxids` those committed with it.

    `commit_lsn` is the START of its COMMIT (or COMMIT PREPARED) record: what a clone stops before or
    after. `first_lsn` is the start of the first record of any of its xids that the archive holds;
    `wal_bytes` sums its records. `gid` is that of a two-phase commit; `label` what a mark or a logical
    message calls it. `catalog_changes` tells DDL. Not `complete`: it may have begun in WAL that the archive
    lacks, so that changes of it are not known.
    """

    xid: int
    timeline: Timeline
    first_lsn: Lsn
    commit_lsn: Lsn
    end_lsn: Lsn
    commit_time: datetime
    subxids: tuple[int, ...] = ()
    wal_bytes: int = 0
    relations: tuple[RelationChanges, ...] = ()
    catalog_changes: bool = False
    gid: str | None = None
    label: str | None = None
    complete: bool = True

    @property
    def xids(self) -> frozenset[int]:
        """All xids whose changes this commit made visible."""
        return frozenset((self.xid, *self.subxids))


@dataclass(frozen=True, slots=True, order=True)
class TableId:
    """A table by name, in its database."""

    database: str
    schema: str
    name: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True, slots=True)
class ColumnValue:
    """A column's value: its text (DateStyle ISO, UTC, extra_float_digits 3), None for SQL NULL, and its binary
    image as the type's send function gives it (None where the type has none, or for NULL).
    """

    text: str | None
    image: bytes | None = None

    def same(self, other: ColumnValue) -> bool:
        """Equal by image where both have one, else by text: never by the type's own idea of equality."""
        if self.image is not None and other.image is not None:
            return self.image == other.image
        return self.text == other.text


@dataclass(frozen=True, slots=True)
class RowChange:
    """What one transaction, seen as a whole, did to one row: versions in between are left out.

    `key` holds the columns of the primary key (or of the replica identity's index) as they were before,
    for an insert as they are after; empty for a table without one. An update that changed the key has
    different key columns in `before` and `after`.
    """

    table: TableId
    kind: Kind
    key: Mapping[str, ColumnValue]
    before: Mapping[str, ColumnValue] | None
    after: Mapping[str, ColumnValue] | None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changed(self) -> tuple[str, ...]:
        """The columns an update changed, in the table's order; all of them for an insert or a delete."""
        if self.before is None or self.after is None:
            return tuple(self.after or self.before or {})
        return tuple(
            name
            for name, value in self.before.items()
            if name not in self.after or not value.same(self.after[name])
        )

    def as_json(self) -> dict[str, Any]:
        def texts(row: Mapping[str, ColumnValue] | None) -> dict[str, str | None] | None:
            return None if row is None else {name: value.text for name, value in row.items()}

        return {
            "table": str(self.table),
            "database": self.table.database,
            "key": texts(self.key),
            "kind": self.kind,
            "before": texts(self.before),
            "after": texts(self.after),
        }
