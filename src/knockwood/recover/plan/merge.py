"""The three-way merge: what a transaction wrote against what it found, held against the rows of now.

Per column, with B before, A after, C current: A = B keeps C; C = A sets B; C = B is reverted already;
anything else is a conflict, or C + (B − A) for a column declared a counter. Values are compared by their
images. Several transactions are taken back newest first, each from the state the one before it leaves; the
outcome is one operation per row. Nothing here reads a server.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from knockwood.history.transaction import ColumnValue, RowChange, TableId
from knockwood.recover.plan.change import Verdict, decide, plus, row_key
from knockwood.recover.plan.moves import moves
from knockwood.recover.plan.rows import (
    ChangeId,
    Conflict,
    ConflictKind,
    Culprit,
    Current,
    Found,
    Merge,
    Operation,
    Row,
    RowKey,
    TableFacts,
)


def wanted_keys(
    culprits: Sequence[Culprit], tables: Mapping[TableId, TableFacts]
) -> dict[TableId, dict[RowKey, Row]]:
    """Every key whose current row the merge needs, with a row that has it."""
    wanted: dict[TableId, dict[RowKey, Row]] = defaultdict(dict)
    for culprit in culprits:
        for change in culprit.changes:
            facts = tables[change.table]
            for row in (change.before, change.after):
                if row is not None:
                    wanted[change.table][row_key(row, facts)] = row
    return dict(wanted)


def normalised(culprit: Culprit, tables: Mapping[TableId, TableFacts]) -> Culprit:
    """Join what the transaction deleted and inserted under one key: a row that moved between partitions, or
    that was replaced, was updated."""
    removed: dict[tuple[TableId, RowKey], int] = {}
    for position, change in enumerate(culprit.changes):
        if change.kind == "delete" and change.before and tables[change.table].key:
            removed[change.table, row_key(change.before, tables[change.table])] = position
    joined: dict[int, RowChange | None] = {}
    for position, change in enumerate(culprit.changes):
        if change.kind != "insert" or not change.after:
            continue
        other = removed.pop((change.table, row_key(change.after, tables[change.table])), None)
        if other is not None:
            gone = culprit.changes[other]
            joined[other] = None
            joined[position] = replace(change, kind="update", key=gone.key, before=gone.before)
    if not joined:
        return culprit
    changes = (joined.get(position, change) for position, change in enumerate(culprit.changes))
    return replace(culprit, changes=tuple(change for change in changes if change is not None))


@dataclass(slots=True, eq=False)
class _Slot:
    """A row on its way through the merge: as found, and as the reverts so far leave it. There may be a million."""

    table: TableId
    found: Found | None
    values: dict[str, ColumnValue] | None
    keys: tuple[RowKey, ...] = ()
    deltas: dict[str, str] | None = None
    plain: tuple[str, ...] = ()
    changes: tuple[ChangeId, ...] = ()


class _World:
    """The rows of now, and what becomes of them."""

    def __init__(self, current: Current, tables: Mapping[TableId, TableFacts]) -> None:
        self._tables = tables
        self.slots: list[_Slot] = []
        self._at: dict[tuple[TableId, RowKey], list[_Slot]] = defaultdict(list)
        for table, rows in current.rows.items():
            by_place: dict[str, _Slot] = {}
            for key, everything in rows.items():
                for found in everything:
                    # Two keys asked for may be equal to PostgreSQL (1.0, 1.00) and find one row.
                    slot = by_place.get(found.place)
                    if slot is None:
                        slot = by_place[found.place] = _Slot(table, found, dict(found.values))
                        self.slots.append(slot)
                    self._stand(slot, key)

    def at(self, table: TableId, row: Row) -> _Slot | None:
        slots = self._at.get((table, row_key(row, self._tables[table])))
        return slots[-1] if slots else None

    def untouched_at(self, table: TableId, row: Row) -> bool:
        slots = self._at.get((table, row_key(row, self._tables[table])), [])
        return any(slot.found is not None and not slot.changes for slot in slots)

    def take(self, slot: _Slot) -> None:
        """Take the row away from every key it is found under."""
        for key in slot.keys:
            self._at[slot.table, key].remove(slot)
        slot.keys = ()

    def put(self, slot: _Slot) -> None:
        assert slot.values is not None
        self._stand(slot, row_key(slot.values, self._tables[slot.table]))

    def _stand(self, slot: _Slot, key: RowKey) -> None:
        slot.keys += (key,)
        self._at[slot.table, key].append(slot)

    def new(self, table: TableId, values: Row) -> _Slot:
        slot = _Slot(table, None, dict(values))
        self.slots.append(slot)
        return slot


class _Merging:
    def __init__(
        self,
        current: Current,
        tables: Mapping[TableId, TableFacts],
        counters: Mapping[TableId, Collection[str]],
        force: bool,
    ) -> None:
        self._tables = tables
        self._counters = counters
        self._force = force
        self._world = _World(current, tables)
        self._conflicts: list[Conflict] = []
        self._already = 0
        self._later: dict[int, int] = defaultdict(int)

    def revert(self, culprit: Culprit, excluded: Collection[ChangeId]) -> None:
        """Take one transaction back: first every row away from where it was left, then to where it was.

        Rows that exchanged their keys would otherwise stand in each other's way.
        """
        placed: list[tuple[ChangeId, RowChange, _Slot]] = []
        skipped = {position for xid, position in excluded if xid == culprit.xid}
        states = moves(culprit.changes, self._tables, self._row_at, skipped)
        # Rows that are back at their old keys already: not what an insert left there.
        back = [
            self._world.at(change.table, change.before or {})
            for position, change in enumerate(culprit.changes)
            if states.get(position) == "back"
        ]
        for position, change in enumerate(culprit.changes):
            if position in skipped or change.kind == "delete":
                continue
            here = (culprit.xid, position)
            slot = self._world.at(change.table, change.after or {})
            if states.get(position) == "back" or (
                change.kind == "insert" and slot is not None and slot in back
            ):
                self._already += 1
            elif states.get(position) == "unclear":
                self._conflict(
                    here, change, ConflictKind.AMBIGUOUS, slot, "rows exchanged keys, and changed since"
                )
            elif (lifted := self._lift(here, change, slot)) is not None:
                placed.append((here, change, lifted))
        for here, change, slot in placed:
            occupant = self._world.at(change.table, slot.values or {}) if self._keyed(change) else None
            if occupant is not None:
                self._conflict(
                    here, change, ConflictKind.KEY_REUSED, occupant, "its old key was given to another row"
                )
            self._world.put(slot)
        for position, change in enumerate(culprit.changes):
            if position not in skipped and change.kind == "delete":
                self._bring_back((culprit.xid, position), change)

    def outcome(self) -> Merge:
        operations = [operation for slot in self._world.slots if (operation := self._operation(slot))]
        return Merge(tuple(operations), tuple(self._conflicts), self._already, dict(self._later))

    def _keyed(self, change: RowChange) -> bool:
        return bool(self._tables[change.table].key)

    def _decide(self, change: RowChange, current: Row | None) -> Verdict:
        counters = self._counters.get(change.table, ())
        return decide(change, current, self._tables[change.table], counters, self._force)

    def _row_at(self, table: TableId, row: Row) -> Row | None:
        slot = self._world.at(table, row)
        return slot.values if slot else None

    def _lift(self, here: ChangeId, change: RowChange, slot: _Slot | None) -> _Slot | None:
        """Revert an insert or an update away from where it was left; the slot that is to be put back."""
        verdict = self._decide(change, slot.values if slot else None)
        if verdict.kind == "nothing" and change.kind == "insert" and not self._keyed(change):
            # Without a key nobody can say whether it is gone or was changed since.
            verdict = Verdict("conflict", conflict=ConflictKind.GONE, detail="no row equals the inserted one")
        if verdict.kind == "conflict":
            assert verdict.conflict is not None
            self._conflict(here, change, verdict.conflict, slot, verdict.detail, verdict.columns)
            return None
        if verdict.kind == "nothing" or slot is None:
            self._already += 1
            return None
        self._note_later(slot, change)
        slot.changes += (here,)
        if not verdict.values:
            self._world.take(slot)
            slot.values = None
            return None
        return self._set(slot, verdict)

    def _set(self, slot: _Slot, verdict: Verdict) -> _Slot | None:
        assert slot.values is not None
        facts = self._tables[slot.table]
        moves = not facts.key or any(name in facts.key for name in verdict.values)
        if moves:
            self._world.take(slot)
        slot.values |= verdict.values
        for name in verdict.values:
            deltas = slot.deltas or {}
            if name in verdict.deltas and name not in slot.plain:
                slot.deltas = {**deltas, name: plus(deltas.get(name, "0"), verdict.deltas[name])}
            else:
                slot.plain += (name,)
                deltas.pop(name, None)
        return slot if moves else None

    def _bring_back(self, here: ChangeId, change: RowChange) -> None:
        before = change.before or {}
        slot = self._world.at(change.table, before) if self._keyed(change) else None
        if not self._keyed(change) and self._world.untouched_at(change.table, before) and not self._force:
            self._conflict(
                here,
                change,
                ConflictKind.AMBIGUOUS,
                None,
                "an equal row is there: reverted before, or another",
            )
            return
        verdict = self._decide(change, slot.values if slot else None)
        if verdict.kind == "conflict":
            assert verdict.conflict is not None
            self._conflict(here, change, verdict.conflict, slot, verdict.detail, verdict.columns)
        elif verdict.kind == "insert":
            fresh = self._world.new(change.table, verdict.values)
            fresh.changes += (here,)
            self._world.put(fresh)
        elif verdict.kind == "set" and slot is not None and slot.values is not None:
            slot.changes += (here,)
            moved = self._set(slot, verdict)
            if moved is not None:
                self._world.put(moved)
        else:
            self._already += 1

    def _note_later(self, slot: _Slot, change: RowChange) -> None:
        """Remember who edited the row after the transaction, where that edit is kept."""
        if slot.found is None or slot.changes or change.after is None or slot.values is None:
            return
        if any(
            name in slot.values and not slot.values[name].same(value) for name, value in change.after.items()
        ):
            self._later[slot.found.xmin] += 1

    def _conflict(
        self,
        here: ChangeId,
        change: RowChange,
        kind: ConflictKind,
        slot: _Slot | None,
        detail: str = "",
        columns: tuple[str, ...] = (),
    ) -> None:
        facts = self._tables[change.table]
        row = change.after or change.before or {}
        key = {name: row[name].text for name in facts.key or facts.columns if name in row}
        writers = (slot.found.xmin,) if slot and slot.found else ()
        sources = (here, *(slot.changes if slot else ()))
        self._conflicts.append(
            Conflict(kind, change.table, key, here[0], columns, detail, writers, 1, sources)
        )

    def _operation(self, slot: _Slot) -> Operation | None:
        changes = tuple(dict.fromkeys(slot.changes))
        if slot.found is None:
            if slot.values is None:
                return None
            return Operation("insert", slot.table, None, slot.values, tuple(slot.values), changes=changes)
        if slot.values is None:
            return Operation("delete", slot.table, slot.found, None, changes=changes)
        old = slot.found.values
        columns = tuple(name for name, value in slot.values.items() if not value.same(old[name]))
        if not columns:
            return None
        deltas = {name: delta for name, delta in (slot.deltas or {}).items() if name in columns}
        return Operation("set", slot.table, slot.found, slot.values, columns, deltas, changes)


def merge(
    culprits: Sequence[Culprit],
    current: Current,
    tables: Mapping[TableId, TableFacts],
    *,
    counters: Mapping[TableId, Collection[str]] | None = None,
    force: bool = False,
    excluded: Collection[ChangeId] = (),
) -> Merge:
    """Take the transactions back, the first given (the newest) first, leaving out the changes `excluded`.

    Conflicts are data: with any, the operations are those of the changes without one, which nobody may
    execute unless conflicts are to be skipped.
    """
    merging = _Merging(current, tables, counters or {}, force)
    for culprit in culprits:
        merging.revert(culprit, excluded)
    return merging.outcome()
