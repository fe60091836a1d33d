"""`knockwood prove`: restore, check, compare, and write it down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from knockwood.cli.answer import Answer, coloured, escape, megabytes, seconds
from knockwood.cli.common import DEFAULT, Common
from knockwood.cli.progress import spinner
from knockwood.model import Proof
from knockwood.operations.prove import Step
from knockwood.operations.proving import prove_cluster
from knockwood.repository.targets import parse_target

if TYPE_CHECKING:
    from rich.console import Console


def prove(
    *,
    backup: Annotated[str | None, Parameter(help="This backup; otherwise the newest.")] = None,
    to: Annotated[str, Parameter(help="latest, an LSN, or a time with its zone.")] = "latest",
    common: Common = DEFAULT,
) -> Answer:
    """Restore to the live server's last commit, run every check, compare every table, store the proof."""
    cluster = common.open_cluster()
    target = parse_target(to)
    with spinner("prove", quiet=common.json) as tell:

        def step(now: Step) -> None:
            size = f" {megabytes(now.done)} of {megabytes(now.total)}" if now.total > 1_000_000 else ""
            tell(f"{now.phase}{size} {now.current[-40:]}")

        proof = prove_cluster(cluster, backup=backup, target=target, progress=step)
    values = {key: value for key, value in proof.as_json().items() if key != "verdict"}
    return Answer(values, lambda console: _show(console, proof), proof.verdict)


def _show(console: Console, proof: Proof) -> None:
    for claim in proof.claims:
        detail = f" [dim]{escape(claim.detail)}[/]" if claim.detail else ""
        console.print(f"{coloured(claim.verdict)} {escape(claim.name)}{detail}", soft_wrap=True)
    commit = proof.last_commit
    if commit is not None:
        console.print(
            f"\nlast transaction contained: xid {commit.xid} at {commit.lsn}, {commit.time.isoformat()}"
        )
    lacking = "unknown" if proof.missing_commits is None else str(proof.missing_commits)
    console.print(
        f"commits missing: {lacking}; RTO {seconds(proof.rto_seconds)}, RPO {seconds(proof.rpo_seconds)}"
    )
    console.print(
        f"proof {proof.id}: {coloured(proof.verdict)}, valid until {proof.valid_until:%Y-%m-%d %H:%M} UTC"
    )
