"""The three-way merge: nothing lost, nothing invented, nothing touched that the culprit did not touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knockwood.history.transaction import ColumnValue, RowChange, TableId
from knockwood.recover.plan.change import adjusted, decide
from knockwood.recover.plan.merge import merge, normalised, wanted_keys
from knockwood.recover.plan.rows import (
    Conflict,
    ConflictKind,
    Culprit,
    Current,
    Found,
    Merge,
    Row,
    RowKey,
    TableFacts,
)

TABLE = TableId("d", "public", "t")
COLUMNS = ("k", "a", "b", "c")
KEYED = TableFacts(TABLE, COLUMNS, ("k",), nullable=frozenset("abc"))
KEYLESS = TableFacts(TABLE, COLUMNS)


def value(content: int | None) -> ColumnValue:
    return (
        ColumnValue(None)
        if content is None
        else ColumnValue(str(content), content.to_bytes(4, "big", signed=True))
    )


def row(*contents: int | None) -> dict[str, ColumnValue]:
    return dict(zip(COLUMNS, map(value, contents), strict=True))


def plain(values: Row) -> tuple[int | None, ...]:
    return tuple(None if values[name].text is None else int(str(values[name].text)) for name in COLUMNS)


def update(before: dict[str, ColumnValue], after: dict[str, ColumnValue]) -> RowChange:
    return RowChange(TABLE, "update", {"k": before["k"]}, before, after)


def insert(after: dict[str, ColumnValue]) -> RowChange:
    return RowChange(TABLE, "insert", {"k": after["k"]}, None, after)


def delete(before: dict[str, ColumnValue]) -> RowChange:
    return RowChange(TABLE, "delete", {"k": before["k"]}, before, None)


@dataclass
class World:
    """A table in memory. Places are numbers, never reused; every write makes a new version."""

    facts: TableFacts = KEYED
    rows: dict[int, tuple[int | None, ...]] = field(default_factory=dict)
    place: int = 0

    def add(self, *contents: int | None) -> int:
        self.place += 1
        self.rows[self.place] = contents
        return self.place

    def contents(self) -> list[tuple[int | None, ...]]:
        return sorted(self.rows.values(), key=str)

    def current(self, wanted: Mapping[TableId, Mapping[RowKey, Row]]) -> Current:
        names = self.facts.key or COLUMNS
        found: dict[RowKey, list[Found]] = {}
        for key in wanted.get(TABLE, {}):
            for place, contents in self.rows.items():
                cells = row(*contents)
                if tuple(cells[name].image for name in names) == key:
                    found.setdefault(key, []).append(Found(str(place), place, cells))
        return Current({TABLE: {key: tuple(rows) for key, rows in found.items()}})

    def merge(self, *culprits: Culprit, force: bool = False, counters: Sequence[str] = ()) -> Merge:
        tables = {TABLE: self.facts}
        whole = [normalised(culprit, tables) for culprit in culprits]
        current = self.current(wanted_keys(whole, tables))
        return merge(whole, current, tables, force=force, counters={TABLE: frozenset(counters)})

    def apply(self, merged: Merge) -> None:
        for each in merged.operations:
            if each.found is not None:
                del self.rows[int(each.found.place)]
        for each in merged.operations:
            if each.final is not None:
                self.add(*plain(each.final))


contents = st.integers(0, 3) | st.none()


@st.composite
def histories(
    draw: st.DrawFn, transactions: int = 1, facts: TableFacts = KEYED
) -> tuple[World, list[Culprit]]:
    """A table, and transactions that ran on it one after another; keys may be given up and taken again."""
    world = World(facts)
    for k in draw(st.sets(st.integers(0, 5))):
        world.add(k, draw(contents), draw(contents), draw(contents))
    culprits = []
    for number in range(transactions):
        start = dict(world.rows)
        origin = {place: place for place in start}
        for _ in range(draw(st.integers(1, 5))):
            _act(draw, world, origin)
        changes = []
        for place, was in start.items():
            now = next((world.rows[p] for p, o in origin.items() if o == place and p in world.rows), None)
            if now is None:
                changes.append(delete(row(*was)))
            elif now != was:
                changes.append(update(row(*was), row(*now)))
        changes += [insert(row(*now)) for place, now in world.rows.items() if origin.get(place) is None]
        culprits.append(Culprit(100 + number, tuple(changes)))
    return world, culprits


def _act(draw: st.DrawFn, world: World, origin: dict[int, int]) -> None:
    used = {contents[0] for contents in world.rows.values()}
    free = [k for k in range(8) if k not in used]
    choice = draw(st.sampled_from(("insert", "update", "update", "delete", "key")))
    if choice == "insert" and free:
        world.add(draw(st.sampled_from(free)), draw(contents), draw(contents), draw(contents))
    elif world.rows:
        place = draw(st.sampled_from(sorted(world.rows)))
        old = list(world.rows.pop(place))
        if choice == "update":
            old[draw(st.integers(1, 3))] = draw(contents)
        elif choice == "key" and free:
            old[0] = draw(st.sampled_from(free))
        if choice != "delete":
            new = world.add(*old)
            if place in origin:
                origin[new] = origin.pop(place)


@given(histories(3))
def test_all_transactions_taken_back_leave_what_was_before(history: tuple[World, list[Culprit]]) -> None:
    world, culprits = history
    before = World()
    # The state before is what remains when each transaction is undone by hand, the newest first.
    state = {contents[0]: contents for contents in world.rows.values()}
    for culprit in reversed(culprits):
        for change in culprit.changes:
            if change.after:
                state.pop(plain(change.after)[0], None)
        for change in culprit.changes:
            if change.before:
                state[plain(change.before)[0]] = plain(change.before)
    for contents in state.values():
        before.add(*contents)
    merged = world.merge(*reversed(culprits))
    assert merged.conflicts == ()
    world.apply(merged)
    assert world.contents() == before.contents()


@given(histories())
def test_a_second_revert_finds_nothing_to_do(history: tuple[World, list[Culprit]]) -> None:
    world, [culprit] = history
    world.apply(world.merge(culprit))
    again = world.merge(culprit)
    assert again.operations == ()
    assert again.conflicts == ()


@given(histories(), st.integers(0, 30))
def test_disjoint_edits_are_kept(history: tuple[World, list[Culprit]], seed: int) -> None:
    world, [culprit] = history
    edits = {}
    for change in culprit.changes:
        if change.kind != "update" or change.after is None:
            continue
        others = [name for name in COLUMNS[1:] if name not in change.changed]
        if others:
            name = others[seed % len(others)]
            [place] = [p for p, contents in world.rows.items() if contents == plain(change.after)][:1]
            edited = list(world.rows.pop(place))
            edited[COLUMNS.index(name)] = 77
            world.add(*edited)
            assert change.before is not None
            edits[plain(change.before)[0]] = COLUMNS.index(name)
    merged = world.merge(culprit)
    assert merged.conflicts == ()
    world.apply(merged)
    by_key = {contents[0]: contents for contents in world.rows.values()}
    for key, column in edits.items():
        assert by_key[key][column] == 77


@given(histories(), histories(), st.booleans())
def test_no_column_is_touched_that_the_culprit_did_not_change(
    history: tuple[World, list[Culprit]], other: tuple[World, list[Culprit]], force: bool
) -> None:
    _, [culprit] = history
    world, _ = other  # rows that have nothing to do with it: the worst a later transaction could leave
    changed = {name for change in culprit.changes for name in change.changed if change.kind == "update"}
    forced = any(change.kind == "delete" for change in culprit.changes) and force
    for each in world.merge(culprit, force=force).operations:
        if each.kind == "set" and not forced:
            assert set(each.columns) <= changed
            assert each.final is not None
            assert each.found is not None
            for name in COLUMNS:
                if name not in changed:
                    assert each.final[name] == each.found.values[name]


@given(histories(1, KEYLESS))
def test_without_a_key_rows_are_found_whole(history: tuple[World, list[Culprit]]) -> None:
    world, [culprit] = history
    merged = world.merge(culprit)
    if merged.conflicts:
        # Only what cannot be told apart stands against it.
        assert {each.kind for each in merged.conflicts} <= {ConflictKind.AMBIGUOUS}
        return
    after = world.contents()
    world.apply(merged)
    for change in culprit.changes:
        if change.before:
            assert plain(change.before) in world.contents()
    assert len(world.rows) == len(after) + sum(
        {"insert": -1, "delete": 1, "update": 0}[change.kind] for change in culprit.changes
    )


def kinds(conflicts: Sequence[Conflict]) -> list[tuple[ConflictKind, tuple[str, ...]]]:
    return [(each.kind, each.columns) for each in conflicts]


CASES = {
    "updated, same column edited since": (
        update(row(1, 1, 1, 1), row(1, 2, 1, 1)),
        [(1, 9, 1, 1)],
        [(ConflictKind.CHANGED, ("a",))],
    ),
    "updated, gone since": (update(row(1, 1, 1, 1), row(1, 2, 1, 1)), [], [(ConflictKind.GONE, ())]),
    "inserted, changed since": (
        insert(row(1, 1, 1, 1)),
        [(1, 1, 5, 1)],
        [(ConflictKind.INSERT_CHANGED, ("b",))],
    ),
    "inserted, gone since": (insert(row(1, 1, 1, 1)), [], []),
    "deleted, key free": (delete(row(1, 1, 1, 1)), [], []),
    "deleted, key reused": (
        delete(row(1, 1, 1, 1)),
        [(1, 4, 1, 1)],
        [(ConflictKind.KEY_REUSED, ("a",))],
    ),
    "deleted, put back since": (delete(row(1, 1, 1, 1)), [(1, 1, 1, 1)], []),
    "key changed, old key given to another": (
        update(row(1, 1, 1, 1), row(2, 1, 1, 1)),
        [(2, 1, 1, 1), (1, 0, 0, 0)],
        [(ConflictKind.KEY_REUSED, ())],
    ),
    "key changed, reverted before": (update(row(1, 1, 1, 1), row(2, 1, 1, 1)), [(1, 1, 1, 1)], []),
}


@pytest.mark.parametrize("case", CASES)
def test_conflicts(case: str) -> None:
    change, now, expected = CASES[case]
    world = World()
    for contents in now:
        world.add(*contents)
    assert kinds(world.merge(Culprit(7, (change,))).conflicts) == expected


def test_force_overwrites_but_never_matches_nothing() -> None:
    world = World()
    world.add(1, 9, 8, 7)
    culprit = Culprit(7, (update(row(1, 1, 1, 1), row(1, 2, 1, 1)),))
    world.apply(world.merge(culprit, force=True))
    assert world.contents() == [(1, 1, 8, 7)]
    gone = world.merge(Culprit(7, (update(row(5, 1, 1, 1), row(5, 2, 1, 1)),)), force=True)
    assert kinds(gone.conflicts) == [(ConflictKind.GONE, ())]


def test_exchanged_keys_do_not_stand_in_each_others_way() -> None:
    world = World()
    world.add(2, 10, 0, 0)
    world.add(1, 20, 0, 0)
    culprit = Culprit(
        7, (update(row(1, 10, 0, 0), row(2, 10, 0, 0)), update(row(2, 20, 0, 0), row(1, 20, 0, 0)))
    )
    merged = world.merge(culprit)
    assert merged.conflicts == ()
    world.apply(merged)
    assert world.contents() == [(1, 10, 0, 0), (2, 20, 0, 0)]


def test_a_revert_of_exchanged_keys_does_not_exchange_them_again() -> None:
    world = World()
    world.add(2, 10, 0, 0)
    world.add(1, 20, 0, 0)
    changes = update(row(1, 10, 0, 0), row(2, 10, 0, 0)), update(row(2, 20, 0, 0), row(1, 20, 0, 0))
    world.apply(world.merge(Culprit(7, changes)))
    again = world.merge(Culprit(7, changes))
    assert (again.operations, again.conflicts, again.already) == ((), (), 2)
    world.rows.clear()
    world.add(2, 10, 0, 5)
    world.add(1, 20, 0, 0)
    unclear = world.merge(Culprit(7, changes))
    assert kinds(unclear.conflicts) == [(ConflictKind.AMBIGUOUS, ())] * 2


def test_a_row_that_moved_is_one_update() -> None:
    both = Culprit(7, (delete(row(1, 1, 1, 1)), insert(row(1, 2, 1, 1))))
    [change] = normalised(both, {TABLE: KEYED}).changes
    assert (change.kind, change.changed) == ("update", ("a",))


def test_a_counter_is_adjusted_and_told_as_a_difference() -> None:
    world = World()
    world.add(1, 150, 0, 0)
    culprit = Culprit(7, (update(row(1, 100, 0, 0), row(1, 130, 0, 0)),))
    merged = world.merge(culprit, counters=["a"])
    [operation] = merged.operations
    assert operation.deltas == {"a": "-30"}
    assert operation.final is not None
    assert operation.final["a"].text == "120"


@given(
    *[st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**40), max_value=10**40)] * 3
)
def test_counters_are_exact(before: Decimal, after: Decimal, current: Decimal) -> None:
    found = adjusted(*(ColumnValue(format(each, "f")) for each in (before, after, current)))
    assert found is not None
    assert Fraction(str(found[0].text)) == Fraction(current) + Fraction(before) - Fraction(after)
    assert Fraction(found[1]) == Fraction(before) - Fraction(after)


@pytest.mark.parametrize("text", ["NaN", "Infinity", None, "1e5"])
def test_a_counter_that_is_no_finite_number_is_a_conflict(text: str | None) -> None:
    assert adjusted(ColumnValue("1"), ColumnValue("2"), ColumnValue(text)) is None


def test_altered_tables() -> None:
    narrower = TableFacts(TABLE, ("k", "a", "b"), ("k",))
    assert decide(delete(row(1, 1, 1, 1)), None, narrower).conflict is ConflictKind.SCHEMA
    wider = TableFacts(TABLE, (*COLUMNS, "d"), ("k",))
    assert decide(delete(row(1, 1, 1, 1)), None, wider).conflict is ConflictKind.SCHEMA
    now = row(1, 1, 1, 1) | {"d": value(3)}
    assert decide(insert(row(1, 1, 1, 1)), now, wider).conflict is ConflictKind.SCHEMA
    assert decide(update(row(1, 0, 1, 1), row(1, 1, 1, 1)), now, wider).values == {"a": value(0)}
