"""`knockwood restore --table T --in-place`: the plan, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from knockwood.cli.answer import Answer, escape, seconds
from knockwood.cli.progress import byte_progress
from knockwood.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from knockwood.model.recovery import Plan, Recovery
    from knockwood.operations.cluster import Cluster
    from knockwood.operations.restore_table_in_place import InPlace
    from knockwood.recover.plan.table import Mode
    from knockwood.repository.repository import Repository
    from knockwood.repository.targets import Target


def mode_of(*, keep_current: bool, keep_restored: bool, replace: bool) -> Mode:
    """The one mode that the flags name; raises UsageError for more than one."""
    chosen: list[Mode] = []
    if keep_current:
        chosen.append("keep-current")
    if keep_restored:
        chosen.append("keep-restored")
    if replace:
        chosen.append("replace")
    if len(chosen) > 1:
        raise UsageError(f"--{chosen[0]} and --{chosen[1]} exclude each other")
    return chosen[0] if chosen else "refuse"


def in_place(
    cluster: Cluster,
    repository: Repository,
    target: Target,
    table: str,
    mode: Mode,
    *,
    notes: tuple[str, ...],
    quiet: bool,
    **options: Any,
) -> Answer:
    """Plan, and with `apply` carry out, bringing a table back in its place."""
    from knockwood.operations.restore_table_in_place import restore_in_place
    from knockwood.recover.table_definition import TableName

    with byte_progress("restore", quiet=quiet) as progress:
        found = restore_in_place(
            repository,
            cluster.name,
            target,
            TableName.parse(table),
            live_dsn=cluster.dsn,
            state=cluster.state,
            mode=mode,
            progress=progress,
            programs_for=cluster.programs,
            **options,
        )
    notes += found.restore.warnings
    recovery = found.recovery
    stopped = recovery is not None and any(result.outcome == "refused" for result in recovery.results)
    return Answer(
        _values(found, notes),
        lambda console: _show(console, found, notes),
        recovery.verdict if recovery is not None else None,
        refused=found.refused or stopped,
    )


def _values(found: InPlace, notes: tuple[str, ...]) -> dict[str, Any]:
    missing = found.restore.missing
    return {
        "table": str(found.table),
        "plan": found.plan.as_json(),
        "comparison": found.comparison.as_json() if found.comparison else None,
        "recovery": found.recovery.as_json() if found.recovery else None,
        "applied": found.recovery is not None and found.recovery.complete,
        "reached_lsn": str(found.reached_lsn),
        "backup": found.restore.backup.id,
        "whole_backup_because": found.whole_because or None,
        "left_out": list(found.state.left_out),
        "missing": missing.as_json() if missing else None,
        "warnings": list(notes),
    }


def _show(console: Console, found: InPlace, notes: tuple[str, ...]) -> None:
    rows = found.comparison
    if rows is not None:
        console.print(
            f"{escape(str(found.table))}: {rows.missing:,} rows are missing, {rows.changed:,} have changed since,"
            f" {rows.newer:,} are newer, {rows.same:,} are the same",
            soft_wrap=True,
        )
    _show_plan(console, found.plan)
    for thing in found.state.left_out:
        console.print(f"[yellow]left out[/] {escape(thing)}", soft_wrap=True)
    if found.whole_because:
        console.print(f"[yellow]note[/] the whole backup was fetched: {escape(found.whole_because)}")
    for note in notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    if found.recovery is not None:
        _show_recovery(console, found.recovery)
    elif found.plan.steps:
        console.print("carry it out with --apply")


def _show_plan(console: Console, plan: Plan) -> None:
    for reason in plan.refused:
        console.print(f"[bold red]refused[/] {escape(reason)}", soft_wrap=True)
    for step in plan.steps:
        console.print(f"[bold]plan {plan.id}[/] {escape(step.title)}", soft_wrap=True)
        console.print(f"  locks: {escape(step.locks)}", soft_wrap=True)
        console.print(f"  taken back by: {escape(step.undo)}", soft_wrap=True)
        loss = plan.expected_loss
        words = loss.detail or "nothing"
        console.print(f"  lost: {'nothing' if loss.nothing and not loss.detail else escape(words)}")


def _show_recovery(console: Console, recovery: Recovery) -> None:
    for result in recovery.results:
        colour = "green" if recovery.complete else "red"
        blocked = f", writers waited {seconds(result.blocked_seconds)}" if recovery.complete else ""
        console.print(f"[{colour}]{result.outcome}[/] {escape(result.detail)}{blocked}", soft_wrap=True)
        if copy := result.values.get("copy"):
            console.print(f"  the rows that were replaced: {escape(str(copy))}")
        if xid := result.values.get("xid"):
            console.print(f"  transaction {xid}: knockwood revert {xid} takes it back")
