"""A few rows changed between the examination and their lock: only these are decided anew, under the lock.

Others wait for the rows meanwhile, so what was decided about the rest is kept: it was held against the plan, and
the rest has not changed. Where the rows that changed would not be written as approved nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from knockwood.history.transaction import RowChange, TableId
from knockwood.postgres.connection import Connection
from knockwood.recover.plan.change import row_key
from knockwood.recover.plan.merge import merge
from knockwood.recover.plan.order import Schedule, schedule
from knockwood.recover.plan.rows import ChangeId, Culprit, Current, Mode, Operation, RowKey, TableFacts
from knockwood.recover.revert_catalog import may_take_replica_role
from knockwood.recover.revert_examine import Examined, Request, counted, line_of, require_final_images
from knockwood.recover.revert_keys import key_conflicts
from knockwood.recover.revert_rows import Version, Wanted, lock, read_current

Keys = Mapping[TableId, Collection[RowKey]]
Versions = Mapping[TableId, Mapping[RowKey, Sequence[Version]]]


@dataclass(frozen=True, slots=True)
class Again:
    """An examination brought up to date, and which of its operations are not the ones before."""

    examined: Examined
    positions: tuple[int, ...]


def changed_keys(current: Current, versions: Versions) -> dict[TableId, set[RowKey]]:
    """The keys at which other versions lie now than in `current`."""
    found: dict[TableId, set[RowKey]] = {}
    for table in {*current.rows, *versions}:
        then, now = current.rows.get(table, {}), versions.get(table, {})
        differ = {
            key
            for key in {*then, *now}
            if {(row.place, row.xmin) for row in then.get(key, ())} != set(now.get(key, ()))
        }
        if differ:
            found[table] = differ
    return found


def decide_again(connection: Connection, request: Request, examined: Examined, changed: Keys) -> Again | None:
    """Decide about the changed rows alone, and lock them; None where all has to be looked at again.

    That is so for modes that pass over conflicts, for tables without a key, and wherever anything but the rows
    as found would be other than before: then nobody may go on by what was examined.
    """
    tables = examined.catalog.schema.tables
    if request.mode in (Mode.SKIP, Mode.FORCE) or not all(tables[table].key for table in changed):
        return None
    chosen, keys = _connected(examined.culprits, tables, changed)
    rows = read_current(connection, examined.catalog, _wanted(examined, keys))
    merged = merge(
        examined.culprits,
        rows,
        tables,
        counters=counted(request.counters, tables),
        excluded={
            (culprit.xid, position)
            for culprit in examined.culprits
            for position in range(len(culprit.changes))
        }
        - chosen,
    )
    replaced = _replaced(examined, merged.operations, chosen)
    if merged.conflicts or replaced is None:
        return None
    if key_conflicts(connection, examined.catalog, merged.operations):
        return None
    require_final_images(connection, examined.catalog, merged.operations)
    for table in changed:
        lock(connection, examined.catalog.tables[table], [e for e in merged.operations if e.table == table])
    operations = tuple(replaced.get(n, each) for n, each in enumerate(examined.operations))
    order = schedule(operations, examined.catalog.schema, replica_allowed=may_take_replica_role(connection))
    if not isinstance(order, Schedule):
        return None
    current = Current(
        {
            table: {key: each for key, each in found.items() if key not in keys.get(table, ())}
            | dict(rows.rows.get(table, {}))
            for table, found in examined.current.rows.items()
        }
    )
    fresh = replace(
        examined, current=current, merged=replace(examined.merged, operations=operations), order=order
    )
    return Again(fresh, tuple(sorted(replaced)))


def _connected(
    culprits: Sequence[Culprit], tables: Mapping[TableId, TableFacts], changed: Keys
) -> tuple[set[ChangeId], dict[TableId, set[RowKey]]]:
    """The changes that the rows at these keys hang together by, and all keys that they name."""
    keys = {table: set(each) for table, each in changed.items()}
    named = {
        (culprit.xid, position): (change.table, _keys_of(change, tables))
        for culprit in culprits
        for position, change in enumerate(culprit.changes)
        if change.table in changed
    }
    chosen: set[ChangeId] = set()
    while True:
        more = {change for change, (table, own) in named.items() if not own.isdisjoint(keys[table])} - chosen
        if not more:
            return chosen, keys
        chosen |= more
        for table, own in (named[change] for change in more):
            keys[table] |= own


def _keys_of(change: RowChange, tables: Mapping[TableId, TableFacts]) -> set[RowKey]:
    facts = tables[change.table]
    return {row_key(row, facts) for row in (change.before, change.after) if row is not None}


def _wanted(examined: Examined, keys: Keys) -> Wanted:
    """Of what was looked for, the rows at these keys, in the same order."""
    return {
        table: {key: row for key, row in rows.items() if key in keys.get(table, ())}
        for table, rows in examined.wanted.items()
        if table in keys
    }


def _replaced(
    examined: Examined, fresh: Sequence[Operation], chosen: set[ChangeId]
) -> dict[int, Operation] | None:
    """The operations that take the place of those at these positions; None unless they write the very same."""
    tables = examined.catalog.tables
    before = {
        each.changes: (position, line_of(each, tables[each.table].facts))
        for position, each in enumerate(examined.operations)
        if not chosen.isdisjoint(each.changes)
    }
    if len(before) != len(fresh):
        return None
    found: dict[int, Operation] = {}
    for each in fresh:
        position, line = before.get(each.changes, (-1, ""))
        if position < 0 or line != line_of(each, tables[each.table].facts):
            return None
        found[position] = each
    return found if len(found) == len(fresh) else None
