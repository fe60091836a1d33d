"""Run the checks where they belong: light ones on the server, heavy ones on a clone of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

from knockwood.clone.spawn import spawn
from knockwood.errors import KnockwoodError, RepositoryError
from knockwood.integrity.check import Budget, CheckResult, NotChecked, Weight
from knockwood.integrity.registry import select
from knockwood.integrity.run import CheckProgress, Report, run_checks
from knockwood.operations.cluster import Cluster
from knockwood.operations.examination import examine
from knockwood.operations.shadow import hold_findings
from knockwood.repository.repository import Repository
from knockwood.repository.targets import Latest, resolve

Progress = Callable[[CheckProgress], None]


def check(
    cluster: Cluster,
    names: Iterable[str] = (),
    *,
    heavy: bool = False,
    here: bool = False,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check the cluster: the light checks, with `heavy` all of them, or just the named ones.

    Heavy checks run on a clone restored from the repository to the last commit, unless `here` asks for
    them on the server itself. Without a repository, or when no clone can be made, they are not checked.
    Damage found holds the cluster's shadow, if it has one.
    Raises UsageError for an unknown name, and PostgresError when the server cannot be reached at all.
    """
    wanted = list(names)
    chosen = select(wanted or None, None if wanted or heavy else [Weight.LIGHT])
    repository = _repository(cluster)
    subject = cluster.subject(budget or Budget(), repository=repository)
    on_server = [item.name for item in chosen if here or item.weight is Weight.LIGHT]
    on_clone = [item.name for item in chosen if item.name not in on_server]
    results: list[CheckResult] = []
    if on_server:
        results += run_checks(subject, on_server, progress=progress).results
    if on_clone:
        results += _on_clone(cluster, repository, on_clone, progress)
    report = Report(tuple(results))
    # A shadow whose folder cannot be written to cannot go on either: then there is nothing to hold.
    with suppress(KnockwoodError):
        hold_findings(cluster, report.findings)
    return report


def _repository(cluster: Cluster) -> Repository | None:
    try:
        return cluster.repository()
    except RepositoryError:
        return None


def _on_clone(
    cluster: Cluster, repository: Repository | None, names: list[str], progress: Progress | None
) -> tuple[CheckResult, ...]:
    if repository is None:
        return _not_checked(
            names, "heavy checks run on a clone and there is no repository; --here runs them here"
        )
    try:
        plan = resolve(repository, Latest(), programs_for=cluster.programs)
        clone = spawn(repository, plan, programs=cluster.programs(plan.chain[-1].major), purpose="check")
    except KnockwoodError as error:
        return _not_checked(names, f"no clone could be made: {error}")
    with clone:
        report = examine(
            clone,
            names,
            cluster=cluster.name,
            repository=repository,
            invariants=cluster.invariants(),
            progress=progress,
        )
    return report.results


def _not_checked(names: list[str], reason: str) -> tuple[CheckResult, ...]:
    return tuple(CheckResult(name, (), (NotChecked(name, reason),), 0.0) for name in names)
