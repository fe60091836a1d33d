"""`knockwood backup` and `knockwood backups`: take one, list them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from knockwood.cli.answer import Answer, coloured, escape, megabytes
from knockwood.cli.common import DEFAULT, Common
from knockwood.cli.progress import byte_progress
from knockwood.model import Verdict
from knockwood.repository.backups.listing import scan_backups
from knockwood.repository.backups.model import Backup

if TYPE_CHECKING:
    from rich.console import Console


def backup(
    *,
    incremental: Annotated[
        bool, Parameter(negative="", help="Only what changed; PostgreSQL 17 or newer.")
    ] = False,
    wal_timeout: Annotated[float, Parameter(help="Seconds to wait for the WAL that completes it.")] = 300,
    common: Common = DEFAULT,
) -> Answer:
    """Take a base backup; every page is verified on the way.

    It is listed once it is complete with the WAL that makes it consistent. Damaged pages do not stop it:
    its health is then broken, and they are listed.
    """
    # Whoever lists backups need not wait for what takes them.
    from knockwood.operations.protect import take

    cluster = common.open_cluster()
    with byte_progress("backup", quiet=common.json) as progress:
        made = take(cluster, incremental=incremental, progress=progress, wal_timeout=wal_timeout)

    def show(console: Console) -> None:
        console.print(
            f"[bold]{made.id}[/] {megabytes(made.raw_bytes)} stored as {megabytes(made.stored_bytes)}"
            f" in {(made.finished_at - made.started_at).total_seconds():.1f} s,"
            f" WAL {made.start_lsn} to {made.stop_lsn}"
        )
        _show_health(console, made)

    # Without data checksums nothing was found wrong, and nothing was proved right: that is said, as ever.
    return Answer({"backups": [as_json(made)]}, show, made.health.verdict)


def _show_health(console: Console, made: Backup) -> None:
    reason = f": {escape(made.health.reason)}" if made.health.reason else ""
    console.print(f"pages: {coloured(made.health.verdict)}{reason}", soft_wrap=True)
    for page in made.health.bad_pages[:20]:
        console.print(f"  {page.file} block {page.block}: {escape(page.reason)}")
    if made.health.bad_page_count > 20:
        console.print(f"  and {made.health.bad_page_count - 20} more; --json lists them")


def backups(*, common: Common = DEFAULT) -> Answer:
    """List the complete backups, oldest first."""
    found, unreadable = scan_backups(common.open_cluster().repository())

    def show(console: Console) -> None:
        if not found:
            console.print("no backups; take one with: knockwood backup")
        from rich.table import Table

        table = Table(box=None)
        for title in ("backup", "size", "stored", "from WAL", "pages"):
            table.add_column(title, no_wrap=True)
        for item in found:
            table.add_row(
                item.id,
                megabytes(item.raw_bytes),
                megabytes(item.stored_bytes),
                str(item.start_lsn),
                coloured(item.health.verdict),
            )
        if found:
            console.print(table)
        for error in unreadable:
            console.print(f"[red]cannot be read[/] {escape(str(error))}", soft_wrap=True)

    verdict = Verdict.BROKEN if unreadable else Verdict.HELD
    damaged = [{"object": error.where, "reason": error.what} for error in unreadable]
    return Answer({"backups": [as_json(item) for item in found], "damaged": damaged}, show, verdict)


def as_json(made: Backup) -> dict[str, Any]:
    """The JSON keys of one backup."""
    return {
        "id": made.id,
        "kind": made.kind,
        "parent": made.parent,
        "timeline": made.timeline,
        "start_lsn": str(made.start_lsn),
        "stop_lsn": str(made.stop_lsn),
        "time": made.finished_at.isoformat(),
        "seconds": (made.finished_at - made.started_at).total_seconds(),
        "bytes": made.raw_bytes,
        "stored_bytes": made.stored_bytes,
        "health": made.health.as_json(),
    }
