"""Rows of a page that lost changes: the stale version, the true one, and what is there now, merged. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

Key = tuple[str | None, ...]
Row = tuple[str | None, ...]
"""The columns' texts in the table's order; None for NULL."""


class Change(StrEnum):
    INSERT = "insert"
    UPDATE = "update"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Mend:
    """One row to change so that it is as the lost changes left it. `place` is the ctid of the row to update or
    delete, None for an insert; `before` is what is there now, `after` what will be."""

    change: Change
    key: Key
    place: str | None
    before: Row | None
    after: Row | None


@dataclass(frozen=True, slots=True)
class Conflict:
    """A row that cannot be decided, and why."""

    key: Key
    reason: str


@dataclass(frozen=True, slots=True)
class Merged:
    mends: tuple[Mend, ...]
    conflicts: tuple[Conflict, ...]


def merge_lost(
    stale: Mapping[Key, Row], true: Mapping[Key, Row], current: Mapping[Key, Sequence[tuple[str, Row]]]
) -> Merged:
    """What to change: `stale` is the state before the lost changes, `true` that after them.

    `current` has every row of a key that is there now with its ctid: two of one key where an old version is
    back beside the new one. A key is touched only where what is there is just what the damage explains.
    """
    mends: list[Mend] = []
    conflicts: list[Conflict] = []
    for key in sorted({*stale, *true}, key=repr):
        old, new = stale.get(key), true.get(key)
        if old == new:
            continue
        decided = _decide(key, old, new, list(current.get(key, ())))
        if isinstance(decided, Conflict):
            conflicts.append(decided)
        else:
            mends += decided
    return Merged(tuple(mends), tuple(conflicts))


def _decide(
    key: Key, old: Row | None, new: Row | None, there: list[tuple[str, Row]]
) -> list[Mend] | Conflict:
    back = [(place, row) for place, row in there if row == old]
    right = [(place, row) for place, row in there if row == new]
    if len(back) + len(right) != len(there) or len(back) > 1 or len(right) > 1:
        return Conflict(key, "somebody has changed the row since the damage")
    if right or (new is None and not back):
        # The true version is there; an old one beside it is back from the dead.
        return [Mend(Change.DELETE, key, place, row, None) for place, row in back]
    if back and new is None:
        return [Mend(Change.DELETE, key, place, row, None) for place, row in back]
    if back:
        ((place, row),) = back
        return [Mend(Change.UPDATE, key, place, row, new)]
    if old is None:
        return [Mend(Change.INSERT, key, None, None, new)]
    return Conflict(key, "the row is gone: whether the damage or somebody removed it cannot be told")
