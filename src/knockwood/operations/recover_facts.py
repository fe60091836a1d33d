"""What a decision about repairs rests on, asked of the server, the repository and the checks just run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg

from knockwood.errors import KnockwoodError
from knockwood.host import files
from knockwood.integrity.catalog import relations
from knockwood.integrity.check import Budget, Subject
from knockwood.integrity.checks.proof_age import newest_proof
from knockwood.integrity.run import Report
from knockwood.model import Finding, Verdict
from knockwood.model.recovery import ExpectedLoss
from knockwood.operations.cluster import Cluster
from knockwood.postgres.connection import Connection, translated
from knockwood.postgres.pages import PAGE_BYTES
from knockwood.recover.plan.situation import Rates, Reach, RelationFact, Situation, WholeRestore
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.repository import Repository
from knockwood.repository.targets import Latest, Target, resolve


@dataclass(frozen=True, slots=True)
class Wish:
    """What the operator asked for: culprits, and the whole cluster in place at a target."""

    xids: tuple[int, ...] = ()
    in_place: bool = False
    target: Target = field(default_factory=Latest)
    target_text: str = "latest"


def subject_of(cluster: Cluster, repository: Repository | None) -> tuple[Subject | None, str]:
    """The running server, or None and why it cannot be asked."""
    try:
        return cluster.subject(Budget(), repository=repository), ""
    except KnockwoodError as error:
        return None, str(error)


def situation(
    cluster: Cluster,
    repository: Repository | None,
    subject: Subject | None,
    findings: Iterable[Finding],
    report: Report | None,
    wish: Wish,
) -> Situation:
    """Everything known; what could not be asked is None."""
    known = _relations(subject, findings)
    return Situation(
        cluster=cluster.name,
        major=subject.facts.major if subject else None,
        reach=_reach(subject, cluster),
        server_up=subject is not None,
        in_recovery=subject.facts.in_recovery if subject else None,
        superuser=subject.facts.is_superuser if subject else None,
        checksums=subject.facts.checksums if subject else None,
        standbys=_standbys(subject),
        latest_proof=_proof(repository),
        checked={result.name: result.verdict for result in report.results} if report else {},
        relations=known,
        rates=_rates(repository, report, known),
        xids=wish.xids,
        whole=_whole(cluster, repository, wish),
    )


def _reach(subject: Subject | None, cluster: Cluster) -> Reach | None:
    folder = cluster.settings.data_directory
    if folder is not None and (folder / "PG_VERSION").is_file():
        return "local"
    return "remote" if subject else None


def _relations(subject: Subject | None, findings: Iterable[Finding]) -> Mapping[str, RelationFact]:
    """The relations of the databases that were found damaged; one that cannot be read is left out."""
    known: dict[str, RelationFact] = {}
    if subject is None:
        return known
    for database in sorted({f.location.database for f in findings if f.location.database}):
        try:
            with subject.connect(database) as connection:
                for each in relations(connection, database):
                    size = each.pages * PAGE_BYTES if each.pages > 0 else None
                    known[each.path] = RelationFact(database, each.name, each.kind, each.persistence, size)
        except (KnockwoodError, psycopg.Error):
            continue
    return known


def _standbys(subject: Subject | None) -> tuple[str, ...] | None:
    if subject is None:
        return None

    def ask(connection: Connection) -> list[tuple[Any, ...]]:
        return connection.execute(
            "select application_name from pg_catalog.pg_stat_replication where application_name !~ '^knockwood'"
            " and state = 'streaming' order by 1"
        ).fetchall()

    try:
        with subject.connect() as connection, translated():
            return tuple(row[0] for row in ask(connection))
    except KnockwoodError:
        return None


def _proof(repository: Repository | None) -> Verdict | None:
    try:
        proof = newest_proof(repository) if repository else None
        return Verdict(proof["verdict"]) if proof else None
    except (KnockwoodError, KeyError, ValueError):
        return None


def _rates(repository: Repository | None, report: Report | None, known: Mapping[str, RelationFact]) -> Rates:
    """How fast backups were read here, and how fast the checks have read the tables just now."""
    scan = None
    for result in report.results if report else ():
        total = sum(relation.bytes or 0 for relation in known.values())
        if result.name == "page_checksums" and result.seconds > 0.05 and total:
            scan = total / result.seconds
    return Rates(copy=_copy_rate(repository), scan=scan)


def _copy_rate(repository: Repository | None) -> float | None:
    try:
        backups = list_backups(repository) if repository else []
    except KnockwoodError:
        return None
    for backup in reversed(backups):
        lasted = (backup.finished_at - backup.started_at).total_seconds()
        if backup.raw_bytes and lasted > 0:
            return backup.raw_bytes / lasted
    return None


def _whole(cluster: Cluster, repository: Repository | None, wish: Wish) -> WholeRestore | None:
    if repository is None:
        return None
    latest = isinstance(wish.target, Latest)
    loss = (
        ExpectedLoss(
            0, 0, "nothing: what the stopped server's pg_wal has and the archive lacks is archived first"
        )
        if latest
        else ExpectedLoss(None, None, f"everything committed after {wish.target_text}")
    )
    words: dict[str, Any] = {"target": wish.target_text, "ordered": wish.in_place, "rows_back": not latest}
    folder = cluster.settings.data_directory
    try:
        plan = resolve(repository, wish.target, programs_for=cluster.programs)
    except KnockwoodError as error:
        return WholeRestore(**words, expected_loss=loss, refused=str(error))
    return WholeRestore(
        **words,
        backup=plan.backup.id,
        backup_bytes=sum(link.raw_bytes for link in plan.chain),
        wal_bytes=sum(piece.segment.bytes for piece in plan.wal),
        free_bytes=files.free_bytes(folder) if folder else None,
        expected_loss=loss,
        arguments={"data_directory": str(folder), "to": wish.target_text, "backup": plan.backup.id}
        if folder
        else {},
        refused=None if folder else "data_directory is not set for this cluster",
    )
