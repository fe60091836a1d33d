"""In which order the rows go in and out, so that no constraint stands in the way of a state that satisfies all.

Natively (the server's own triggers fire and check) parents go in before children and children out before
parents; cycles are broken by deferring a constraint or by writing NULL first. Where the user's triggers would
act a second time, or no such order exists, the rows are written under the replication role, which needs no
order among tables; then whoever executes checks the foreign keys. What neither can do is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from knockwood.history.transaction import TableId
from knockwood.recover.plan.rows import Cell, ForeignKey, Operation, OperationKind, Schema, UniqueKey, cell

_NO_ROLE: Final = (
    "the role may not set session_replication_role (GRANT SET ON PARAMETER session_replication_role TO it)"
)

PhaseKind = Literal["insert", "set", "delete", "null", "fill"]


@dataclass(frozen=True, slots=True)
class Phase:
    """One kind of operation on one table, all rows at once.

    `null` writes NULL into `columns` of the rows that will be set or deleted (`of` says which), so that they
    let go of what they hold; `fill` gives inserted rows the `columns` that were left NULL at first.
    """

    kind: PhaseKind
    table: TableId
    columns: tuple[str, ...] = ()
    of: OperationKind | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """The phases in their order. `deferred` are constraints to defer (table, name), `replica` that the
    replication role is needed, for `reasons`; `recreated` are tables whose set rows are deleted and inserted
    again, because unique values change hands; `withheld` are columns that `insert` leaves NULL."""

    phases: tuple[Phase, ...]
    replica: bool = False
    reasons: tuple[str, ...] = ()
    deferred: tuple[tuple[TableId, str], ...] = ()
    recreated: frozenset[TableId] = frozenset()
    withheld: frozenset[tuple[TableId, tuple[str, ...]]] = frozenset()


@dataclass(frozen=True, slots=True)
class Refusal:
    """No safe order, and why."""

    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, order=True)
class _Node:
    kind: OperationKind
    table: TableId


@dataclass(slots=True)
class _Draft:
    nodes: set[_Node]
    after: dict[_Node, set[tuple[_Node, ForeignKey | None]]] = field(default_factory=lambda: defaultdict(set))
    reasons: list[str] = field(default_factory=list)
    deferred: set[tuple[TableId, str]] = field(default_factory=set)
    recreated: set[TableId] = field(default_factory=set)
    parked: list[Phase] = field(default_factory=list)
    withheld: set[tuple[TableId, tuple[str, ...]]] = field(default_factory=set)

    def edge(self, first: _Node, then: _Node, key: ForeignKey | None = None) -> None:
        if first in self.nodes and then in self.nodes and first != then:
            self.after[then].add((first, key))


def schedule(operations: Sequence[Operation], schema: Schema, *, replica_allowed: bool) -> Schedule | Refusal:
    """Order the operations; natively where that works, else under the replication role if it may be taken."""
    native = _native(operations, schema)
    if isinstance(native, Schedule):
        return native
    against = _against_replica(operations, schema)
    if not replica_allowed:
        against = (_NO_ROLE, *against)
    if against:
        return Refusal((*native.reasons, *against))
    return _replica(operations, schema, native.reasons)


def _native(operations: Sequence[Operation], schema: Schema) -> Schedule | Refusal:
    draft = _Draft({_Node(operation.kind, operation.table) for operation in operations})
    touched = {operation.table for operation in operations}
    for table in sorted(touched):
        for writer in schema.tables[table].writers:
            draft.reasons.append(f"{writer} on {table} would act a second time")
    for unique in schema.unique:
        if unique.table in touched:
            _uniques(draft, operations, schema, unique)
    for key in schema.foreign:
        if key.child in touched and key.parent in touched:
            _foreign(draft, operations, key)
    order = _sorted(draft, schema) if not draft.reasons else None
    if order is None:
        return Refusal(tuple(draft.reasons))
    return Schedule(
        tuple(order),
        deferred=tuple(sorted(draft.deferred)),
        recreated=frozenset(draft.recreated),
        withheld=frozenset(draft.withheld),
    )


def _uniques(draft: _Draft, operations: Sequence[Operation], schema: Schema, unique: UniqueKey) -> None:
    """What one row gives up before another takes it."""
    hands = _changing_hands(operations, unique)
    if not hands:
        return
    if unique.deferrable:
        draft.deferred.add((unique.table, unique.name))
        return
    for giver, taker in hands - {("set", "set")}:
        draft.edge(_Node(giver, unique.table), _Node(taker, unique.table))
    if ("set", "set") in hands:
        phase = _parking(operations, schema, unique)
        if phase is not None:
            draft.parked.append(phase)
        elif any(key.parent == unique.table for key in schema.foreign):
            draft.reasons.append(
                f"rows of {unique.table} exchange values of {unique.name}, which is neither deferrable nor nullable,"
                " and other tables reference it"
            )
        else:
            draft.recreated.add(unique.table)
            draft.nodes |= {_Node("delete", unique.table), _Node("insert", unique.table)}
            draft.edge(_Node("delete", unique.table), _Node("insert", unique.table))


def _parking(operations: Sequence[Operation], schema: Schema, unique: UniqueKey) -> Phase | None:
    """Write NULL first into a column of the index, where one may be NULL and NULLs are not equal."""
    facts = schema.tables[unique.table]
    sets = [each for each in operations if each.kind == "set" and each.table == unique.table]
    moved = [each for each in sets if set(each.columns) & set(unique.columns)]
    for name in unique.columns:
        free = name in facts.nullable and name not in facts.key and facts.key
        if free and not unique.nulls and all(name in each.columns for each in moved):
            return Phase("null", unique.table, (name,), "set")
    return None


def _changing_hands(
    operations: Sequence[Operation], unique: UniqueKey
) -> set[tuple[OperationKind, OperationKind]]:
    """Which kinds of operation give up a value of the index that which kinds take, on different rows."""
    held: dict[tuple[Cell, ...], Operation] = {}
    mine = [each for each in operations if each.table == unique.table]
    for each in mine:
        if each.found is not None and (old := _values(each.found.values, unique)) is not None:
            held[old] = each
    hands: set[tuple[OperationKind, OperationKind]] = set()
    for each in mine:
        new = _values(each.final, unique) if each.final is not None else None
        giver = held.get(new) if new is not None else None
        if giver is not None and giver is not each:
            hands.add((giver.kind, each.kind))
    return hands


def _values(row: object, unique: UniqueKey) -> tuple[Cell, ...] | None:
    assert hasattr(row, "__getitem__")
    cells = tuple(cell(row[name]) for name in unique.columns)
    return None if None in cells and not unique.nulls else cells


def _foreign(draft: _Draft, operations: Sequence[Operation], key: ForeignKey) -> None:
    insert_child, insert_parent = _Node("insert", key.child), _Node("insert", key.parent)
    delete_child, delete_parent = _Node("delete", key.child), _Node("delete", key.parent)
    set_child, set_parent = _Node("set", key.child), _Node("set", key.parent)
    moves_child = _sets(operations, key.child, key.columns)
    moves_parent = _sets(operations, key.parent, key.referenced)
    if key.deferrable:
        draft.deferred.add((key.child, key.name))
        if key.on_update == "a" and key.on_delete == "a":
            return
    if not key.deferrable:
        draft.edge(insert_parent, insert_child, key)
        if moves_child:
            draft.edge(insert_parent, set_child)
    draft.edge(delete_child, delete_parent, key)
    if moves_child:
        draft.edge(set_child, delete_parent)
    if moves_parent and moves_child:
        draft.reasons.append(
            f"keys of {key.parent} change together with the rows of {key.child} that reference them ({key.name})"
        )
    elif moves_parent:
        draft.edge(set_parent, insert_child)
        draft.edge(delete_child, set_parent)


def _sets(operations: Iterable[Operation], table: TableId, columns: tuple[str, ...]) -> bool:
    return any(
        each.kind == "set" and each.table == table and set(each.columns) & set(columns) for each in operations
    )


def _sorted(draft: _Draft, schema: Schema) -> list[Phase] | None:
    """A topological order of the nodes; cycles are broken where a referencing column may be NULL for a while."""
    fills: list[Phase] = []
    nulls = list(draft.parked)
    waiting = set(draft.nodes)
    order: list[Phase] = []
    while waiting:
        ready = sorted(
            node for node in waiting if not any(first in waiting for first, _ in draft.after.get(node, ()))
        )
        if not ready:
            if not _broken(draft, waiting, schema, nulls, fills):
                tables = ", ".join(sorted({str(node.table) for node in waiting}))
                draft.reasons.append(f"the foreign keys among {tables} form a cycle that cannot be broken")
                return None
            continue
        order += [Phase(node.kind, node.table) for node in ready]
        waiting -= set(ready)
    return [*nulls, *order, *fills]


def _broken(
    draft: _Draft, waiting: set[_Node], schema: Schema, nulls: list[Phase], fills: list[Phase]
) -> bool:
    """Take one foreign key's edge out of a cycle by writing its columns in two steps."""
    for node in sorted(waiting):
        for first, key in sorted(draft.after.get(node, ()), key=lambda edge: edge[0]):
            if first not in waiting or key is None or not _may_be_null(key, schema):
                continue
            draft.after[node].discard((first, key))
            if node.kind == "insert":
                draft.withheld.add((key.child, key.columns))
                fills.append(Phase("fill", key.child, key.columns))
            else:
                nulls.append(Phase("null", key.child, key.columns, "delete"))
            return True
    return False


