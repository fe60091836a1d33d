"""`knockwood verify`: the repository at rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from knockwood.cli.answer import Answer, coloured, escape, megabytes, seconds
from knockwood.cli.common import DEFAULT, Common
from knockwood.cli.progress import spinner
from knockwood.repository.verify import Verification
from knockwood.repository.verify import verify as run_verify

if TYPE_CHECKING:
    from rich.console import Console


def verify(
    *,
    full: Annotated[bool, Parameter(negative="", help="Read again what earlier runs proved.")] = False,
    common: Common = DEFAULT,
) -> Answer:
    """Check the repository with no server: what can be restored, from when to when, and what cannot."""
    cluster = common.open_cluster()
    with spinner("verify", quiet=common.json) as tell:
        found = run_verify(
            cluster.repository(),
            full=full,
            programs_for=cluster.programs,
            progress=lambda part, done, total: tell(f"{part} {megabytes(done)} of {megabytes(total)}"),
        )
    values = {key: value for key, value in found.as_json().items() if key != "verdict"}
    return Answer(values, lambda console: _show(console, found), found.verdict)


def _show(console: Console, found: Verification) -> None:
    for window in found.windows:
        start = f"{window.start}" + (f" ({window.start_time.isoformat()})" if window.start_time else "")
        end = f"{window.end}" + (f" ({window.end_time.isoformat()})" if window.end_time else "")
        console.print(f"[green]recoverable[/] {start} to {end} on timeline {window.timeline}", soft_wrap=True)
    if not found.windows:
        console.print("[bold red]nothing can be restored from this repository[/]")
    for gap in found.gaps:
        times = " – ".join(t.isoformat() if t else "…" for t in (gap.start_time, gap.end_time))
        console.print(
            f"[bold red]cannot be restored[/] {gap.start} to {gap.end} on timeline {gap.timeline}"
            f" ({times}): {escape(gap.reason)}",
            soft_wrap=True,
        )
    for damage in found.damaged:
        lost = f", unreadable from {damage.start} to {damage.end}" if damage.start else ""
        console.print(
            f"[bold red]damaged[/] {escape(damage.object)}: {escape(damage.reason)}{lost}", soft_wrap=True
        )
    for unusable in (*found.unusable, *found.bad_backups):
        console.print(f"[red]backup[/] {unusable.backup}: {escape(unusable.reason)}", soft_wrap=True)
    for part in found.not_checked:
        console.print(f"[yellow]not checked[/] {escape(part.part)}: {escape(part.reason)}", soft_wrap=True)
    console.print(
        f"{found.backups} backups, {found.segments} WAL files, {megabytes(found.bytes_read)} read"
        f" in {seconds(found.seconds)}, {found.reused} objects proved before: {coloured(found.verdict)}"
    )
