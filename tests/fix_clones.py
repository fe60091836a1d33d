"""A protected server: its WAL received into a repository, its backups taken, its commits known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fix_receive import new_repository
from knockwood.clone import Registry
from knockwood.host import privileges
from knockwood.postgres.connection import connect
from knockwood.postgres.server import LocalServer
from knockwood.repository.backups.model import Backup
from knockwood.repository.backups.take import take_backup
from knockwood.repository.receive import Receiver, receiving
from knockwood.repository.repository import Repository
from knockwood.repository.targets import RestorePlan, parse_target, resolve


@dataclass
class Protected:
    """A running server whose WAL goes to `repository`. `folder` is open to the server's account."""

    server: LocalServer
    repository: Repository
    receiver: Receiver
    folder: Path

    @property
    def registry(self) -> Registry:
        return Registry(self.folder / "state")

    def execute(self, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        with connect(self.server.dsn(database)) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def insert(self, number: int) -> int:
        """One commit of one row; its transaction."""
        return int(
            self.execute(f"insert into t values ({number}) returning pg_current_xact_id()::text::bigint")[0][
                0
            ]
        )

    def flush(self) -> None:
        """All WAL so far is in the repository, the last segment as a partial one."""
        self.receiver.flush()

    def backup(self, incremental: bool = False) -> Backup:
        return take_backup(self.repository, self.server.dsn(), incremental=incremental)

    def plan(self, target: str, **options: Any) -> RestorePlan:
        self.flush()
        return resolve(self.repository, parse_target(target), **options)


@contextmanager
def protected(
    server: LocalServer,
    folder: Path,
    partial_every: float = 3600,
    dsn: str | None = None,
    **keys: tuple[str, ...],
) -> Iterator[Protected]:
    """Protect a running server; its table t is there, and empty. `keys` are the repository's, if any.

    The receiver follows `dsn`, where it is given.

    Partial segments are stored by `flush` only, unless asked for, so that none is replaced while a test reads it.
    """
    folder.mkdir()
    privileges.give(folder, server.account)
    with connect(server.dsn()) as connection:
        connection.execute("create table t (a bigint primary key)")
    repository = new_repository(server, folder / "repository", **keys)
    receiver = Receiver(
        repository,
        dsn or server.dsn(),
        folder / "receiver",
        programs=server.programs,
        partial_every=partial_every,
    )
    with receiving(receiver):
        yield Protected(server, repository, receiver, folder)


def rows(dsn: str, sql: str = "select a from t order by a") -> list[Any]:
    """The first column of a query."""
    with connect(dsn) as connection:
        return [row[0] for row in connection.execute(sql.encode()).fetchall()]


def one(dsn: str, sql: str) -> Any:
    return rows(dsn, sql)[0]
