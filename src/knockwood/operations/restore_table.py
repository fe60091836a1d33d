"""Bring one table back beside the live one, as it was at an exact point; the live one is not touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from knockwood.clone.partial import RelationKey, spawn_for
from knockwood.clone.registry import Registry
from knockwood.clone.spawn import Clone
from knockwood.errors import ObjectDamagedError, RefusedError
from knockwood.host import clock, files, processes
from knockwood.model import Lsn
from knockwood.operations.beside import beside
from knockwood.operations.recoveries import aware
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.postgres.connection import Connection, connect, translated, with_words
from knockwood.postgres.copying import copy_rows
from knockwood.recover.table_definition import (
    TableDefinition,
    TableName,
    destination,
    fingerprint,
    pin,
    read_definition,
)
from knockwood.repository.backups.model import Progress
from knockwood.repository.repository import Repository
from knockwood.repository.targets import RestorePlan, Target, resolve

SCHEMA: Final = "knockwood_restored"
_NAME_BYTES: Final = 63


@dataclass(frozen=True, slots=True)
class TableOutcome:
    """One table brought back, or (`applied` False) the plan to do it.

    `destination` is a qualified table name or a file's path. `left_out` names what the copy lacks.
    """

    table: TableName
    destination: str
    applied: bool
    steps: tuple[str, ...]
    plan: RestorePlan
    reached_lsn: Lsn | None = None
    rows: int | None = None
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0
    whole_because: str = ""
    """Why the whole backup was fetched and not only the table."""


def restore_table(
    repository: Repository,
    target: Target,
    table: TableName,
    *,
    live_dsn: str | None = None,
    file: Path | None = None,
    apply: bool = False,
    backup: str | None = None,
    accept_loss: bool = False,
    progress: Callable[[Progress], None] | None = None,
    programs_for: Callable[[int], Programs] = find_programs,
    registry: Registry | None = None,
    warm: Callable[[RestorePlan], Clone | None] = lambda plan: None,
) -> TableOutcome:
    """Copy `table` as of `target` into the live cluster as `knockwood_restored.TABLE_TIME`, or into an SQL file.

    Without `apply` it only plans. `warm` may give a clone that is at hand; else one is made. The load is one
    transaction, verified by row count and fingerprint before it commits; nothing else in the live database is
    read, locked or changed. Raises TargetUnreachableError, ObjectMissingError where there was no such table at
    that point, RefusedError where a type it needs is gone, ObjectDamagedError if what arrived is not what was
    there.
    """
    if (live_dsn is None) == (file is None):
        raise RefusedError("a table goes either into the live cluster or into a file")
    if file is not None and file.exists():
        raise RefusedError(
            "the file exists already", where=str(file), hint="name one that does not exist yet"
        )
    began = clock.monotonic()
    plan = resolve(
        repository, target, backup=backup, accept_loss=accept_loss, unread=apply, programs_for=programs_for
    )
    plan = aware(repository, plan, table)
    name = _copy_name(table.table)
    place = str(file) if file else f"{SCHEMA}.{name}"
    outcome = TableOutcome(table, place, False, _steps(plan, table, name, file), plan)
    if not apply:
        return outcome
    # pg_dump writes into the clone's folder, which is not ours where it is a shadow's.
    clone = (warm(plan) if file is None else None) or spawn_for(
        repository,
        plan,
        [RelationKey(table.database, table.schema, table.table)],
        programs=programs_for(plan.backup.major),
        purpose=f"restore of table {table}",
        progress=progress,
        registry=registry,
    )
    with clone:
        done = _bring_back(clone, outcome, name, live_dsn, file)
    return replace(done, seconds=clock.monotonic() - began)


def _bring_back(
    clone: Clone, outcome: TableOutcome, name: str, live_dsn: str | None, file: Path | None
) -> TableOutcome:
    table = outcome.table
    with connect(clone.dsn(table.database)) as source:
        pin(source)
        definition = read_definition(source, table)
        with beside(lambda _: _fingerprint(clone, table, definition)) as expected:
            if file is not None:
                _dump(clone, table, file)
            if live_dsn is not None:
                with connect(with_words(live_dsn, dbname=table.database)) as live:
                    _load(source, live, definition, name, expected, _comment(table, clone))
            rows, _ = expected()
    left_out = definition.left_out if file is None else ()
    return replace(
        outcome,
        applied=True,
        reached_lsn=clone.reached_lsn,
        rows=rows,
        left_out=left_out,
        whole_because=clone.whole_because,
    )


def _fingerprint(clone: Clone, table: TableName, definition: TableDefinition) -> tuple[int, int]:
    with connect(clone.dsn(table.database)) as connection:
        pin(connection)
        return fingerprint(connection, definition, definition.source)


def _copy_name(table: str) -> str:
    """The table's name and the moment, within PostgreSQL's 63 bytes for a name."""
    ending = f"_{clock.stamp(clock.now()).lower()}"
    start = table.encode()[: _NAME_BYTES - len(ending)].decode(errors="ignore")
    return start + ending


def _steps(plan: RestorePlan, table: TableName, name: str, file: Path | None) -> tuple[str, ...]:
    size = sum(piece.segment.bytes for piece in plan.wal)
    where = f"{plan.target_lsn}" if plan.target_lsn else "its end"
    first = (
        f"restore the table from backup {plan.backup.id} into a throw-away clone"
        f" and replay {size / 1e6:.0f} MB of WAL to {where}"
    )
    if file is not None:
        return (first, f"write {table} with pg_dump into {file}", "remove the clone")
    return (
        first,
        f"in database {table.database}, in one transaction: create {SCHEMA}.{name} and copy the rows of {table}",
        "add its keys, checks and indexes; compare row count and fingerprint with the clone; commit",
        f"remove the clone; {table} itself is neither locked nor changed",
    )


def _comment(table: TableName, clone: Clone) -> str:
    commit = clone.plan.last_commit
    last = f", last commit {commit.xid} at {commit.time.isoformat()}" if commit else ""
    return (
        f"{table} as of {clone.reached_lsn}{last}, restored by knockwood from backup {clone.plan.backup.id}"
    )


def _load(
    source: Connection,
    live: Connection,
    definition: TableDefinition,
    name: str,
    expected: Callable[[], tuple[int, int]],
    comment: str,
) -> None:
    pin(live)
    _require_types(live, definition)
    target = destination(live, SCHEMA, name)
    with translated(), live.transaction():
        live.execute(f"create schema if not exists {SCHEMA}".encode())
        live.execute(definition.create(target).encode())
        copy_rows(source, live, definition.source, target, definition.column_list)
        for statement in definition.complete(target):
            live.execute(statement.encode())
        quoted = "'" + comment.replace("'", "''") + "'"
        live.execute(f"comment on table {target} is {quoted}".encode())
        arrived = fingerprint(live, definition, target)
        if arrived != expected():
            raise ObjectDamagedError(
                f"{arrived[0]} rows arrived of {expected()[0]}, or not as they were; nothing was kept",
                where=target,
            )


def _require_types(live: Connection, definition: TableDefinition) -> None:
    with translated():
        missing = [column.type for column in definition.columns if not _known(live, column.type)]
    if missing:
        raise RefusedError(
            f"the live database has no type {', '.join(sorted(set(missing)))}",
            hint="create it again, or restore the table into a file with --file",
        )


def _known(live: Connection, type_name: str) -> bool:
    row = live.execute("select pg_catalog.to_regtype(%s) is not null", [type_name]).fetchone()
    return row is not None and bool(row[0])


def _dump(clone: Clone, table: TableName, file: Path) -> None:
    work = clone.workspace.root / "table.sql"
    pattern = ".".join('"' + part.replace('"', '""') + '"' for part in (table.schema, table.table))
    processes.run(
        [clone.programs.path("pg_dump"), "-d", clone.dsn(table.database), "-t", pattern, "-f", work],
        env={"LC_ALL": "C"},
    )
    files.write_new(file.absolute(), files.read_chunks(work))
