"""kill -9 of a backup's workers and of their parent: nothing is listed, and no worker stays behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from fix_archive import Archived
from fix_backup import KEEP_WAL, archiving, backed_up, repository_of, restored
from knockwood.errors import HostError, RefusedError
from knockwood.host import privileges, processes
from knockwood.postgres.connection import connect
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.listing import list_backups, read_object
from knockwood.repository.backups.take import Effort, take_backup

if TYPE_CHECKING:
    from fix_server import ServerFactory

_TAKE = """
import sys
from pathlib import Path
from knockwood.repository.backups.take import Effort, take_backup
from knockwood.repository.repository import Repository
from knockwood.repository.storage import open_storage
repository = Repository.open(open_storage(sys.argv[1]))
print("ready", flush=True)
effort = Effort(wal_timeout=30, processes=2, data_directory=Path(sys.argv[3]))
take_backup(repository, sys.argv[2], effort=effort)
"""


@pytest.fixture
def made(new_server: ServerFactory, shared_folder: Path, request: pytest.FixtureRequest) -> Archived:
    server = new_server(18, segment_megabytes=1, **KEEP_WAL)
    with connect(server.dsn()) as connection:
        connection.execute("create table t as select generate_series(1, 50000) as a")
    folder = shared_folder / f"workers-{abs(hash(request.node.nodeid)):x}"
    folder.mkdir()
    privileges.give(folder, server.account)
    return repository_of(server, folder / "repository")


def workers_of(pid: int) -> list[psutil.Process]:
    try:
        children = psutil.Process(pid).children()
        return [child for child in children if "take_worker" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def assert_gone(workers: list[psutil.Process]) -> None:
    # Where process 1 reaps nothing they stay zombies.
    deadline = time.monotonic() + 10
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)


def assert_listed_is_whole(made: Archived) -> None:
    inventory = WalArchive(made.repository).inventory()
    for backup in list_backups(made.repository):
        assert inventory.covers(backup.wal)
        for pack in backup.objects:
            for _ in read_object(made.repository, pack):
                pass


@pytest.mark.parametrize("victim", ["killed", "stopped and killed"])
def test_a_killed_worker_ends_the_backup_and_leaves_nothing(made: Archived, victim: str) -> None:
    seen: list[psutil.Process] = []

    def kill_one(_: object) -> None:
        if not seen:
            seen.extend(workers_of(os.getpid()))
            if victim != "killed":
                seen[0].suspend()
            seen[0].kill()

    # With one worker the end is not told to it before the first report: it is at work.
    effort = Effort(wal_timeout=30, processes=1, data_directory=made.server.data_directory)
    with (
        archiving(made),
        pytest.raises(HostError, match="worker process of the backup ended with signal SIGKILL"),
    ):
        take_backup(made.repository, made.server.dsn(), progress=kill_one, effort=effort)
    assert len(seen) == 1
    assert workers_of(os.getpid()) == []
    assert list(made.repository.storage.list("backups/")) == []


def test_a_backup_given_up_leaves_no_half_written_file_of_its_workers(made: Archived) -> None:
    with connect(made.server.dsn()) as connection:
        connection.execute(
            "create table r as select sha512(i::text::bytea) from generate_series(1, 400000) i"
        )

    asked: list[int] = []

    def give_up(_: object) -> None:
        # More than one request to end must not break off the removal that the first began.
        workers = workers_of(os.getpid())
        asked.append(len(workers))
        for _ in range(20):
            for worker in workers:
                worker.terminate()
            time.sleep(0.001)
        raise RefusedError("given up")

    effort = Effort(wal_timeout=30, processes=2, data_directory=made.server.data_directory)
    for _ in range(8):
        with pytest.raises(RefusedError, match="given up"):
            take_backup(made.repository, made.server.dsn(), progress=give_up, effort=effort)
        assert [path for path in made.root.rglob("*") if path.name.startswith(".tmp-")] == []
    assert len(asked) == 8
    assert all(asked), "no worker was at work"
    assert list(made.repository.storage.list("backups/")) == []


def killed_after(seconds: float, made: Archived) -> bool:
    """Take a backup in a process of its own and kill that; whether it was at work with its workers."""
    child = processes.start(
        [sys.executable, "-c", _TAKE, made.root, made.server.dsn(), made.server.data_directory],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin"},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    workers: list[psutil.Process] = []
    while not workers and child.poll() is None:
        workers = workers_of(child.pid)
        time.sleep(0.005)
    time.sleep(seconds)
    workers = workers or workers_of(child.pid)
    early = child.poll() is None
    child.send_signal(signal.SIGKILL) if early else None
    child.wait()
    child.stdout.close()
    assert_gone(workers)
    return early


@pytest.mark.parametrize("attempts", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_parent_takes_its_workers_along_and_nothing_is_listed(made: Archived, attempts: int) -> None:
    files = made.server.data_directory
    started = time.monotonic()
    first = backed_up(made, processes=2, data_directory=files)
    longest = time.monotonic() - started
    moments = random.Random(5)
    with archiving(made):
        hits = 0
        for number in range(attempts):
            # The first at once, while the workers begin.
            hits += killed_after(moments.uniform(0.0, longest) if number else 0.0, made)
            assert_listed_is_whole(made)
    assert hits > 0
    last = backed_up(made, processes=2, data_directory=files)
    listed = {backup.id for backup in list_backups(made.repository)}
    assert listed >= {first.id, last.id}
    assert {info.name.split("/")[1] for info in made.repository.storage.list("backups/")} == listed
    with (
        restored(made.repository, [last], made.root.parent / "a", made.server.programs) as server,
        connect(server.dsn()) as connection,
    ):
        assert connection.execute("select count(*) from t").fetchone() == (50000,)
