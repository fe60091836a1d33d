"""The rows that transactions changed, from one clone of the archive; partial where that is safe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from knockwood.clone.registry import Registry
from knockwood.history.images import RowChanges, row_changes
from knockwood.history.shapes import TableShape
from knockwood.history.spawners import clones_for
from knockwood.history.standing import Position, Standing
from knockwood.history.touched import Decoded
from knockwood.history.transaction import TableId, Transaction
from knockwood.model import Lsn
from knockwood.operations.cluster import Cluster
from knockwood.operations.warm import clone_to_read
from knockwood.recover.plan.rows import Culprit
from knockwood.recover.revert_catalog import Catalog
from knockwood.repository.repository import Repository
from knockwood.repository.targets import RestorePlan


@dataclass(slots=True)
class Gathered:
    """What was read so far, by commit. `reasons` say why a transaction cannot be taken back row by row."""

    culprits: dict[Lsn, Culprit] = field(default_factory=dict)
    shapes: dict[TableId, TableShape] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, transaction: Transaction, changes: RowChanges) -> None:
        """Remember one transaction's changes, or why they are not enough."""
        xid = transaction.xid
        if changes.ddl:
            lines = "; ".join(changes.ddl)
            self.reasons.append(f"{xid} changed the schema, which rows cannot undo: {lines}")
        for unread in changes.unread:
            self.reasons.append(f"{xid} changed rows of {unread.table} that cannot be read: {unread.reason}")
        if self.reasons:
            return
        self.culprits[transaction.commit_lsn] = Culprit(xid, tuple(changes))
        self.notes += changes.notes
        self.shapes |= {**changes.after, **changes.before}

    def drift(self, catalog: Catalog) -> list[str]:
        """Columns whose type is another now: their images cannot be compared."""
        return list(self._drift(catalog))

    def _drift(self, catalog: Catalog) -> Iterator[str]:
        for table, root in catalog.roots.items():
            shape = self.shapes.get(table)
            live = catalog.tables[root].columns
            for column in shape.columns if shape else ():
                now = live.get(column.name)
                if now is not None and now.oid != column.type_oid:
                    yield f"{table}.{column.name} was {column.type} and is {now.type} now"


RowName = tuple[TableId, frozenset[tuple[str, str | None]]]


def keys_of(culprit: Culprit, catalog: Catalog) -> Iterator[RowName]:
    """The rows that a transaction changed in the tables known, as conflicts name them."""
    for change in culprit.changes:
        root = catalog.roots.get(change.table)
        if root is not None:
            facts = catalog.tables[root].facts
            for row in (change.before, change.after):
                if row is not None:
                    names = facts.key or facts.columns
                    yield root, frozenset((name, row[name].text) for name in names if name in row)


def changes_of(
    cluster: Cluster,
    repository: Repository,
    transactions: Sequence[Transaction],
    gathered: Gathered,
    registry: Registry | None = None,
) -> None:
    """Read what the transactions did, the oldest first, from one clone that goes on from commit to commit.

    The clone is a warm one where the shadow can give one. What may have begun before the archive's WAL is a
    reason to refuse, and nothing is read then.
    """
    half = [one.xid for one in transactions if not one.complete]
    gathered.reasons += [
        f"{xid} may have begun before the archive's WAL: not all that it changed is known" for xid in half
    ]
    if half:
        return
    ordered = sorted(transactions, key=lambda one: one.commit_lsn)
    decoded = Decoded(repository)
    cold = clones_for(
        repository,
        ordered,
        purpose="revert",
        programs_for=cluster.programs,
        registry=registry,
        decoded=decoded,
    )

    def make(plan: RestorePlan) -> Standing:
        return clone_to_read(cluster, repository, plan, registry=registry) or cold(plan)

    with Position(make) as position:
        for one in ordered:
            # A table that was locked against everybody is read before the lock, which may lie behind the clone.
            alone = one.catalog_changes or any(each.truncated or each.rewritten for each in one.relations)
            read = row_changes(
                repository,
                [one],
                decoded=decoded,
                programs_for=cluster.programs,
                registry=registry,
                spawner=make,
                position=None if alone or len(ordered) == 1 else position,
            )
            with read as changes:
                gathered.take(one, changes)
