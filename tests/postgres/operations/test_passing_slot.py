"""A slot made for one command goes with it, also when it was killed; a standing receiver keeps its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fix_receive import new_repository
from fix_server import ServerFactory
from knockwood.operations import protect
from knockwood.operations.cluster import Cluster
from knockwood.postgres.connection import connect
from knockwood.postgres.server import LocalServer
from knockwood.repository.receive_events import ReceiverEvent
from knockwood.repository.repository import Repository
from knockwood.settings import ClusterSettings

_KILLED = """
import sys
from pathlib import Path
from knockwood.operations import protect
from knockwood.operations.cluster import Cluster
from knockwood.settings import ClusterSettings
dsn, repository, programs, state = sys.argv[1:]
settings = ClusterSettings(dsn=dsn, repository=repository, programs=Path(programs))
cluster = Cluster("shop", settings, Path(state))
with protect.wal_arriving(cluster, cluster.repository()):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def server(new_server: ServerFactory) -> LocalServer:
    return new_server(18, segment_megabytes=1)


@pytest.fixture
def repository(server: LocalServer, tmp_path: Path) -> Repository:
    return new_repository(server, tmp_path / "repository")


@pytest.fixture
def cluster(server: LocalServer, repository: Repository, tmp_path: Path) -> Cluster:
    settings = ClusterSettings(
        dsn=server.dsn(), repository=repository.storage.url, programs=server.programs.folder
    )
    return Cluster("shop", settings, tmp_path / "state")


def _slots(server: LocalServer) -> list[str]:
    with connect(server.dsn()) as connection:
        rows = connection.execute("select slot_name from pg_replication_slots").fetchall()
    return [str(row[0]) for row in rows]


def _kill_one(cluster: Cluster, server: LocalServer) -> None:
    words = [server.dsn(), cluster.settings.repository, str(server.programs.folder), str(cluster.state)]
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.kill()
        assert child.wait() == -signal.SIGKILL


def test_the_slot_of_a_killed_command_goes_with_the_next(
    server: LocalServer, cluster: Cluster, repository: Repository
) -> None:
    with protect.wal_arriving(cluster, repository):
        assert _slots(server) == ["knockwood"]
    assert _slots(server) == []
    _kill_one(cluster, server)
    assert _slots(server) == ["knockwood"]
    with protect.wal_arriving(cluster, repository):
        assert _slots(server) == ["knockwood"]
    assert _slots(server) == []
    assert not list(cluster.state.rglob("passing-slot-*"))


def test_where_the_server_pushes_it_goes_at_once(
    server: LocalServer, cluster: Cluster, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    _kill_one(cluster, server)
    monkeypatch.setattr(protect, "_pushes", lambda _: True)
    with protect.wal_arriving(cluster, repository):
        assert _slots(server) == []


def test_a_standing_receiver_makes_the_slot_its_own(
    server: LocalServer, cluster: Cluster, repository: Repository
) -> None:
    _kill_one(cluster, server)
    stop = threading.Event()

    def ended_when_it_streams(event: ReceiverEvent) -> None:
        if event.kind == "streaming":
            stop.set()

    protect.receive_forever(cluster, ended_when_it_streams, stop, wait=30)
    assert _slots(server) == ["knockwood"]
    with protect.wal_arriving(cluster, repository):
        pass
    assert _slots(server) == ["knockwood"]


def test_somebody_elses_slot_stays(server: LocalServer, cluster: Cluster, repository: Repository) -> None:
    with connect(server.dsn()) as connection:
        connection.execute("select pg_create_physical_replication_slot('knockwood', true)")
    with protect.wal_arriving(cluster, repository):
        assert _slots(server) == ["knockwood"]
    assert _slots(server) == ["knockwood"]
