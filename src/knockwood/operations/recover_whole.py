"""The restore of a whole cluster in place: its handler, and what can be claimed while the server is stopped."""

from __future__ import annotations

import contextlib
from pathlib import Path

from knockwood.errors import KnockwoodError
from knockwood.host import files, privileges, processes
from knockwood.model import Claim, Verdict
from knockwood.model.recovery import Plan
from knockwood.operations import half_done
from knockwood.operations.cluster import Cluster
from knockwood.operations.half_done import HalfDone
from knockwood.operations.restore import restore
from knockwood.postgres.binaries import Programs
from knockwood.recover.cluster import KIND, RestoreInPlace
from knockwood.recover.cluster_wal import salvage
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.repository import Repository
from knockwood.repository.targets import Latest, parse_target


def in_place(cluster: Cluster, repository: Repository, plan: Plan) -> RestoreInPlace:
    """The handler for the plan's one step of this kind."""
    words = next(step.arguments for step in plan.steps if step.kind == KIND)
    target = parse_target(str(words["to"]))
    data = Path(str(words["data_directory"]))

    def bring_back(into: Path, tablespaces: Path) -> str:
        # Of a restore that was complete, but whose end is not written down, nobody knows what it reached.
        if HalfDone.read(into) is None or half_done.complete(into):
            _discard(into, tablespaces)
        outcome = restore(
            repository,
            target,
            into,
            backup=str(words["backup"]),
            again=True,
            tablespaces=tablespaces,
            programs_for=cluster.programs,
            account=privileges.server_account(data),
        )
        commit = outcome.last_commit
        last = (
            f", the last commit contained is xid {commit.xid} of {commit.time.isoformat()}" if commit else ""
        )
        return f"restored {outcome.plan.backup.id} to {outcome.reached_lsn}{last}"

    def save_wal(stopped: Path) -> None:
        if isinstance(target, Latest):
            salvage(repository, stopped)
            return
        # An older target needs none of it, and a disk that is gone must not keep anyone from it.
        with contextlib.suppress(KnockwoodError):
            salvage(repository, stopped)

    def pg_ctl() -> Path:
        return _programs(cluster, repository, str(words["backup"])).path("pg_ctl")

    return RestoreInPlace(bring_back, _discard, save_wal, pg_ctl)


def _discard(into: Path, tablespaces: Path) -> None:
    """Remove a restore, complete or not; what tells where its parts are goes last."""
    state = HalfDone.read(into)
    for folder in (state.sockets if state else None, tablespaces, into):
        if folder is not None:
            files.remove_tree(folder)


def _programs(cluster: Cluster, repository: Repository, backup: str) -> Programs:
    major = next(each.major for each in list_backups(repository) if each.id == backup)
    return cluster.programs(major)


def claims_offline(cluster: Cluster, plan: Plan) -> tuple[Claim, ...]:
    """What the stopped cluster itself can be asked: its state and its pages. The rest is not checked."""
    words = next(step.arguments for step in plan.steps if step.kind == KIND)
    data = Path(str(words["data_directory"]))
    try:
        repository = cluster.repository()
        programs = _programs(cluster, repository, str(words["backup"]))
        pages = _checksums(programs, data)
    except (KnockwoodError, StopIteration) as error:
        pages = Claim("page checksums of the restored cluster", Verdict.NOT_CHECKED, str(error))
    return (
        pages,
        Claim(
            "checks and invariants",
            Verdict.NOT_CHECKED,
            "the server is stopped: start it, then run knockwood check",
        ),
    )


def _checksums(programs: Programs, data: Path) -> Claim:
    name = "page checksums of the restored cluster"
    command: list[str | Path] = [programs.path("pg_checksums"), "--check", "-D", data]
    done = processes.run(command, account=privileges.server_account(data), env={"LC_ALL": "C"}, check=False)
    said = (done.err.strip() or done.out.strip()).splitlines()
    if done.status == 0:
        return Claim(name, Verdict.HELD, next((line for line in said if "Blocks scanned" in line), ""))
    last = said[-1] if said else f"status {done.status}"
    unknown = "not enabled" in last or "must be shut down" in last
    return Claim(name, Verdict.NOT_CHECKED if unknown else Verdict.BROKEN, last)
