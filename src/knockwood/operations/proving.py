"""Prove a cluster as the settings describe it, with its WAL arriving while that goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from knockwood.errors import PostgresError, WrongSystemError
from knockwood.model import Proof
from knockwood.operations.cluster import Cluster
from knockwood.operations.protect import wal_arriving
from knockwood.operations.prove import Options, Progress, prove
from knockwood.repository.repository import Repository
from knockwood.repository.targets import Target


def prove_cluster(
    cluster: Cluster, *, backup: str | None, target: Target, progress: Progress | None = None
) -> Proof:
    """Restore, check, compare with the live server and store the proof; see `prove`."""
    repository = cluster.repository()
    proof = cluster.settings.proof
    options = Options(
        backup=backup,
        target=target,
        invariants=cluster.invariants(),
        valid_for=proof.valid,
        data_directory=cluster.settings.data_directory,
        clones=proof.clones,
        programs_for=cluster.programs,
    )
    with _arriving_if_up(cluster, repository):
        return prove(repository, cluster.dsn, cluster=cluster.name, options=options, progress=progress)


@contextmanager
def _arriving_if_up(cluster: Cluster, repository: Repository) -> Iterator[None]:
    try:
        cluster.facts(repository.header.system_identifier)
    except WrongSystemError:
        raise
    except PostgresError:
        yield  # the primary is down: the repository is proved alone
        return
    with wal_arriving(cluster, repository, also_beside_push=True):
        yield
