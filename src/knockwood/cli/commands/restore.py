"""`knockwood restore`: a new cluster, or one table, beside the old."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.markup import escape

from knockwood.cli.answer import Answer, seconds
from knockwood.cli.common import DEFAULT, Common
from knockwood.cli.progress import byte_progress
from knockwood.operations.freshness import bring_up_to_date, require_complete
from knockwood.operations.restore import RestoreOutcome
from knockwood.operations.restore import restore as run_restore
from knockwood.repository.targets import Latest, parse_target


def register(app: App) -> None:
    app.command(restore)


def restore(
    *,
    to: Annotated[str, Parameter(help="latest, an LSN, a time with its zone, or before-XID.")] = "latest",
    into: Annotated[Path, Parameter(help="The folder of the new cluster; empty or not there yet.")],
    backup: Annotated[str | None, Parameter(help="From this backup; otherwise the best one.")] = None,
    accept_loss: Annotated[
        bool, Parameter(negative="", help="Restore as far as the archive reaches.")
    ] = False,
    promote: Annotated[bool, Parameter(help="Or leave it waiting, read-only, at the target.")] = True,
    again: Annotated[
        bool, Parameter(negative="", help="First remove what a killed restore left there.")
    ] = False,
    tablespaces: Annotated[
        Path | None, Parameter(help="Where tablespaces go; beside the folder otherwise.")
    ] = None,
    common: Common = DEFAULT,
) -> Answer:
    """Restore into a folder beside the running cluster, complete up to the target, or refuse."""
    target = parse_target(to)
    cluster = common.open_cluster()
    repository = cluster.repository()
    freshness = bring_up_to_date(cluster, repository) if target == Latest() else None
    if freshness is not None and not accept_loss:
        require_complete(freshness)
    with byte_progress("restore", quiet=common.json) as progress:
        outcome = run_restore(
            repository,
            target,
            into,
            backup=backup,
            accept_loss=accept_loss,
            promote=promote,
            again=again,
            tablespaces=tablespaces,
            progress=progress,
            programs_for=cluster.programs,
        )
    notes = (*((freshness.detail,) if freshness else ()), *outcome.warnings)
    return Answer(_values(outcome, notes), lambda console: _show(console, outcome, notes))


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
    commit = outcome.last_commit
    console.print(
        f"restored {outcome.plan.backup.id} into [bold]{escape(str(outcome.into))}[/] in {seconds(outcome.seconds)}"
    )
    console.print(f"reached {outcome.reached_lsn}, now on timeline {outcome.timeline}")
    if commit is not None:
        console.print(f"last commit contained: xid {commit.xid} at {commit.lsn}, {commit.time.isoformat()}")
    missing = outcome.plan.missing
    if missing is not None:
        end = f" to {missing.end}" if missing.end else ""
        console.print(
            f"[bold red]missing[/] WAL from {missing.start}{end}: {escape(missing.reason)}", soft_wrap=True
        )
        console.print(f"  at least {missing.commits} commits were seen that it does not hold")
    for warning in notes:
        console.print(f"[yellow]note[/] {escape(warning)}", soft_wrap=True)
    console.print("start it with:")
    for line in outcome.how_to_start:
        console.print(f"  {escape(line)}", soft_wrap=True)
