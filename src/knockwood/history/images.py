"""Before and after images: what transactions did to rows, read from one clone of the archive.

The clone stands just before the commit: what the transaction wrote is there but invisible, and the old
versions are still visible. It then replays the commit, and the new versions are what can be seen. Where
the rows lie comes from the WAL, so each is fetched by its place and not searched for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Final, Self

from knockwood.clone.registry import Registry
from knockwood.clone.spawn import spawn
from knockwood.history import ddl
from knockwood.history.completeness import require_whole
from knockwood.history.gathering import Gathering, Unread
from knockwood.history.rowstore import AFTER, BEFORE, RowStore
from knockwood.history.shapes import TableShape, databases_of, open_catalog
from knockwood.history.standing import (
    Position,
    ProgramsFor,
    Spawner,
    Standing,
    commit_plan,
    just_after,
    just_before,
)
from knockwood.history.touched import Decoded, ExclusiveLock, Touched, commits_between
from knockwood.history.transaction import ColumnValue, Kind, RowChange, TableId, Transaction
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.repository.backups.model import Progress
from knockwood.repository.repository import Repository
from knockwood.repository.targets import RestorePlan
from knockwood.repository.walk import workplace

WHOLE_LIMIT: Final = 1_000_000
"""Rows of one truncated or rewritten table that are read."""


@dataclass(slots=True)
class RowChanges:
    """What transactions, taken as one, did to rows. Iterate it as often as needed, until `close`.

    Rows lie in a private file; memory does not grow with them. They come table by table, in the order in
    which they were first touched. `before` and `after` hold the tables' shapes at both points. `ddl` says
    what became of the schema, `unread` whose rows are not given, and why, `notes` what cannot be known.
    A row that ends as it began is no change. As a context manager it is closed at the end.
    """

    transactions: tuple[Transaction, ...]
    before: Mapping[TableId, TableShape]
    after: Mapping[TableId, TableShape]
    ddl: tuple[str, ...]
    unread: tuple[Unread, ...]
    notes: tuple[str, ...]
    _gathered: Gathering
    _store: RowStore
    _resources: ExitStack

    @property
    def complete(self) -> bool:
        """Whether every changed row is given."""
        return not self.unread

    def shape(self, table: TableId) -> TableShape:
        """A table as it was before, or, if it is new, after."""
        return self.before.get(table) or self.after[table]

    def __iter__(self) -> Iterator[RowChange]:
        for before, old, after, new in self._store.changes():
            change = self._change(before, old, after, new)
            if change is not None:
                yield change

    def _change(
        self,
        before: int | None,
        old: list[ColumnValue] | None,
        after: int | None,
        new: list[ColumnValue] | None,
    ) -> RowChange | None:
        left = self._gathered.shape(before, BEFORE) if before is not None else None
        right = self._gathered.shape(after, AFTER) if after is not None else None
        shape = left or right
        assert shape is not None
        was, now = _row(left, old), _row(right, new)
        key_of = was if was is not None else now
        assert key_of is not None
        details: dict[str, object] = {}
        if shape.root is not None:
            details["root"] = shape.root
        if left is not None and right is not None:
            if left.table != right.table:
                details["moved_to"] = right.table
            elif was is not None and now is not None and _equal(was, now):
                return None
        kind: Kind = "insert" if was is None else "delete" if now is None else "update"
        return RowChange(shape.table, kind, {name: key_of[name] for name in shape.key}, was, now, details)

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _row(shape: TableShape | None, values: list[ColumnValue] | None) -> dict[str, ColumnValue] | None:
    if shape is None or values is None:
        return None
    return {column.name: value for column, value in zip(shape.columns, values, strict=True)}


def _equal(was: Mapping[str, ColumnValue], now: Mapping[str, ColumnValue]) -> bool:
    return was.keys() == now.keys() and all(value.same(now[name]) for name, value in was.items())


def row_changes(
    repository: Repository,
    transactions: Sequence[Transaction],
    *,
    table: tuple[str | None, str] | None = None,
    decoded: Decoded | None = None,
    whole_limit: int = WHOLE_LIMIT,
    programs_for: ProgramsFor = find_programs,
    spawner: Spawner | None = None,
    position: Position | None = None,
    onward: RestorePlan | None = None,
    registry: Registry | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> RowChanges:
    """The net row changes of one transaction, or of several that all commits of a range are (taken as one).

    `table` (schema or None, name) leaves out all other tables. `decoded` keeps what was read of the WAL, and its
    limit of rows. `spawner` makes the clones (by default whole,
    throw-away ones); `position` is one to go on with, where it stands before all this, and is not closed;
    `onward` is a plan on whose way the commits lie, from a backup that is consistent before the first.
    Raises RefusedError above that limit, where no backup is from before, or where a transaction may have
    begun before the archive; and what `resolve`, `spawn` and `touched` raise. A clone that is not what the
    WAL says is an InternalError.
    """
    ordered = sorted(transactions, key=lambda transaction: transaction.commit_lsn)
    first, last = ordered[0], ordered[-1]
    plan = (
        just_after(onward, last)
        if onward is not None
        else commit_plan(
            repository, last.timeline, last.commit_lsn, since=first.commit_lsn, programs_for=programs_for
        )
    )
    programs = programs_for(plan.backup.major)
    known = decoded or Decoded(repository)
    require_whole(repository, programs, ordered, plan.chain[-1].start_lsn, known.following)
    found = known.of(programs, ordered)
    groups = _lock_groups(repository, programs, found, first)
    if groups and groups[0][0].lsn < plan.backup.stop_lsn:
        plan = commit_plan(
            repository, last.timeline, last.commit_lsn, since=groups[0][0].lsn, programs_for=programs_for
        )
    make = spawner or whole_clones(repository, programs_for, registry, progress)
    with ExitStack() as stack:
        store = RowStore(stack.enter_context(workplace()) / "rows")
        stack.callback(store.close)
        gathering = Gathering(found, store, whole_limit, table)
        with nullcontext(position) if position is not None else Position(make) as here:
            old = _gather_before(here, gathering, _stops(plan, groups, first), strict=len(ordered) == 1)
            clone = here.go(plan)
            gathering.read_after(clone)
            lines = _schema_changes(gathering, clone, old)
        return RowChanges(
            tuple(ordered),
            {shape.table: shape for shape in gathering.before.values()},
            {shape.table: shape for shape in gathering.after.values()},
            lines,
            tuple(gathering.unread),
            tuple(gathering.notes),
            gathering,
            store,
            stack.pop_all(),
        )


def whole_clones(
    repository: Repository,
    programs_for: ProgramsFor = find_programs,
    registry: Registry | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Spawner:
    """Makes throw-away clones of the whole cluster."""

    def make(plan: RestorePlan) -> Standing:
        programs = programs_for(plan.backup.major)
        return spawn(
            repository, plan, programs=programs, purpose="images", registry=registry, progress=progress
        )

    return make


# --- where the clone stops before the commit ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stop:
    """A point before the commit, and the relations (database, oid) to read there; None: all the rest."""

    plan: RestorePlan
    locked: frozenset[tuple[int, int]] | None


def _stops(plan: RestorePlan, groups: Sequence[Sequence[ExclusiveLock]], first: Transaction) -> list[_Stop]:
    """Where to read: a table that the transaction locks against everybody must be read before it does.

    On a clone that has replayed such a lock nobody can read the table until the commit. Nobody but the
    transaction can have changed it in between either, so what is read before the lock is what was there.
    """
    stops = [
        _Stop(just_before(plan, group[0].lsn), frozenset((lock.database, lock.oid) for lock in group))
        for group in groups
    ]
    return [*stops, _Stop(just_before(plan, first.commit_lsn), None)]


def _lock_groups(
    repository: Repository, programs: Programs, found: Touched, first: Transaction
) -> list[list[ExclusiveLock]]:
    """The locks on what was there before, in order; those with no commit in between share a stop."""
    # A relation's first file has its number: the lock on it is of one that the transaction made.
    made = {number for _, _, number in found.created}
    locks = [lock for lock in found.locks if lock.lsn < first.commit_lsn and lock.oid not in made]
    if not locks:
        return []
    commits = commits_between(repository, programs, first, locks[0].lsn, locks[-1].lsn)
    groups = [[locks[0]]]
    for earlier, later in pairwise(locks):
        if any(earlier.lsn <= commit < later.lsn for commit in commits):
            groups.append([])
        groups[-1].append(later)
    return groups


def _gather_before(
    position: Position, gathering: Gathering, stops: Sequence[_Stop], *, strict: bool
) -> dict[str, ddl.Definitions]:
    """Read the rows before at every stop; the definitions of the first, where nothing is locked yet."""
    definitions: dict[str, ddl.Definitions] = {}
    for number, stop in enumerate(stops):
        clone = position.go(stop.plan)
        gathering.read_before(clone, stop.locked, strict and stop.locked is None)
        if number == 0:
            definitions = _definitions(clone, gathering)
    return definitions


def _definitions(clone: Standing, gathering: Gathering) -> dict[str, ddl.Definitions]:
    """Of the databases whose catalogs were touched."""
    found: dict[str, ddl.Definitions] = {}
    for oid, name in databases_of(clone.dsn(clone.entrance)).items():
        if oid in gathering.catalogs_of:
            with open_catalog(clone.dsn(name), name) as catalog:
                found[name] = ddl.definitions(catalog.connection)
    return found


def _schema_changes(
    gathering: Gathering, clone: Standing, old: Mapping[str, ddl.Definitions]
) -> tuple[str, ...]:
    if not gathering.catalogs:
        return ()
    new = _definitions(clone, gathering)
    lines: list[str] = []
    for database in sorted(old.keys() & new.keys()):
        lines += ddl.differences(old[database], new[database])
    for database in sorted(old.keys() ^ new.keys()):
        lines.append(f"{'dropped' if database in old else 'created'} database {database}")
    return (*lines, *ddl.unexplained(gathering.catalogs))


__all__ = ["RowChanges", "TableShape", "Unread", "row_changes", "whole_clones"]
