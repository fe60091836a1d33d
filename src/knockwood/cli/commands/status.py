"""`knockwood status`: everything at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from knockwood.cli.answer import Answer, coloured, escape, seconds
from knockwood.cli.common import DEFAULT, Common
from knockwood.model import worst
from knockwood.operations.cluster import Cluster
from knockwood.operations.status import Status
from knockwood.operations.status import status as look
from knockwood.settings import choose_cluster, load

if TYPE_CHECKING:
    from rich.console import Console


def status(*, common: Common = DEFAULT) -> Answer:
    """Up to where each cluster can be brought back, and how fresh its backups and proofs are."""
    settings = load(common.config)
    names = [choose_cluster(settings, common.cluster)[0]] if common.cluster else sorted(settings.cluster)
    found = [look(Cluster.of(settings, name)) for name in names]

    def show(console: Console) -> None:
        for one in found:
            _show(console, one)

    return Answer({"clusters": [one.as_json() for one in found]}, show, worst(one.verdict for one in found))


def _show(console: Console, one: Status) -> None:
    console.print(f"[bold]{one.cluster}[/] {coloured(one.verdict)}")
    until = one.recoverable_until
    if until is not None:
        console.print(f"  recoverable to  {until.time.isoformat()} (xid {until.xid}, {until.lsn})")
    elif one.reached_lsn is not None:
        console.print(f"  recoverable to  {one.reached_lsn}")
    behind = one.not_checked if one.rpo_seconds is None else seconds(one.rpo_seconds)
    console.print(f"  archive behind  {escape(behind)}")
    backup = one.last_backup
    console.print(f"  last backup     {backup.id if backup else 'none'}")
    proof = one.last_proof
    told = f"{proof['id']} {proof['verdict']}, valid until {proof['valid_until']}" if proof else "none"
    console.print(f"  last proof      {told}")
    if one.open_gaps:
        console.print(f"  [red]{one.open_gaps} gaps in the WAL: knockwood wal gaps[/]")
    for problem in one.problems:
        console.print(f"  [red]{escape(problem)}[/]", soft_wrap=True)
