"""`knockwood expire`: forget what the settings no longer keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from knockwood.cli.answer import Answer, escape
from knockwood.cli.common import DEFAULT, Common
from knockwood.repository.backups.expire import expire as run_expire

if TYPE_CHECKING:
    from rich.console import Console


def expire(
    *,
    apply: Annotated[bool, Parameter(negative="", help="Remove it; otherwise only shown.")] = False,
    common: Common = DEFAULT,
) -> Answer:
    """Show, and with --apply remove, the backups and WAL that the settings no longer keep."""
    cluster = common.open_cluster()
    wanted = cluster.settings.backup
    plan = run_expire(cluster.repository(), keep_time=wanted.keep, keep_count=wanted.keep_full, apply=apply)

    def show(console: Console) -> None:
        verb = "removed" if apply else "would remove"
        for item in plan.remove:
            console.print(f"{verb} backup {item.id}")
        for span in plan.wal_ranges:
            console.print(f"{verb} WAL {span}")
        for id, reason in sorted(plan.kept.items()):
            console.print(f"[dim]kept {id}: {escape(reason)}[/]")
        if not apply and (plan.remove or plan.remove_wal):
            console.print("remove it with: knockwood expire --apply")

    values = {
        "applied": apply,
        "backups": [item.id for item in plan.remove],
        "wal": [
            {"timeline": span.timeline, "from": str(span.start), "to": str(span.end)}
            for span in plan.wal_ranges
        ],
        "kept": dict(plan.kept),
    }
    return Answer(values, show)
