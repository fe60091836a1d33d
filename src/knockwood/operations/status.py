"""A cluster at a glance: up to where it can be brought back, and how fresh its backups and proofs are."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from knockwood.errors import KnockwoodError, PostgresError
from knockwood.host import clock
from knockwood.integrity.ages import newest_proof, stale_backups, stale_proof
from knockwood.model import Commit, Lsn, Verdict, WalRange, WalSegment
from knockwood.operations.cluster import Cluster
from knockwood.recover.execute import unfinished
from knockwood.repository import gaps, receive_server
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.backups.model import Backup
from knockwood.repository.repository import Repository
from knockwood.repository.targets import Latest, resolve


@dataclass(frozen=True, slots=True)
class Status:
    """`rpo_seconds`: how much newer the live server's promises are than the archive.

    None when unknown; `not_checked` then says why.
    """

    cluster: str
    recoverable_until: Commit | None
    reached_lsn: Lsn | None
    rpo_seconds: float | None
    last_backup: Backup | None
    last_proof: dict[str, Any] | None
    open_gaps: int
    problems: tuple[str, ...]
    not_checked: str = ""

    @property
    def verdict(self) -> Verdict:
        """Broken without a way back or with a gap; not checked where the server did not answer."""
        if self.problems or self.open_gaps:
            return Verdict.BROKEN
        return Verdict.NOT_CHECKED if self.rpo_seconds is None else Verdict.HELD

    def as_json(self) -> dict[str, Any]:
        until = self.recoverable_until
        backup = self.last_backup
        return {
            "name": self.cluster,
            "verdict": str(self.verdict),
            "recoverable_until": {
                "lsn": str(self.reached_lsn) if self.reached_lsn else None,
                "time": until.time.isoformat() if until else None,
                "xid": until.xid if until else None,
            },
            "rpo_seconds": self.rpo_seconds,
            "last_backup": {"id": backup.id, "time": backup.finished_at.isoformat()} if backup else None,
            "last_proof": self.last_proof,
            "open_gaps": self.open_gaps,
            "open_incidents": None,
            "problems": list(self.problems),
            "not_checked": self.not_checked or None,
        }


def status(cluster: Cluster) -> Status:
    """Look at one cluster; what cannot be told is a problem named, never an exception."""
    problems: list[str] = []
    try:
        repository = cluster.repository()
    except KnockwoodError as error:
        return Status(cluster.name, None, None, None, None, None, 0, (str(error),))
    commit, reached = _recoverable(cluster, repository, problems)
    backups = list_backups(repository)
    if not backups:
        problems.append("there is no base backup: knockwood backup")
    problems += _repairs(cluster)
    proof = newest_proof(repository)
    problems += _stale(cluster, backups, proof)
    shown = {key: proof.get(key) for key in ("id", "verdict", "taken_at", "valid_until")} if proof else None
    unknown_gaps = [gap for gap in gaps.list_gaps(repository) if gap.acknowledged is None]
    behind, unknown = _behind(cluster, repository, clock.now())
    allowed = cluster.settings.objectives.rpo.total_seconds()
    if behind is not None and behind > allowed:
        problems.append(
            f"the archive is {behind:.0f} s behind the server, the objective is {allowed:.0f} s:"
            " is `knockwood wal receive` running?"
        )
    return Status(
        cluster.name,
        commit,
        reached,
        behind,
        backups[-1] if backups else None,
        shown,
        len(unknown_gaps),
        tuple(problems),
        unknown,
    )


def _stale(cluster: Cluster, backups: list[Backup], proof: dict[str, Any] | None) -> list[str]:
    """What is too old. That there is none at all is shown already."""
    now, schedule = clock.now(), cluster.schedule()
    found = [f"{one.summary}: knockwood backup" for one in stale_backups(backups, schedule, now) if backups]
    if proof is not None:
        found += [f"{one.summary}: knockwood prove" for one in stale_proof(proof, schedule, now)]
    return found


def _repairs(cluster: Cluster) -> list[str]:
    """Repairs that were killed or have failed: the cluster may be half mended."""
    try:
        entries = unfinished(cluster.state, cluster.name)
    except KnockwoodError as error:
        return [str(error)]
    return [
        f"a recovery begun {entry.started_at:%Y-%m-%d %H:%M:%S} UTC has not come to its end:"
        " knockwood recover --resume, or --roll-back"
        for entry in entries
    ]


def _recoverable(
    cluster: Cluster, repository: Repository, problems: list[str]
) -> tuple[Commit | None, Lsn | None]:
    try:
        plan = resolve(repository, Latest(), programs_for=cluster.programs)
    except KnockwoodError as error:
        problems.append(str(error))
        return None, None
    return plan.last_commit, plan.target_lsn or plan.backup.stop_lsn


def _behind(cluster: Cluster, repository: Repository, now: datetime) -> tuple[float | None, str]:
    """Seconds between the newest archived WAL and now, 0 if the archive holds all that was flushed.

    Where that is unknown None, and why.
    """
    try:
        promised = receive_server.flushed(cluster.dsn).flush
        timeline = receive_server.identify(cluster.dsn).history.timeline
    except PostgresError as error:
        return None, f"the server does not answer: {error}"
    # The last byte promised: after a switch the position is the start of a segment with nothing in it.
    last = Lsn(max(promised.value - 1, 0))
    start = WalSegment.containing(timeline, last, repository.header.segment_bytes).start
    if WalArchive(repository).inventory().covers(WalRange(timeline, min(start, promised), promised)):
        return 0.0, ""
    newest = max((info.modified for info in repository.storage.list("wal/")), default=None)
    if newest is None:
        return None, "the archive holds no WAL yet"
    return max(0.0, (now - newest).total_seconds()), ""
