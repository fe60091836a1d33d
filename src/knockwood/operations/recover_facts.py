"""What a decision about repairs rests on, asked of the server, the repository and the checks just run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg

from knockwood.errors import KnockwoodError
from knockwood.host import files
from knockwood.integrity.ages import newest_proof
from knockwood.integrity.catalog import relations
from knockwood.integrity.check import Budget, Subject
from knockwood.integrity.run import Report
from knockwood.model import Finding, Verdict
from knockwood.model.recovery import ExpectedLoss
from knockwood.operations.beside import GoOn
from knockwood.operations.cluster import Cluster
from knockwood.operations.freshness import reaching
from knockwood.operations.recoveries import aware
from knockwood.postgres.connection import Connection, translated
from knockwood.postgres.pages import PAGE_BYTES
from knockwood.recover.plan.situation import Rates, Reach, RelationFact, Situation, WholeRestore
from knockwood.repository.repository import Repository
from knockwood.repository.targets import Latest, RestorePlan, Target, resolve


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
    """Everything known but the restore of the whole (`whole_restore`); what could not be asked is None."""
    known = _relations(subject, findings)
    proof = _proof(repository)
    return Situation(
        cluster=cluster.name,
        major=subject.facts.major if subject else None,
        reach=_reach(subject, cluster),
        server_up=subject is not None,
        in_recovery=subject.facts.in_recovery if subject else None,
        superuser=subject.facts.is_superuser if subject else None,
        checksums=subject.facts.checksums if subject else None,
        standbys=_standbys(subject),
        latest_proof=proof[0],
        checked={result.name: result.verdict for result in report.results} if report else {},
        relations=known,
        rates=Rates(_scan_rate(report, known), proof[1]),
        xids=wish.xids,
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


def _proof(repository: Repository | None) -> tuple[Verdict | None, float | None]:
    """What the newest proof says, and how long it took to restore."""
    try:
        proof = newest_proof(repository) if repository else None
        return (Verdict(proof["verdict"]), float(proof["rto_seconds"])) if proof else (None, None)
    except (KnockwoodError, KeyError, ValueError, TypeError):
        return None, None


def _scan_rate(report: Report | None, known: Mapping[str, RelationFact]) -> float | None:
    """How fast the checks have read the tables just now, in bytes per second."""
    total = sum(relation.bytes or 0 for relation in known.values())
    for result in report.results if report else ():
        if result.name == "page_checksums" and result.seconds > 0.05 and total:
            return total / result.seconds
    return None


def whole_restore(
    cluster: Cluster, repository: Repository | None, wish: Wish, go_on: GoOn
) -> WholeRestore | None:
    """What restoring the whole cluster in place would need and lose; the WAL up to there is read where it is ordered,
    or a target has to be found in it."""
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

    def lead(_notes: tuple[str, ...] = ()) -> RestorePlan:
        return resolve(
            repository,
            wish.target,
            unread=latest and not wish.in_place,
            programs_for=cluster.programs,
            progress=lambda _done, _total: go_on(),
        )

    try:
        plan = lead() if latest else reaching(cluster, repository, wish.target, lead)
    except KnockwoodError as error:
        return WholeRestore(**words, expected_loss=loss, refused=str(error))
    if wish.in_place:
        told = aware(repository, plan).warnings
        loss = replace(loss, detail="; ".join([loss.detail, *told]))
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
        unread=plan.unread,
    )
