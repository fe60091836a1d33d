"""Rows whose key a transaction changed: were they given their old keys back before?

A row is found by its key, so after 1 became 2 the row at 2 is taken for it. Reverted, it is at 1 again, and the
row at 2 may be another that the same revert put back there. Keys passed on form chains (5 became 6, 4 became 5)
and cycles (rows that exchanged theirs); each is judged as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from knockwood.history.transaction import RowChange, TableId
from knockwood.recover.plan.change import row_key
from knockwood.recover.plan.rows import Row, RowKey, TableFacts

State = Literal["moved", "back", "unclear"]
At = Callable[[TableId, Row], Row | None]


def moves(
    changes: Sequence[RowChange], tables: Mapping[TableId, TableFacts], at: At, excluded: Collection[int] = ()
) -> dict[int, State]:
    """For each update that changed its row's key, by position: still `moved`, `back` already, or `unclear`.

    `at` gives the row that has the key of a row now.
    """
    moved: dict[int, RowChange] = {}
    arrived: dict[tuple[TableId, RowKey], int] = {}
    inserted: dict[tuple[TableId, RowKey], RowChange] = {}
    for position, change in enumerate(changes):
        facts = tables[change.table]
        if position in excluded or not facts.key or change.after is None:
            continue
        new = row_key(change.after, facts)
        if change.before is None:
            inserted[change.table, new] = change
        elif new != row_key(change.before, facts):
            moved[position] = change
            arrived[change.table, new] = position
    states: dict[int, State] = {}
    for position in moved:
        if position not in states:
            chain, closed = _chain(position, moved, arrived, tables)
            members = [moved[each] for each in chain]
            last = members[-1]
            taker = inserted.get((last.table, row_key(last.before or {}, tables[last.table])))
            state = _cycle(members, tables, at) if closed else _open(members, taker, tables, at)
            states |= dict.fromkeys(chain, state)
    return states


def _chain(
    start: int,
    moved: Mapping[int, RowChange],
    arrived: Mapping[tuple[TableId, RowKey], int],
    tables: Mapping[TableId, TableFacts],
) -> tuple[list[int], bool]:
    """From a change to the one that took its old key, and so on; whether that leads back to the start.

    The last of an open chain is the one whose old key nobody in the transaction took.
    """
    chain = [start]
    while True:
        change = moved[chain[-1]]
        assert change.before is not None
        following = arrived.get((change.table, row_key(change.before, tables[change.table])))
        if following is None:
            return chain, False
        if following == start:
            return chain, True
        chain.append(following)


def _open(
    members: Sequence[RowChange], inserted: RowChange | None, tables: Mapping[TableId, TableFacts], at: At
) -> State:
    """The old key of the last was left free, or given to a row that the transaction inserted."""
    last = members[-1]
    facts, old = tables[last.table], last.before or {}
    now = at(last.table, old)
    if now is None:
        return "moved"
    if inserted is not None and _equal(now, inserted.after or {}, facts):
        return "moved"
    if _equal(now, old, facts):
        return "back"
    if all(
        _equal(at(each.table, each.after or {}), each.after or {}, tables[each.table]) for each in members
    ):
        return "moved"
    if at(last.table, last.after or {}) is None:
        # Not at its new key: put back and edited since, or gone, and its old key given to another.
        same = all(name in now and now[name].same(old[name]) for name in last.changed)
        return "back" if same else "moved"
    return "unclear"


def _cycle(members: Sequence[RowChange], tables: Mapping[TableId, TableFacts], at: At) -> State:
    """All keys are taken before and after: only the rest of the rows can tell."""
    if all(
        _equal(at(each.table, each.after or {}), each.after or {}, tables[each.table]) for each in members
    ):
        return "moved"
    if all(
        _equal(at(each.table, each.before or {}), each.before or {}, tables[each.table]) for each in members
    ):
        return "back"
    return "unclear"


def _equal(now: Row | None, then: Row, facts: TableFacts) -> bool:
    return now is not None and all(
        name in now and now[name].same(then[name]) for name in facts.columns if name in then
    )
