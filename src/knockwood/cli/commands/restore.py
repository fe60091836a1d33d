"""`knockwood restore`: a new cluster, or one table, beside the old."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from knockwood.cli.answer import Answer, escape, seconds
from knockwood.cli.commands.restore_in_place import in_place as put_back
from knockwood.cli.commands.restore_in_place import mode_of
from knockwood.cli.common import DEFAULT, Common
from knockwood.cli.progress import byte_progress
from knockwood.errors import UsageError
from knockwood.model import Timeline
from knockwood.operations.cluster import Cluster
from knockwood.operations.freshness import reaching
from knockwood.operations.restore import RestoreOutcome
from knockwood.operations.restore import restore as restore_cluster
from knockwood.repository.plans import Missing
from knockwood.repository.repository import Repository
from knockwood.repository.targets import Target, parse_target

if TYPE_CHECKING:
    from rich.console import Console

    from knockwood.operations.restore_table import TableOutcome


def restore(
    *,
    to: Annotated[str, Parameter(help="latest, an LSN, a time with its zone, or before-XID.")] = "latest",
    into: Annotated[Path | None, Parameter(help="The new cluster's folder; empty or not there yet.")] = None,
    table: Annotated[str | None, Parameter(help="Only this table: DATABASE.SCHEMA.TABLE.")] = None,
    file: Annotated[
        Path | None, Parameter(help="The table into this SQL file, not the live cluster.")
    ] = None,
    apply: Annotated[
        bool, Parameter(negative="", help="Bring the table back; otherwise only shown.")
    ] = False,
    in_place: Annotated[bool, Parameter(negative="", help="The table into its own place.")] = False,
    keep_current: Annotated[
        bool, Parameter(negative="", help="In place: rows that changed since stay as they are.")
    ] = False,
    keep_restored: Annotated[
        bool, Parameter(negative="", help="In place: rows that changed since become what they were.")
    ] = False,
    replace: Annotated[
        bool, Parameter(negative="", help="In place: all rows of now make way; a copy stays.")
    ] = False,
    backup: Annotated[str | None, Parameter(help="From this backup; otherwise the best one.")] = None,
    timeline: Annotated[int | None, Parameter(help="Along this timeline; otherwise the newest.")] = None,
    accept_loss: Annotated[bool, Parameter(negative="", help="As far as the archive reaches.")] = False,
    promote: Annotated[bool, Parameter(help="Or leave it waiting, read-only, at the target.")] = True,
    again: Annotated[bool, Parameter(negative="", help="First remove what a killed one left.")] = False,
    tablespaces: Annotated[Path | None, Parameter(help="Where tablespaces go; beside otherwise.")] = None,
    common: Common = DEFAULT,
) -> Answer:
    """Restore into a folder beside the running cluster, complete up to the target, or refuse.

    With --table one table comes back beside the live one, as knockwood_restored.TABLE_TIME, or with --in-place
    in its own place: what is missing comes back, what is newer stays.
    """
    target = parse_target(to)
    _either(into, table)
    mode = mode_of(keep_current=keep_current, keep_restored=keep_restored, replace=replace)
    _only_in_place(in_place, table, file, mode)
    cluster = common.open_cluster()
    repository = cluster.repository()
    choice: dict[str, Any] = {"backup": backup, "accept_loss": accept_loss}
    whole: dict[str, Any] = {"promote": promote, "again": again, "tablespaces": tablespaces}
    whole["timeline"] = Timeline(timeline) if timeline is not None else None

    def bring(notes: tuple[str, ...]) -> Answer:
        words = {**choice, "notes": notes, "quiet": common.json}
        if table is None:
            assert into is not None
            return _whole(cluster, repository, target, into, **words, **whole)
        if in_place:
            return put_back(cluster, repository, target, table, mode, apply=apply, **words)
        return _table(cluster, repository, target, table, file, apply=apply, **words)

    return reaching(cluster, repository, target, bring, accept_loss=accept_loss)


def _whole(
    cluster: Cluster,
    repository: Repository,
    target: Target,
    into: Path,
    *,
    notes: tuple[str, ...],
    quiet: bool,
    **choice: Any,
) -> Answer:
    """The whole cluster, into a folder."""
    with byte_progress("restore", quiet=quiet) as progress:
        outcome = restore_cluster(
            repository, target, into, progress=progress, programs_for=cluster.programs, **choice
        )
    notes += outcome.warnings
    return Answer(_values(outcome, notes), lambda console: _show(console, outcome, notes))


def _table(
    cluster: Cluster,
    repository: Repository,
    target: Target,
    table: str,
    file: Path | None,
    *,
    notes: tuple[str, ...],
    quiet: bool,
    **choice: Any,
) -> Answer:
    """One table beside the live one, or into a file."""
    # Whoever waits for a whole cluster need not wait for these.
    from knockwood.operations.restore_table import restore_table
    from knockwood.operations.warm import clone_to_read
    from knockwood.recover.table_definition import TableName

    with byte_progress("restore", quiet=quiet) as progress:
        brought = restore_table(
            repository,
            target,
            TableName.parse(table),
            live_dsn=None if file else cluster.dsn,
            file=file,
            progress=progress,
            programs_for=cluster.programs,
            warm=lambda plan: clone_to_read(cluster, repository, plan),
            **choice,
        )
    notes += brought.plan.warnings
    return Answer(_table_values(brought, notes), lambda console: _show_table(console, brought, notes))


def _either(into: Path | None, table: str | None) -> None:
    if (into is None) == (table is None):
        raise UsageError(
            "say either where a cluster goes, or which table comes back",
            hint="knockwood restore --to latest --into DIR, or --table DATABASE.SCHEMA.TABLE --apply",
        )


def _only_in_place(in_place: bool, table: str | None, file: Path | None, mode: str) -> None:
    if in_place and (table is None or file is not None):
        raise UsageError("--in-place is for one table of the live cluster", hint="name it with --table")
    if mode != "refuse" and not in_place:
        raise UsageError(f"--{mode} is for --in-place")


def _values(outcome: RestoreOutcome, notes: tuple[str, ...]) -> dict[str, object]:
    missing = outcome.plan.missing
    return {
        "into": str(outcome.into),
        "backup": outcome.plan.backup.id,
        "reached_lsn": str(outcome.reached_lsn),
        "last_commit": outcome.last_commit.as_json() if outcome.last_commit else None,
        "missing": missing.as_json() if missing else None,
        "timeline": outcome.timeline,
        "promoted": outcome.promoted,
        "seconds": round(outcome.seconds, 3),
        "how_to_start": list(outcome.how_to_start),
        "warnings": list(notes),
    }


def _show(console: Console, outcome: RestoreOutcome, notes: tuple[str, ...]) -> None:
    place = escape(str(outcome.into))
    console.print(f"restored {outcome.plan.backup.id} into [bold]{place}[/] in {seconds(outcome.seconds)}")
    console.print(f"reached {outcome.reached_lsn}, now on timeline {outcome.timeline}")
    commit = outcome.last_commit
    if commit is not None:
        console.print(f"last commit contained: xid {commit.xid} at {commit.lsn}, {commit.time.isoformat()}")
    _show_missing(console, outcome.plan.missing)
    _show_notes(console, notes)
    console.print("start it with:")
    for line in outcome.how_to_start:
        console.print(f"  {escape(line)}", soft_wrap=True)


def _table_values(outcome: TableOutcome, notes: tuple[str, ...]) -> dict[str, object]:
    missing = outcome.plan.missing
    return {
        "table": str(outcome.table),
        "destination": outcome.destination,
        "applied": outcome.applied,
        "steps": list(outcome.steps),
        "backup": outcome.plan.backup.id,
        "reached_lsn": str(outcome.reached_lsn) if outcome.reached_lsn else None,
        "rows": outcome.rows,
        "left_out": list(outcome.left_out),
        "whole_backup_because": outcome.whole_because or None,
        "missing": missing.as_json() if missing else None,
        "seconds": round(outcome.seconds, 3),
        "warnings": list(notes),
    }


def _show_table(console: Console, outcome: TableOutcome, notes: tuple[str, ...]) -> None:
    if not outcome.applied:
        console.print("the plan:")
        for number, step in enumerate(outcome.steps, 1):
            console.print(f"  {number}. {escape(step)}", soft_wrap=True)
        _show_missing(console, outcome.plan.missing)
        _show_notes(console, notes)
        console.print("carry it out with --apply")
        return
    where = escape(outcome.destination)
    rows = f"{outcome.rows:,}" if outcome.rows is not None else "unknown"
    console.print(f"{outcome.table} is back as [bold]{where}[/]: {rows} rows, in {seconds(outcome.seconds)}")
    for thing in outcome.left_out:
        console.print(f"[yellow]left out[/] {escape(thing)}", soft_wrap=True)
    if outcome.whole_because:
        reason = escape(outcome.whole_because)
        console.print(f"[yellow]note[/] the whole backup was fetched: {reason}", soft_wrap=True)
    _show_missing(console, outcome.plan.missing)
    _show_notes(console, notes)


def _show_missing(console: Console, missing: Missing | None) -> None:
    if missing is None:
        return
    end = f" to {missing.end}" if missing.end else ""
    console.print(
        f"[bold red]missing[/] WAL from {missing.start}{end}: {escape(missing.reason)}", soft_wrap=True
    )
    console.print(f"  at least {missing.commits} commits were seen that it does not hold")


def _show_notes(console: Console, notes: tuple[str, ...]) -> None:
    for note in notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
