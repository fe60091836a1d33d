"""Run the checks on a clone, where they may read everything and take every lock."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Final

from knockwood.clone.spawn import Clone
from knockwood.errors import KnockwoodError
from knockwood.integrity.check import Invariant, Role, Subject
from knockwood.integrity.registry import all_checks
from knockwood.integrity.run import CheckProgress, Report, run_checks
from knockwood.postgres.connection import connect, server_facts, translated
from knockwood.repository.repository import Repository

ABOUT_THE_SERVER: Final = frozenset(
    {"backup_age", "configuration", "invalid_indexes", "proof_age", "wal_archive"}
)
"""Checks that ask how a production server is run or what it does now; a clone cannot answer them."""

_EXTENSIONS: Final = ("amcheck", "pg_visibility")


def names_for_a_clone() -> list[str]:
    """The checks that look at data, in the registry's order."""
    return [check.name for check in all_checks() if check.name not in ABOUT_THE_SERVER]


def examine(
    clone: Clone,
    names: Iterable[str],
    *,
    cluster: str,
    repository: Repository,
    invariants: tuple[Invariant, ...] = (),
    progress: Callable[[CheckProgress], None] | None = None,
) -> Report:
    """Check a clone, which is opened for writes first: it can never replay on after that.

    In recovery neither amcheck's deep checks get their locks nor can an extension be made that production
    lacks; the data are the same before and after.
    """
    clone.promote()
    with connect(clone.dsn()) as connection:
        with translated():
            # That of the promotion takes its time; until it is done the control file tells the old timeline.
            connection.execute("checkpoint")
        facts = server_facts(connection)
    subject = Subject(
        cluster=cluster,
        dsn=clone.dsn(),
        facts=facts,
        role=Role.CLONE,
        data_directory=clone.data_directory,
        repository=repository,
        programs=clone.programs,
        invariants=invariants,
    )
    for database in subject.databases():
        _add_extensions(clone.dsn(database))
    return run_checks(subject, names, progress=progress)


def _add_extensions(dsn: str) -> None:
    for extension in _EXTENSIONS:
        # Where it cannot be made, the checks that need it say that they were not run, and why.
        with contextlib.suppress(KnockwoodError), connect(dsn) as connection, translated():
            connection.execute("set default_transaction_read_only = off")
            connection.execute(f"create extension if not exists {extension}")
