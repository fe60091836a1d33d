"""The plan to bring one table back in place: pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from knockwood.model.recovery import Alternative, ExpectedLoss, Plan, Precondition, Step

KIND: Final = "restore-table"

Mode = Literal["refuse", "keep-current", "keep-restored", "replace"]
"""What happens to rows that changed since: nothing is done, they stay, or they go back; `replace` takes
every row of the table away first (the way for a table without a key)."""

MODES: Final[tuple[str, ...]] = get_args(Mode)

_EXAMPLES = 20


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rows as of the point against those there now, by key. `examples` are keys of changed rows."""

    same: int = 0
    missing: int = 0
    changed: int = 0
    newer: int = 0
    examples: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "missing": self.missing,
            "changed": self.changed,
            "newer": self.newer,
            "examples": list(self.examples),
        }


@dataclass(frozen=True, slots=True)
class TableState:
    """What is known of a table. `rows` as of the point; `hindrances` are why a merge would not be safe.

    `key` are the columns that tell rows apart, `referring` and `referred` the tables that its foreign keys
    tie it to, `views` those that fell with it, `left_out` what does not come back.
    """

    exists: bool
    rows: int
    key: tuple[str, ...] = ()
    hindrances: tuple[str, ...] = ()
    referring: tuple[str, ...] = ()
    referred: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def plan_table(
    cluster: str,
    table: str,
    arguments: Mapping[str, Any],
    mode: Mode,
    state: TableState,
    comparison: Comparison | None,
) -> Plan:
    """Bring `table` back as of the point in `arguments` (all that a handler needs), or say why not."""
    purpose = f"bring {table} back as of {arguments['as_of']}"
    if not state.exists:
        return Plan(cluster, purpose, (_create(table, arguments, state),), ExpectedLoss(), refused=())
    refused = list(state.hindrances)
    if not state.key and mode != "replace":
        refused.append(
            f"{table} has no primary key and no unique key without nulls: rows cannot be told apart"
            " (--replace takes every row of now away, and keeps a copy)"
        )
    if mode == "replace" and state.referring:
        refused.append(
            f"rows of {', '.join(state.referring)} refer to it: they would lose what they refer to"
        )
    if mode == "refuse" and comparison is not None and comparison.changed:
        refused.append(_conflicts(comparison))
    if refused or (comparison is None and mode != "replace"):
        return Plan(cluster, purpose, refused=tuple(refused), alternatives=(_beside(table),))
    if comparison is not None and not (comparison.missing or (comparison.changed and mode != "keep-current")):
        return Plan(cluster, purpose, refused=("every row as of then is there now: nothing is to be done",))
    step = (
        _replace(table, arguments, state)
        if comparison is None
        else _merge(table, arguments, mode, comparison)
    )
    return Plan(cluster, purpose, (step,), _loss(mode, comparison), alternatives=(_beside(table),))


def _create(table: str, arguments: Mapping[str, Any], state: TableState) -> Step:
    tied = sorted({*state.referring, *state.referred})
    extra = f", and the views {', '.join(state.views)}" if state.views else ""
    return Step(
        KIND,
        f"make {table} again with its {state.rows:,} rows, keys, indexes, grants and triggers{extra}",
        {**arguments, "how": "create"},
        (Precondition("absent", f"there is no {table}"),),
        locks=f"SHARE ROW EXCLUSIVE on {', '.join(tied)}" if tied else "nothing that anybody else uses",
        blocked_seconds=None if tied else 0.0,
        undo=f"drop {table}; until the commit nothing is there",
    )


def _merge(table: str, arguments: Mapping[str, Any], mode: Mode, rows: Comparison) -> Step:
    parts = [f"insert {rows.missing:,} rows that are missing"]
    if rows.changed:
        parts.append(
            f"leave {rows.changed:,} rows that changed since"
            if mode == "keep-current"
            else f"put back {rows.changed:,} rows that changed since, keeping a copy of what they are now"
        )
    if rows.newer:
        parts.append(f"leave {rows.newer:,} newer rows")
    return Step(
        KIND,
        f"{table}: {'; '.join(parts)}",
        {**arguments, "how": "merge", "mode": mode},
        (
            Precondition("columns", "its columns and key are those as of then"),
            Precondition("conflicts", "no other row has changed since, looked at again under the lock"),
        ),
        locks=f"SHARE ROW EXCLUSIVE on {table}: it can be read",
        blocked_seconds=None,
        undo="revert the transaction that it records",
    )


def _replace(table: str, arguments: Mapping[str, Any], state: TableState) -> Step:
    return Step(
        KIND,
        f"{table}: copy its rows of now to knockwood_replaced, then put the {state.rows:,} rows in their place",
        {**arguments, "how": "merge", "mode": "replace"},
        (Precondition("columns", "its columns are those as of then"),),
        locks=f"SHARE ROW EXCLUSIVE on {table}: it can be read",
        blocked_seconds=None,
        undo="the copy in knockwood_replaced",
    )


def _loss(mode: Mode, rows: Comparison | None) -> ExpectedLoss:
    if mode == "replace":
        return ExpectedLoss(None, None, "every row written since leaves the table; a copy stays")
    if mode == "keep-restored" and rows is not None and rows.changed:
        return ExpectedLoss(None, rows.changed, "later changes of these rows; a copy stays")
    return ExpectedLoss(0, 0, "rows deleted since come back too, also those deleted on purpose")


def _conflicts(rows: Comparison) -> str:
    some = ", ".join(rows.examples[:_EXAMPLES])
    return (
        f"{rows.changed:,} rows changed since: {some}{', …' if rows.changed > len(rows.examples) else ''}"
        " (--keep-current leaves them as they are, --keep-restored puts them back)"
    )


def _beside(table: str) -> Alternative:
    return Alternative(f"bring {table} back beside, as knockwood_restored", "nothing is mended by that alone")
