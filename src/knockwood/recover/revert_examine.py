"""Hold what transactions wrote against the rows of now: what would be done, and what stands against it."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from knockwood.errors import RefusedError
from knockwood.history.transaction import TableId
from knockwood.postgres.connection import Connection, translated
from knockwood.recover.plan.merge import merge, normalised, wanted_keys
from knockwood.recover.plan.order import Refusal, Schedule, schedule
from knockwood.recover.plan.rows import (
    ChangeId,
    Conflict,
    Culprit,
    Current,
    Merge,
    Mode,
    Operation,
    OperationKind,
    TableFacts,
)
from knockwood.recover.revert_catalog import Catalog, may_take_replica_role, read_catalog
from knockwood.recover.revert_keys import key_conflicts
from knockwood.recover.revert_rows import Wanted, ordered, read_current, require_images


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be reverted: transactions of one database, the newest first.

    `counters` are columns, as `table.column` or `schema.table.column`, whose numbers only ever add up.
    """

    culprits: tuple[Culprit, ...]
    mode: Mode = Mode.STRICT
    counters: tuple[str, ...] = ()

    @property
    def database(self) -> str:
        """The one database; raises RefusedError for several, or where nothing was changed."""
        names = sorted({change.table.database for culprit in self.culprits for change in culprit.changes})
        if len(names) != 1:
            raise RefusedError(
                f"the transactions changed rows in {' and '.join(names)}" if names else "no row was changed",
                hint="revert those of one database at a time" if names else None,
            )
        return names[0]


@dataclass(frozen=True, slots=True)
class Examined:
    """The outcome. `conflicts` refuse the whole; `waived` are those that the mode passes over: rows left as
    they are (skip-conflicts), or later edits given up (force). `order` is None where nothing is to be done."""

    catalog: Catalog
    wanted: Wanted
    current: Current
    merged: Merge
    conflicts: tuple[Conflict, ...] = ()
    waived: tuple[Conflict, ...] = ()
    order: Schedule | Refusal | None = None
    culprits: tuple[Culprit, ...] = ()

    @property
    def operations(self) -> tuple[Operation, ...]:
        return self.merged.operations

    def of(self, kind: OperationKind, table: TableId) -> list[Operation]:
        return [each for each in self.operations if each.kind == kind and each.table == table]

    @property
    def counts(self) -> dict[TableId, dict[str, int]]:
        """Rows set, inserted, deleted, by table."""
        found: dict[TableId, dict[str, int]] = {}
        for each in self.operations:
            counts = found.setdefault(each.table, {"set": 0, "insert": 0, "delete": 0})
            counts[each.kind] += 1
        return dict(sorted(found.items()))

    @property
    def digest(self) -> str:
        """A hash over every row and column that would be written: later good work beside it leaves it alone."""
        lines = [line_of(each, self.catalog.tables[each.table].facts) for each in self.operations]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def line_of(operation: Operation, facts: TableFacts) -> str:
    """What an operation would write, as text."""
    final = operation.final or {}
    values = {name: final[name].text for name in operation.columns}
    values |= {name: f"+ {delta}" for name, delta in operation.deltas.items()}
    return json.dumps(
        [str(operation.table), operation.kind, operation.key(facts.key), values], sort_keys=True
    )


def examine(connection: Connection, request: Request) -> Examined:
    """Read the rows of now and decide about each change; the session must be pinned.

    Inside a read-only snapshot this foresees; under row locks it decides. Raises RefusedError where a table is
    gone or a value could not be written back as it was.
    """
    with translated():
        catalog = read_catalog(
            connection, {change.table for each in request.culprits for change in each.changes}
        )
        culprits = tuple(_placed(culprit, catalog) for culprit in request.culprits)
        facts = catalog.schema.tables
        wanted = ordered(wanted_keys(culprits, facts))
        current = read_current(connection, catalog, wanted)
        counters = counted(request.counters, facts)
        work = _Examination(connection, catalog, culprits, current, counters, request.mode)
        merged, conflicts, waived = work.decide()
        order = None
        if merged.operations:
            require_final_images(connection, catalog, merged.operations)
            order = schedule(
                merged.operations, catalog.schema, replica_allowed=may_take_replica_role(connection)
            )
    return Examined(catalog, wanted, current, merged, conflicts, waived, order, culprits)


@dataclass(slots=True)
class _Examination:
    connection: Connection
    catalog: Catalog
    culprits: Sequence[Culprit]
    current: Current
    counters: Mapping[TableId, frozenset[str]]
    mode: Mode
    excluded: set[ChangeId] = field(default_factory=set)

    def decide(self) -> tuple[Merge, tuple[Conflict, ...], tuple[Conflict, ...]]:
        """The merge, the conflicts that refuse it, and those passed over."""
        waived: list[Conflict] = []
        if self.mode is Mode.FORCE:
            waived += self._merge(force=False).conflicts
        while True:
            merged = self._merge(force=self.mode is Mode.FORCE)
            against = [
                *merged.conflicts,
                *key_conflicts(self.connection, self.catalog, merged.operations),
            ]
            fresh = {change for conflict in against for change in conflict.changes} - self.excluded
            if self.mode is not Mode.SKIP or not against or not fresh:
                break
            # What is left out may leave others without what they lean on: again, until nothing is new.
            self.excluded |= fresh
            waived += against
        if self.mode is Mode.FORCE:
            keys = {(conflict.kind, conflict.changes) for conflict in against}
            waived = [each for each in waived if (each.kind, each.changes) not in keys]
        return merged, tuple(against), tuple(waived)

    def _merge(self, force: bool) -> Merge:
        return merge(
            self.culprits,
            self.current,
            self.catalog.schema.tables,
            counters=self.counters,
            force=force,
            excluded=self.excluded,
        )


def _placed(culprit: Culprit, catalog: Catalog) -> Culprit:
    """The changes of partitions as changes of the table they belong to; a row that moved is one update."""
    roots = catalog.roots
    changes = tuple(
        change if roots[change.table] == change.table else replace(change, table=roots[change.table])
        for change in culprit.changes
    )
    return normalised(replace(culprit, changes=changes), catalog.schema.tables)


def counted(names: Sequence[str], tables: Mapping[TableId, TableFacts]) -> dict[TableId, frozenset[str]]:
    """The counters of each table; raises RefusedError for one that no table touched has."""
    found: dict[TableId, set[str]] = defaultdict(set)
    for name in names:
        path, _, column = name.rpartition(".")
        schema, _, table = path.rpartition(".")
        matching = [
            each
            for each, facts in tables.items()
            if each.name == table and schema in ("", each.schema) and column in facts.columns
        ]
        if not matching:
            raise RefusedError(
                f"no table that the transactions touched has a column {name}",
                hint="write --counter TABLE.COLUMN",
            )
        for each in matching:
            found[each].add(column)
    return {table: frozenset(columns) for table, columns in found.items()}


def require_final_images(connection: Connection, catalog: Catalog, operations: Sequence[Operation]) -> None:
    """Raise RefusedError unless the server reads every value to be written back as it was."""
    groups: dict[tuple[TableId, tuple[str, ...]], list[Operation]] = defaultdict(list)
    for each in operations:
        if each.kind != "delete":
            groups[each.table, each.columns].append(each)
    for (table, columns), group in groups.items():
        require_images(connection, catalog.tables[table], columns, [each.final or {} for each in group])
