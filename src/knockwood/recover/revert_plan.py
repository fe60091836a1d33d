"""The plan of a revert: what it would write, lock and lose, and why it is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from knockwood.model.recovery import ExpectedLoss, Plan, Precondition, Step
from knockwood.recover.plan.order import Refusal, Schedule
from knockwood.recover.plan.rows import Conflict, ConflictKind, Mode
from knockwood.recover.revert_examine import Examined, Request

KIND: Final = "revert"

ROWS_PER_SECOND: Final = 20_000
"""Rows locked, checked and written per second; measured were 54,000 on two cores (docs/revert.md)."""

_BASE_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Dependent:
    """A later transaction that stands on what is to be reverted. `xid` is the raw xmin of its rows: it may be
    that of a subtransaction. `kept`: its work stays as it is."""

    xid: int
    kind: str
    rows: int
    kept: bool

    def as_json(self) -> dict[str, Any]:
        return {"xid": self.xid, "kind": self.kind, "rows": self.rows, "kept": self.kept}


def dependents(examined: Examined) -> tuple[Dependent, ...]:
    """The later transactions that are seen: by the rows they wrote and the keys they reference, never by what
    they read, which leaves no trace in WAL."""
    found: dict[tuple[int, str, bool], int] = {}
    own = {culprit.xid for culprit in examined.culprits}
    for xid, rows in examined.merged.later.items():
        if xid not in own:
            found[xid, "same row", True] = rows
    for conflict in (*examined.conflicts, *examined.waived):
        kind = "foreign key" if conflict.kind is ConflictKind.CHILDREN else "same row"
        kind = "unique value" if conflict.kind is ConflictKind.UNIQUE else kind
        for xid in conflict.writers:
            if xid not in own:
                kept = conflict not in examined.waived
                found[xid, kind, kept] = found.get((xid, kind, kept), 0) + 1
    return tuple(Dependent(xid, kind, rows, kept) for (xid, kind, kept), rows in sorted(found.items()))


def make_plan(
    cluster: str, request: Request, examined: Examined, spool: tuple[Path, str], max_lock_wait: float
) -> Plan:
    """The plan: one step, or none and the reasons."""
    xids = [culprit.xid for culprit in request.culprits]
    purpose = f"revert of {_named(xids)}"
    refused = tuple(_refusals(examined))
    if refused or not examined.operations:
        return Plan(cluster, purpose, refused=refused or ("nothing is left to be reverted",))
    step = _step(request, examined, spool, max_lock_wait)
    return Plan(cluster, purpose, (step,), _loss(request.mode, examined))


def _named(xids: list[int]) -> str:
    return f"transaction{'s' if len(xids) > 1 else ''} {', '.join(map(str, xids))}"


def _refusals(examined: Examined) -> Iterator[str]:
    kinds: dict[ConflictKind, list[Conflict]] = {}
    for conflict in examined.conflicts:
        kinds.setdefault(conflict.kind, []).append(conflict)
    for kind, conflicts in kinds.items():
        tables = ", ".join(sorted({str(conflict.table) for conflict in conflicts}))
        yield f"{len(conflicts)} row(s) of {tables}: {kind}"
    if isinstance(examined.order, Refusal):
        yield from examined.order.reasons


def _step(request: Request, examined: Examined, spool: tuple[Path, str], max_lock_wait: float) -> Step:
    order = examined.order
    assert isinstance(order, Schedule)
    xids = [culprit.xid for culprit in request.culprits]
    counts = {str(table): kinds for table, kinds in examined.counts.items()}
    rows = len(examined.operations)
    seconds = round(_BASE_SECONDS + rows / ROWS_PER_SECOND, 2)
    arguments = {
        "database": request.database,
        "xids": xids,
        "mode": str(request.mode),
        "counters": list(request.counters),
        "changes": str(spool[0]),
        "sha256": spool[1],
        "digest": examined.digest,
        "rows": counts,
        "replica_role": order.replica,
        "reasons": list(order.reasons),
        "max_lock_wait": max_lock_wait,
    }
    written = "; ".join(f"{table}: {_words(kinds)}" for table, kinds in counts.items())
    return Step(
        kind=KIND,
        title=f"revert {_named(xids)} in database {request.database}: {written}",
        arguments=arguments,
        preconditions=tuple(_preconditions(order)),
        locks=f"{rows} row(s) of {', '.join(counts)} FOR UPDATE, the tables ROW EXCLUSIVE",
        blocked_seconds=seconds,
        seconds=seconds,
        undo="revert the transaction that this step commits",
    )


def _words(kinds: Mapping[str, int]) -> str:
    words = {"set": "set back", "insert": "put back", "delete": "deleted"}
    return ", ".join(f"{count} {words[kind]}" for kind, count in kinds.items() if count)


def _preconditions(order: Schedule) -> Iterator[Precondition]:
    yield Precondition("rows unchanged", "each row is as the plan saw it, or merges to the same outcome")
    yield Precondition("row counts", "every statement writes exactly the rows planned")
    yield Precondition("invariants", "none is broken by more rows afterwards than before")
    if order.replica:
        yield Precondition(
            "foreign keys",
            "checked here for every row touched: the replication role keeps the server from it",
        )


def _loss(mode: Mode, examined: Examined) -> ExpectedLoss:
    if mode is Mode.FORCE and examined.waived:
        writers = {xid for conflict in examined.waived for xid in conflict.writers}
        detail = "later edits of the same columns are given up"
        return ExpectedLoss(len(writers) or None, len(examined.waived), detail)
    if examined.waived:
        detail = (
            f"nothing good; {len(examined.waived)} row(s) keep what the transaction wrote:"
            " what was one transaction is undone in part only"
        )
        return ExpectedLoss(detail=detail)
    return ExpectedLoss()
