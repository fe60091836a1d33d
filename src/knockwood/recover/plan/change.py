"""What to do about one change of one row: A, B and C held against each other, column by column."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from decimal import Context, Decimal, localcontext

from knockwood.history.transaction import ColumnValue, RowChange
from knockwood.recover.plan.rows import ConflictKind, Row, RowKey, TableFacts, cell

_DECIMAL = re.compile(r"-?\d+(\.\d+)?")
# numeric has up to 131,072 digits before the point and 16,383 after it.
_DIGITS = 150_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do about one change. `values` are the columns to set (of an insert: the row).

    `kind`: nothing (the row is as it was before, or the inserted one is gone), set, insert, delete, conflict.
    """

    kind: str
    values: Row = field(default_factory=dict)
    deltas: Mapping[str, str] = field(default_factory=dict)
    conflict: ConflictKind | None = None
    columns: tuple[str, ...] = ()
    detail: str = ""


def decide(
    change: RowChange,
    current: Row | None,
    facts: TableFacts,
    counters: Collection[str] = (),
    force: bool = False,
) -> Verdict:
    """Decide about one change. `current` is the row at the key the change left behind (for a delete: at the
    key it removed), None where there is none.

    Never names a column that the change did not change, save for an insert and for a forced overwrite of a
    reused key.
    """
    if change.kind == "insert":
        return _of_insert(change, current, facts, force)
    if change.kind == "delete":
        return _of_delete(change, current, facts, force)
    return _of_update(change, current, facts, counters, force)


def adjusted(before: ColumnValue, after: ColumnValue, current: ColumnValue) -> tuple[ColumnValue, str] | None:
    """C + (B − A) in exact decimal arithmetic, and B − A; None where one of them is no finite number."""
    texts = [value.text for value in (before, after, current)]
    if not all(text is not None and _DECIMAL.fullmatch(text) for text in texts):
        return None
    b, a, c = (str(text) for text in texts)
    delta = plus(b, a.removeprefix("-") if a.startswith("-") else f"-{a}")
    return ColumnValue(plus(c, delta)), delta


def plus(left: str, right: str) -> str:
    """The exact sum of two decimal numbers."""
    with localcontext(Context(prec=_DIGITS)):
        return format(Decimal(left) + Decimal(right), "f")


def _of_update(
    change: RowChange, current: Row | None, facts: TableFacts, counters: Collection[str], force: bool
) -> Verdict:
    before, after = change.before or {}, change.after or {}
    changed = [name for name in change.changed if name not in facts.generated]
    if not changed:
        return Verdict("nothing")
    if current is None:
        return Verdict(
            "conflict", conflict=ConflictKind.GONE, detail="the row was deleted or its key changed"
        )
    missing = tuple(name for name in changed if name not in current)
    if missing:
        return Verdict(
            "conflict", conflict=ConflictKind.SCHEMA, columns=missing, detail="column dropped since"
        )
    values: dict[str, ColumnValue] = {}
    deltas: dict[str, str] = {}
    clashes = []
    for name in changed:
        now = current[name]
        if now.same(after[name]):
            values[name] = before[name]
        elif now.same(before[name]):
            continue
        elif name in counters and (sum_ := adjusted(before[name], after[name], now)):
            values[name], deltas[name] = sum_
        else:
            clashes.append(name)
    if clashes and not force:
        return Verdict("conflict", conflict=ConflictKind.CHANGED, columns=tuple(clashes))
    values |= {name: before[name] for name in clashes}
    return Verdict("set", values, deltas, columns=tuple(clashes)) if values else Verdict("nothing")


def _of_insert(change: RowChange, current: Row | None, facts: TableFacts, force: bool) -> Verdict:
    if current is None:
        return Verdict("nothing")
    after = change.after or {}
    added = tuple(name for name in facts.columns if name not in after)
    if added and not force:
        return Verdict(
            "conflict",
            conflict=ConflictKind.SCHEMA,
            columns=added,
            detail="column added since: nobody can say whether it was written",
        )
    differing = tuple(
        name
        for name in facts.columns
        if name in after and name in current and not current[name].same(after[name])
    )
    if differing and not force:
        return Verdict("conflict", conflict=ConflictKind.INSERT_CHANGED, columns=differing)
    return Verdict("delete", columns=differing)


def _of_delete(change: RowChange, current: Row | None, facts: TableFacts, force: bool) -> Verdict:
    before = change.before or {}
    dropped = tuple(name for name in before if name not in facts.columns and name not in facts.generated)
    added = tuple(name for name in facts.columns if name not in before)
    if dropped or (added and not force):
        detail = "column dropped since" if dropped else "column added since: it would get its default"
        return Verdict("conflict", conflict=ConflictKind.SCHEMA, columns=dropped or added, detail=detail)
    values = {name: before[name] for name in facts.columns if name in before}
    if current is None:
        return Verdict("insert", values)
    differing = tuple(name for name in values if not current[name].same(values[name]))
    if not differing:
        return Verdict("nothing")
    if force:
        return Verdict("set", {name: values[name] for name in differing}, columns=differing)
    return Verdict(
        "conflict",
        conflict=ConflictKind.KEY_REUSED,
        columns=differing,
        detail="another row has the key of the deleted one",
    )


def row_key(row: Row, facts: TableFacts) -> RowKey:
    """What the row is found by: its key; in a table without one, the whole row."""
    return tuple(cell(row[name]) for name in facts.key or facts.columns if name in row)
