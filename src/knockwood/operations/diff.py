"""`diff`: the rows that a transaction, or all of a range, changed: before and after, column by column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from knockwood.clone.registry import Registry
from knockwood.errors import UsageError
from knockwood.history.diff import Between, Subject, transactions_of
from knockwood.history.gathering import Unread
from knockwood.history.images import RowChanges, row_changes
from knockwood.history.index import ArchiveIndex
from knockwood.history.spawners import clones_for
from knockwood.history.touched import ROW_LIMIT, Decoded
from knockwood.history.transaction import RowChange, TableId, Transaction
from knockwood.host import clock
from knockwood.model import Lsn
from knockwood.operations.cluster import Cluster
from knockwood.operations.freshness import bring_up_to_date
from knockwood.repository.archive import WalArchive
from knockwood.repository.repository import Repository

SHOWN: Final = 1000
"""Rows that are given unless more are asked for."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Difference:
    """What transactions did, net. `changes` are the first ones, `counts` all of them by table and kind.

    `unread` names what changed and is not given, `notes` what cannot be known. `seconds` from start to end.
    """

    subject: Subject
    transactions: tuple[Transaction, ...]
    changes: tuple[RowChange, ...]
    counts: tuple[tuple[TableId, str, int], ...]
    ddl: tuple[str, ...]
    unread: tuple[Unread, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def total(self) -> int:
        return sum(count for _, _, count in self.counts)

    @property
    def left_out(self) -> int:
        """Changes that were read and counted, and are not among `changes`."""
        return self.total - len(self.changes)

    def as_json(self) -> dict[str, Any]:
        return {
            "subject": str(self.subject),
            "transactions": [
                {
                    "xid": each.xid,
                    "commit_lsn": str(each.commit_lsn),
                    "commit_time": each.commit_time.isoformat(),
                }
                for each in self.transactions
            ],
            "changes": [change_as_json(change) for change in self.changes],
            "counts": [
                {"table": str(table), "database": table.database, "kind": kind, "rows": count}
                for table, kind, count in self.counts
            ],
            "left_out": self.left_out,
            "ddl": list(self.ddl),
            "unread": [each.as_json() for each in self.unread],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


def change_as_json(change: RowChange) -> dict[str, Any]:
    """A change with its changed columns named, and where it moved to another partition."""
    moved = change.details.get("moved_to")
    value = change.as_json() | {"changed": list(change.changed)}
    return value | ({"moved_to": str(moved)} if moved is not None else {})


def diff(
    cluster: Cluster,
    subject: Subject,
    *,
    table: str | None = None,
    shown: int = SHOWN,
    limit: int = ROW_LIMIT,
    wait: float = 10,
    progress: Progress | None = None,
) -> Difference:
    """Read what was changed on a clone just before and just after; nothing is written.

    `table` is NAME or SCHEMA.NAME; a partitioned table means its partitions. At most `shown` changes are
    given, all are counted. The archive gets `wait` seconds to hold what the live server has promised.
    Raises ObjectMissingError for an unknown transaction, RefusedError above `limit` rows, for a range that
    the archive does not cover, or where no backup is from before.
    """
    if shown < 0 or limit < 1:
        raise UsageError("a negative limit", hint="--limit 1000")
    began = clock.monotonic()
    tell = progress or (lambda _: None)
    name = parse_table(table) if table is not None else None
    repository = cluster.repository()
    notes: list[str] = []
    if wait > 0 and _may_lack(repository, subject):
        tell("waiting for the newest WAL")
        freshness = bring_up_to_date(cluster, repository, timeout=wait)
        notes += [] if freshness.complete else [freshness.detail]
    tell("reading the archive's index")
    transactions = transactions_of(ArchiveIndex.open(repository, programs_for=cluster.programs), subject)
    if not transactions:
        return Difference(subject, (), (), (), (), (), tuple(notes), clock.monotonic() - began)
    registry = Registry(cluster.settings.proof.clones or cluster.state)
    decoded = Decoded(repository, limit)
    tell("restoring a clone to just before")
    spawner = clones_for(
        repository, transactions, purpose="diff", programs_for=cluster.programs, registry=registry,
        decoded=decoded, together=True,
    )  # fmt: skip
    with row_changes(
        repository, transactions, table=name, decoded=decoded, programs_for=cluster.programs, spawner=spawner
    ) as changes:
        tell("reading rows")
        kept, counts = _first(changes, shown)
        return Difference(
            subject,
            transactions,
            kept,
            counts,
            changes.ddl,
            changes.unread,
            (*notes, *changes.notes),
            clock.monotonic() - began,
        )


def _first(
    changes: RowChanges, shown: int
) -> tuple[tuple[RowChange, ...], tuple[tuple[TableId, str, int], ...]]:
    """The first changes, and the number of all by table and kind."""
    kept: list[RowChange] = []
    counts: Counter[tuple[TableId, str]] = Counter()
    for change in changes:
        counts[change.table, change.kind] += 1
        if len(kept) < shown:
            kept.append(change)
    return tuple(kept), tuple((table, kind, count) for (table, kind), count in sorted(counts.items()))


def _may_lack(repository: Repository, subject: Subject) -> bool:
    """Whether the archive may not hold all that is asked for: a range that ends within it does not wait."""
    if not isinstance(subject, Between):
        return True
    inventory = WalArchive(repository).inventory()
    ends = [
        Lsn((numbers[-1] + 1) * inventory.segment_bytes) for numbers in inventory.segments.values() if numbers
    ]
    return subject.until >= max(ends, default=Lsn(0))


def parse_table(text: str) -> tuple[str | None, str]:
    """Read NAME or SCHEMA.NAME, each part quoted if it holds a dot; raises UsageError."""
    parts = name_parts(text)
    if len(parts) > 2:
        raise UsageError(f"not a table: {text!r}", hint="write NAME or SCHEMA.NAME, as in public.orders")
    return (parts[0], parts[1]) if len(parts) == 2 else (None, parts[0])


def name_parts(text: str) -> list[str]:
    """The one to three parts of a name, names as they are stored; raises UsageError."""
    parts: list[str] = []
    rest = text
    while rest:
        if rest.startswith('"'):
            part, rest = _quoted_part(text, rest)
        else:
            part, _, rest = rest.partition(".")
        parts.append(part)
    if not 1 <= len(parts) <= 3 or not all(parts) or text.endswith("."):
        raise UsageError(f"not a table: {text!r}", hint="write NAME or SCHEMA.NAME, as in public.orders")
    return parts


def _quoted_part(text: str, rest: str) -> tuple[str, str]:
    end = 1
    while end < len(rest):
        if rest[end] != '"':
            end += 1
        elif rest[end : end + 2] == '""':
            end += 2
        else:
            break
    after = rest[end + 1 :]
    if end >= len(rest) or (after and not after.startswith(".")) or after == ".":
        raise UsageError(f"not a table: {text!r}", hint='a quoted name ends with a quote, as in "Or.ders"')
    return rest[1:end].replace('""', '"'), after[1:]


__all__ = ["SHOWN", "Difference", "change_as_json", "diff", "name_parts", "parse_table"]
