"""The order of writes: parents first in, children first out; what has no safe order is refused."""

from __future__ import annotations

import pytest

from knockwood.history.transaction import ColumnValue, TableId
from knockwood.recover.plan.order import Refusal, Schedule, schedule
from knockwood.recover.plan.rows import (
    ForeignKey,
    Found,
    Operation,
    OperationKind,
    Schema,
    TableFacts,
    UniqueKey,
)

PARENT, CHILD = TableId("d", "s", "parent"), TableId("d", "s", "child")


def facts(table: TableId, nullable: str = "", **more: tuple[str, ...]) -> TableFacts:
    return TableFacts(table, ("k", "p", "u"), ("k",), nullable=frozenset(nullable), **more)  # type: ignore[arg-type]


def cells(k: int, p: int = 0, u: int = 0) -> dict[str, ColumnValue]:
    return {name: ColumnValue(str(n)) for name, n in zip("kpu", (k, p, u), strict=True)}


def op(
    kind: OperationKind,
    table: TableId,
    old: tuple[int, ...] = (1,),
    new: tuple[int, ...] = (1,),
    columns: str = "",
) -> Operation:
    found = None if kind == "insert" else Found(f"1:({table.name},{old})", 1, cells(*old))
    final = None if kind == "delete" else cells(*new)
    return Operation(kind, table, found, final, tuple(columns) or ("k", "p", "u"))


def key(child: TableId = CHILD, parent: TableId = PARENT, column: str = "p", **more: object) -> ForeignKey:
    return ForeignKey("fk", child, parent, (column,), ("k",), ("=",), **more)  # type: ignore[arg-type]


def schema(*foreign: ForeignKey, unique: tuple[UniqueKey, ...] = (), **tables: TableFacts) -> Schema:
    known = {PARENT: facts(PARENT), CHILD: facts(CHILD)}
    return Schema(known | {each.table: each for each in tables.values()}, foreign, unique)


def order(found: Schedule | Refusal) -> list[tuple[str, str]]:
    assert isinstance(found, Schedule), found
    return [(phase.kind, phase.table.name) for phase in found.phases]


def test_parents_go_in_first_and_children_out_first() -> None:
    both = [op("insert", CHILD), op("insert", PARENT), op("delete", PARENT, (2,)), op("delete", CHILD, (2,))]
    found = order(schedule(both, schema(key()), replica_allowed=False))
    assert found.index(("insert", "parent")) < found.index(("insert", "child"))
    assert found.index(("delete", "child")) < found.index(("delete", "parent"))


def test_a_child_lets_go_before_its_parent_is_deleted_and_takes_one_that_is_there() -> None:
    moves = [
        op("set", CHILD, (1, 2), (1, 3), "p"),
        op("delete", PARENT, (2,)),
        op("insert", PARENT, new=(3,)),
    ]
    assert order(schedule(moves, schema(key()), replica_allowed=False)) == [
        ("insert", "parent"),
        ("set", "child"),
        ("delete", "parent"),
    ]


@pytest.mark.parametrize("kind", ["insert", "delete"])
def test_a_cycle_is_broken_by_null(kind: OperationKind) -> None:
    there, back = key(), key(PARENT, CHILD)
    both = [op(kind, PARENT), op(kind, CHILD)]
    found = schedule(both, schema(there, back, a=facts(CHILD, "p")), replica_allowed=False)
    assert isinstance(found, Schedule)
    if kind == "insert":
        assert order(found) == [("insert", "child"), ("insert", "parent"), ("fill", "child")]
        assert found.withheld == {(CHILD, ("p",))}
    else:
        assert order(found) == [("null", "child"), ("delete", "parent"), ("delete", "child")]


def test_a_cycle_is_broken_by_deferring() -> None:
    found = schedule(
        [op("insert", PARENT), op("insert", CHILD)],
        schema(key(deferrable=True), key(PARENT, CHILD)),
        replica_allowed=False,
    )
    assert order(found) == [("insert", "child"), ("insert", "parent")]
    assert isinstance(found, Schedule)
    assert found.deferred == ((CHILD, "fk"),)


def test_a_cycle_that_nothing_breaks_needs_the_role_or_is_refused() -> None:
    both = [op("insert", PARENT), op("insert", CHILD)]
    rigid = schema(key(), key(PARENT, CHILD))
    found = schedule(both, rigid, replica_allowed=False)
    assert isinstance(found, Refusal)
    assert "cycle" in found.reasons[0]
    assert "session_replication_role" in found.reasons[1]
    allowed = schedule(both, rigid, replica_allowed=True)
    assert isinstance(allowed, Schedule)
    assert allowed.replica


def test_triggers_ask_for_the_role_unless_they_act_even_then() -> None:
    found = schedule([op("set", CHILD)], schema(a=facts(CHILD, writers=("trigger x",))), replica_allowed=True)
    assert isinstance(found, Schedule)
    assert found.replica
    assert found.reasons == ("trigger x on s.child would act a second time",)
    always = facts(CHILD, writers=("trigger x",), always=("trigger x",))
    assert isinstance(schedule([op("set", CHILD)], schema(a=always), replica_allowed=True), Refusal)


def unique(**more: object) -> UniqueKey:
    return UniqueKey("u_key", CHILD, ("u",), ("=",), **more)  # type: ignore[arg-type]


SWAP = [op("set", CHILD, (1, 0, 5), (1, 0, 6), "u"), op("set", CHILD, (2, 0, 6), (2, 0, 5), "u")]


def test_unique_values_that_change_hands() -> None:
    deferred = schedule(SWAP, schema(unique=(unique(deferrable=True),)), replica_allowed=False)
    assert isinstance(deferred, Schedule)
    assert deferred.deferred == ((CHILD, "u_key"),)
    parked = schedule(SWAP, schema(a=facts(CHILD, "u"), unique=(unique(),)), replica_allowed=False)
    assert order(parked) == [("null", "child"), ("set", "child")]
    again = schedule(SWAP, schema(unique=(unique(),)), replica_allowed=False)
    assert isinstance(again, Schedule)
    assert again.recreated == {CHILD}
    referenced = schedule(SWAP, schema(key(PARENT, CHILD), unique=(unique(),)), replica_allowed=False)
    assert isinstance(referenced, Refusal)
    role = schedule(SWAP, schema(key(PARENT, CHILD), unique=(unique(),)), replica_allowed=True)
    assert isinstance(role, Schedule)
    assert role.replica
    assert role.recreated == {CHILD}


def test_a_value_is_given_up_before_it_is_taken() -> None:
    moves = [op("insert", CHILD, new=(9, 0, 5)), op("delete", CHILD, (1, 0, 5))]
    assert order(schedule(moves, schema(unique=(unique(),)), replica_allowed=False)) == [
        ("delete", "child"),
        ("insert", "child"),
    ]


def test_deferrable_unique_constraints_are_not_enforced_under_the_role() -> None:
    found = schedule(
        SWAP,
        schema(a=facts(CHILD, writers=("trigger x",)), unique=(unique(deferrable=True),)),
        replica_allowed=True,
    )
    assert isinstance(found, Refusal)
    assert "u_key" in found.reasons[-1]
