"""Write what an examination decided, inside the caller's transaction: phase by phase, every row counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from knockwood.errors import RefusedError
from knockwood.history.transaction import TableId
from knockwood.postgres.connection import Connection
from knockwood.recover.plan.order import Phase, Schedule
from knockwood.recover.plan.rows import Operation
from knockwood.recover.revert_catalog import LiveTable
from knockwood.recover.revert_examine import Examined
from knockwood.recover.revert_rows import delete, fill, insert, lock, update


def lock_rows(connection: Connection, examined: Examined) -> None:
    """Lock every row that will be changed, table by table, in the order of keys."""
    for table in examined.counts:
        lock(connection, examined.catalog.tables[table], [e for e in examined.operations if e.table == table])


def write(connection: Connection, examined: Examined, schedule: Schedule) -> int:
    """Carry out the schedule; how many rows were written. Raises RefusedError where a statement did not
    write exactly the rows it was for: the caller rolls back."""
    total = 0
    for table, name in schedule.deferred:
        quoted = ".".join('"' + part.replace('"', '""') + '"' for part in (table.schema, name))
        connection.execute(f"set constraints {quoted} deferred".encode())
    for phase in schedule.phases:
        written, wanted = _phase(connection, examined, schedule, phase)
        if written != wanted:
            raise RefusedError(
                f"{phase.kind} wrote {written} of {wanted} rows of {phase.table}: nothing was kept",
                hint="do a rule, a partition or another session stand in between? Show the plan again",
            )
        total += written if phase.kind in ("set", "insert", "delete") else 0
    # A constraint that was deferred speaks now, while nothing is committed.
    connection.execute("set constraints all immediate")
    return total


def _phase(connection: Connection, examined: Examined, schedule: Schedule, phase: Phase) -> tuple[int, int]:
    """The rows that one phase wrote, and those it was for."""
    table = examined.catalog.tables[phase.table]
    if phase.kind == "null":
        chosen = [each for each in examined.of(phase.of or "set", phase.table) if _concerns(each, phase)]
        return update(connection, table, chosen, phase.columns, null=True) if chosen else 0, len(chosen)
    if phase.kind == "fill":
        chosen = examined.of("insert", phase.table)
        return fill(connection, table, chosen, phase.columns), len(chosen)
    chosen = _recreated(examined, schedule, phase)
    if phase.kind == "delete":
        return delete(connection, table, chosen), len(chosen)
    if phase.kind == "insert":
        withheld = [name for owner, names in schedule.withheld if owner == phase.table for name in names]
        return insert(connection, table, chosen, withheld), len(chosen)
    return _set(connection, table, chosen), len(chosen)


def _concerns(operation: Operation, phase: Phase) -> bool:
    return operation.kind == "delete" or bool(set(operation.columns) & set(phase.columns))


def _recreated(examined: Examined, schedule: Schedule, phase: Phase) -> list[Operation]:
    """The operations of a phase; where unique values change hands, a row set is deleted and inserted again."""
    assert phase.kind in ("set", "insert", "delete")
    own = examined.of(phase.kind, phase.table)
    if phase.table not in schedule.recreated:
        return own
    sets = examined.of("set", phase.table)
    columns = examined.catalog.tables[phase.table].facts.columns
    whole = [
        replace(each, final={name: (each.final or {})[name] for name in columns}, columns=columns)
        for each in sets
    ]
    return {"set": [], "delete": own + sets, "insert": own + whole}[phase.kind]


def _set(connection: Connection, table: LiveTable, operations: Sequence[Operation]) -> int:
    """One statement for all rows in which the same columns change."""
    groups: dict[tuple[str, ...], list[Operation]] = {}
    for each in operations:
        groups.setdefault(each.columns, []).append(each)
    return sum(update(connection, table, group, columns) for columns, group in groups.items())


def tables_of(examined: Examined) -> tuple[TableId, ...]:
    """The tables written, by name."""
    return tuple(examined.counts)
