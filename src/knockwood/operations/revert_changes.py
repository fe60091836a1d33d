"""The rows that transactions changed, from one clone of the archive; partial where that is safe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from knockwood.clone.registry import Registry
from knockwood.errors import PostgresError, RefusedError
from knockwood.history.images import RowChanges, row_changes
from knockwood.history.shapes import TableShape
from knockwood.history.spawners import clones_for
from knockwood.history.standing import Position, ProgramsFor, Spawner, Standing, commit_plan
from knockwood.history.touched import ROW_LIMIT, Decoded
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

    def copy(self) -> Gathered:
        """The same, to go on with on trial."""
        return Gathered(dict(self.culprits), dict(self.shapes), list(self.reasons), list(self.notes))

    def become(self, other: Gathered) -> None:
        """What was gathered on trial counts."""
        self.culprits, self.shapes = other.culprits, other.shapes
        self.reasons, self.notes = other.reasons, other.notes

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
    *,
    limit: int = ROW_LIMIT,
) -> None:
    """Read what the transactions did, the oldest first, from one clone that goes on from commit to commit.

    The clone is a warm one where the shadow can give one. What may have begun before the archive's WAL is a
    reason to refuse, and nothing is read then. Raises RefusedError above `limit` rows.
    """
    half = [one.xid for one in transactions if not one.complete]
    gathered.reasons += [
        f"{xid} may have begun before the archive's WAL: not all that it changed is known" for xid in half
    ]
    if half:
        return
    ordered = sorted(transactions, key=lambda one: one.commit_lsn)
    reading = _Reading(cluster, repository, ordered, Decoded(repository, limit), registry)
    onward = _to_the_last(repository, ordered, cluster.programs)
    if cluster.settings.shadow.enabled:
        trial = gathered.copy()
        try:
            reading.into(trial, reading.lend, onward)
        except (_NotLentError, PostgresError, RefusedError):
            # A hold may be in between, or its server end with who keeps it: a clone of its own does.
            pass
        else:
            gathered.become(trial)
            return
    reading.into(gathered, reading.cold, onward)


class _NotLentError(Exception):
    """The shadow cannot be read where it was wanted."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """Reads what transactions (in order) did, from one clone that is made as asked."""

    cluster: Cluster
    repository: Repository
    ordered: Sequence[Transaction]
    decoded: Decoded
    registry: Registry | None

    def lend(self, plan: RestorePlan) -> Standing:
        """The shadow; _NotLentError where it cannot be had."""
        clone = clone_to_read(self.cluster, self.repository, plan, registry=self.registry)
        if clone is None:
            raise _NotLentError
        return clone

    def cold(self, plan: RestorePlan) -> Standing:
        """A clone of what is needed."""
        make = clones_for(
            self.repository,
            self.ordered,
            purpose="revert",
            programs_for=self.cluster.programs,
            registry=self.registry,
            decoded=self.decoded,
        )
        return make(plan)

    def into(self, gathered: Gathered, make: Spawner, onward: RestorePlan | None) -> None:
        """Read them one by one; `onward` is a plan on whose way all lie, if there is one."""
        reached = Lsn(0)
        with Position(make) as position:
            for one in self.ordered:
                alone = onward is None or _looks_back(self.cluster, self.decoded, onward, one, reached)
                read = row_changes(
                    self.repository,
                    [one],
                    decoded=self.decoded,
                    programs_for=self.cluster.programs,
                    registry=self.registry,
                    # The one that goes on may be the shadow: there is no second.
                    spawner=make if onward is None else self.cold,
                    position=None if alone else position,
                    onward=None if alone else onward,
                )
                with read as changes:
                    gathered.take(one, changes)
                reached = reached if alone else one.commit_lsn


def _looks_back(
    cluster: Cluster, decoded: Decoded, plan: RestorePlan, one: Transaction, reached: Lsn
) -> bool:
    """Whether it has to be read from before `reached`: a table that it locked against everybody, before the lock."""
    if one.catalog_changes or any(each.truncated or each.rewritten for each in one.relations):
        return True
    locks = decoded.of(cluster.programs(plan.backup.major), [one]).locks
    return any(lock.lsn < reached for lock in locks)


def _to_the_last(
    repository: Repository, ordered: Sequence[Transaction], programs_for: ProgramsFor
) -> RestorePlan | None:
    """The plan to the last of several commits, on whose way all the others lie; None where each needs its own.

    Finding out the way to a commit reads WAL: once is enough.
    """
    first, last = ordered[0], ordered[-1]
    if len(ordered) == 1 or any(one.timeline != last.timeline for one in ordered):
        return None
    return commit_plan(
        repository, last.timeline, last.commit_lsn, since=first.commit_lsn, programs_for=programs_for
    )