def _may_be_null(key: ForeignKey, schema: Schema) -> bool:
    facts = schema.tables[key.child]
    return bool(facts.key) and set(key.columns) <= facts.nullable - set(facts.key)


def _against_replica(operations: Sequence[Operation], schema: Schema) -> tuple[str, ...]:
    """Why the replication role would not be safe: what it skips and nobody else would check."""
    touched = {operation.table for operation in operations}
    reasons = [
        f"{name} on {table} acts even then"
        for table in sorted(touched)
        for name in schema.tables[table].always
    ]
    for unique in schema.unique:
        written = any(
            each.table == unique.table and (each.kind == "insert" or set(each.columns) & set(unique.columns))
            for each in operations
            if each.kind != "delete"
        )
        if unique.deferrable and written:
            reasons.append(f"the deferrable constraint {unique.name} on {unique.table} is not enforced then")
    reasons += [
        f"{key.name} on {key.child} has a PERIOD, which only its own triggers check"
        for key in schema.foreign
        if key.period and touched & {key.child, key.parent}
    ]
    return tuple(reasons)


def _replica(operations: Sequence[Operation], schema: Schema, reasons: tuple[str, ...]) -> Schedule:
    """No order among tables is needed: whatever holds a unique value lets go first."""
    nulls = []
    recreated = set()
    for unique in schema.unique:
        if ("set", "set") in _changing_hands(operations, unique):
            phase = _parking(operations, schema, unique)
            if phase is not None:
                nulls.append(phase)
            else:
                recreated.add(unique.table)
    nodes = {_Node(operation.kind, operation.table) for operation in operations}
    nodes |= {_Node("delete", table) for table in recreated} | {_Node("insert", table) for table in recreated}
    kinds: tuple[OperationKind, ...] = ("delete", "set", "insert")
    order = [Phase(kind, node.table) for kind in kinds for node in sorted(nodes) if node.kind == kind]
    return Schedule((*nulls, *order), replica=True, reasons=reasons, recreated=frozenset(recreated))
