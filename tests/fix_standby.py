"""A standby beside a server, to be promoted in its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import psycopg
import pytest

from knockwood.host import privileges
from knockwood.model.wal import Lsn
from knockwood.postgres.server import LocalServer


@pytest.fixture
def standby_of() -> Iterator[Callable[[LocalServer], LocalServer]]:
    """Make a standby of a server by copying it cold; stopped afterwards."""
    made: list[LocalServer] = []

    def make(primary: LocalServer) -> LocalServer:
        primary.stop()
        data = primary.data_directory.parent / "standby"
        shutil.copytree(primary.data_directory, data, symlinks=True)
        data.chmod(0o700)
        (data / "standby.signal").touch()
        privileges.give_tree(data, primary.account)
        primary.start()
        standby = LocalServer(
            primary.programs,
            data,
            account=primary.account,
            settings={**primary.settings, "primary_conninfo": primary.dsn()},
        )
        made.append(standby)
        standby.start(until="standby")
        return standby

    yield make
    for server in made:
        server.stop("immediate")


def either(*servers: LocalServer) -> str:
    """A connection string that finds the primary among servers."""
    hosts = ",".join(str(server.socket_directory) for server in servers)
    return f"host={hosts} user=postgres dbname=postgres target_session_attrs=primary"


def promote(standby: LocalServer) -> None:
    with psycopg.connect(standby.dsn(), autocommit=True) as connection:
        assert connection.execute("select pg_promote(true, 30)").fetchone() == (True,)


def caught_up(standby: LocalServer, lsn: Lsn) -> None:
    with psycopg.connect(standby.dsn(), autocommit=True) as connection:
        while True:
            row = connection.execute("select pg_last_wal_replay_lsn()::text").fetchone()
            assert row is not None
            if Lsn.parse(row[0]) >= lsn:
                return
