"""Bring one table back in its place: what is gone comes back, what is newer stays, what changed is asked about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knockwood.clone.partial import RelationKey, spawn_for
from knockwood.clone.registry import Registry
from knockwood.clone.spawn import Clone
from knockwood.errors import UsageError
from knockwood.model.finding import Verdict
from knockwood.model.proof import Claim
from knockwood.model.recovery import Plan, Recovery, Step
from knockwood.model.wal import Lsn
from knockwood.operations.recoveries import aware
from knockwood.postgres.binaries import Programs, find_programs
from knockwood.postgres.connection import connect, with_words
from knockwood.recover.execute import execute
from knockwood.recover.plan.table import MODES, Comparison, Mode, TableState, plan_table
from knockwood.recover.table_definition import TableName, pin
from knockwood.recover.tables import TableHandler, table_of
from knockwood.recover.tables_facts import compare, count, required_shape, shape, state_of
from knockwood.repository.backups.model import Progress
from knockwood.repository.repository import Repository
from knockwood.repository.targets import RestorePlan, Target, ToLsn, resolve

Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class InPlace:
    """What bringing a table back would do (`plan`), and, if it was applied, what it did (`recovery`).

    `comparison` counts the rows of then and now, None where the table is gone or has no key.
    """

    table: TableName
    plan: Plan
    restore: RestorePlan
    state: TableState
    comparison: Comparison | None
    reached_lsn: Lsn
    whole_because: str
    recovery: Recovery | None = None

    @property
    def refused(self) -> bool:
        return not self.plan.steps


def restore_in_place(
    repository: Repository,
    cluster: str,
    target: Target,
    table: TableName,
    *,
    live_dsn: str,
    state: Path,
    mode: Mode = "refuse",
    apply: bool = False,
    backup: str | None = None,
    accept_loss: bool = False,
    lock_timeout: str = "10s",
    progress: Report | None = None,
    programs_for: Callable[[int], Programs] = find_programs,
    registry: Registry | None = None,
) -> InPlace:
    """Plan to bring `table` back as of `target`, and with `apply` do it, journalled under `state`.

    Without `apply` the live table is only read, and compared by key. Raises TargetUnreachableError,
    ObjectMissingError where there was no such table then, UsageError for an unknown mode.
    """
    if mode not in MODES:
        raise UsageError(f"not a mode: {mode!r}", hint=f"one of {', '.join(MODES)}")
    plan = resolve(
        repository, target, backup=backup, accept_loss=accept_loss, unread=True, programs_for=programs_for
    )
    plan = aware(repository, plan, table)
    spawned = _spawn(repository, plan, table, programs_for, progress, registry or Registry(state))
    with spawned as clone:
        found = _examine(clone, cluster, plan, table, live_dsn, mode)
        if not apply or found.refused:
            return found
        handler = TableHandler(live_dsn, lambda step: nullcontext(clone), lock_timeout)
        recovery = execute(
            found.plan,
            [handler],
            state,
            approve=found.plan.id,
            verify=lambda: (_look_again(clone, table, live_dsn),),
        )
    return InPlace(
        table,
        found.plan,
        plan,
        found.state,
        found.comparison,
        found.reached_lsn,
        found.whole_because,
        recovery,
    )


def table_handler(
    repository: Repository,
    live_dsn: str,
    *,
    lock_timeout: str = "10s",
    progress: Report | None = None,
    programs_for: Callable[[int], Programs] = find_programs,
    registry: Registry | None = None,
) -> TableHandler:
    """The handler of `restore-table` steps of any plan, also of one that a killed run left."""

    @contextmanager
    def clone_for(step: Step) -> Iterator[Clone]:
        plan = resolve(
            repository,
            ToLsn(Lsn.parse(step.arguments["as_of"])),
            backup=step.arguments["backup"],
            unread=True,
            programs_for=programs_for,
        )
        with _spawn(repository, plan, table_of(step), programs_for, progress, registry) as clone:
            yield clone

    return TableHandler(live_dsn, clone_for, lock_timeout)


def _spawn(
    repository: Repository,
    plan: RestorePlan,
    table: TableName,
    programs_for: Callable[[int], Programs],
    progress: Report | None,
    registry: Registry | None,
) -> AbstractContextManager[Clone]:
    return spawn_for(
        repository,
        plan,
        [RelationKey(table.database, table.schema, table.table)],
        programs=programs_for(plan.backup.major),
        purpose=f"restore of table {table}",
        progress=progress,
        registry=registry,
    )


def _look_again(clone: Clone, table: TableName, live_dsn: str) -> Claim:
    """After the commit: is every row of then there? Others may have written since, which is no failure."""
    name = f"rows of {table}"
    with (
        connect(clone.dsn(table.database)) as source,
        connect(with_words(live_dsn, dbname=table.database)) as live,
    ):
        pin(source)
        pin(live)
        then, now = required_shape(source, table), shape(live, table)
        if now is None:
            return Claim(name, Verdict.BROKEN, "the table is not there")
        if not now.key or now.key != then.key:
            rows, wanted = count(live, now.source), count(source, then.source)
            verdict = Verdict.HELD if rows >= wanted else Verdict.NOT_CHECKED
            return Claim(name, verdict, f"{rows} rows are there, {wanted} were then")
        rows_now = compare(source, live, then, now)
    said = f"{rows_now.same} are as then, {rows_now.changed} have changed, {rows_now.newer} are newer"
    if rows_now.missing:
        return Claim(name, Verdict.NOT_CHECKED, f"{said}, {rows_now.missing} went after the commit")
    return Claim(name, Verdict.HELD, said)


def _examine(
    clone: Clone, cluster: str, plan: RestorePlan, table: TableName, live_dsn: str, mode: Mode
) -> InPlace:
    with (
        connect(clone.dsn(table.database)) as source,
        connect(with_words(live_dsn, dbname=table.database)) as live,
    ):
        pin(source)
        pin(live)
        then, now = required_shape(source, table), shape(live, table)
        state = state_of(source, live, then, now, mode)
        comparison = None
        if now is not None and state.key and not state.hindrances and mode != "replace":
            comparison = compare(source, live, then, now)
    # The last commit contained says the same as any target after it, and is found again by its LSN.
    as_of = plan.last_commit.lsn if plan.last_commit else plan.backup.stop_lsn
    arguments: dict[str, Any] = {
        "database": table.database,
        "schema": table.schema,
        "table": table.table,
        "backup": plan.backup.id,
        "as_of": str(as_of),
    }
    return InPlace(
        table,
        plan_table(cluster, str(table), arguments, mode, state, comparison),
        plan,
        state,
        comparison,
        clone.reached_lsn,
        clone.whole_because,
    )
