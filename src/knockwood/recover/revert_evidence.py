"""What a revert keeps of the rows it changes: each as it was when it was locked, and as it became."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from knockwood.history.transaction import RowChange
from knockwood.recover.journal import StepJournal
from knockwood.recover.plan.rows import Culprit, Operation
from knockwood.recover.revert_spool import decode, encode


def keep(journal: StepJournal, note: str, operations: Sequence[Operation]) -> str:
    """Keep every row as it is and as it will be, durably; returns the evidence's name."""
    return _store(journal, note, [Culprit(0, tuple(_change(each) for each in operations))])


def keep_some(
    journal: StepJournal, note: str, operations: Sequence[Operation], positions: Sequence[int]
) -> list[str]:
    """Keep some of the rows anew, each under its position among all; the evidence's name, if there are any."""
    if not positions:
        return []
    rows = [Culprit(position, (_change(operations[position]),)) for position in positions]
    return [_store(journal, f"{note}-later", rows)]


def kept(journal: StepJournal, committed: Mapping[str, Any]) -> tuple[RowChange, ...]:
    """What was kept of a committed revert, by the names noted: all rows, and those that changed meanwhile."""
    [whole] = decode(journal.read_evidence(str(committed["evidence"])))
    changes = list(whole.changes)
    for name in committed.get("evidence_later", ()):
        for one in decode(journal.read_evidence(str(name))):
            [changes[one.xid]] = one.changes
    return tuple(changes)


def _store(journal: StepJournal, note: str, rows: Sequence[Culprit]) -> str:
    data = encode(rows)
    name = f"{note}-{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
    journal.evidence(name, data)
    return name


def _change(operation: Operation) -> RowChange:
    before = operation.found.values if operation.found else None
    kind = {"set": "update", "insert": "insert", "delete": "delete"}[operation.kind]
    return RowChange(operation.table, kind, {}, before, operation.final)  # type: ignore[arg-type]
