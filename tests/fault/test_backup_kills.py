"""kill -9 while backups are taken, restored and expired: what is listed can be restored."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_archive import Archived
from fix_backup import KEEP_WAL, archiving, backed_up, repository_of, restored
from knockwood.errors import DirectoryNotEmptyError
from knockwood.host import privileges, processes
from knockwood.postgres.connection import connect
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.expire import expire
from knockwood.repository.backups.fetch import fetch_chain
from knockwood.repository.backups.listing import list_backups, read_object
from knockwood.repository.backups.model import chain

if TYPE_CHECKING:
    from fix_server import ServerFactory

_OPEN = """
import sys
from pathlib import Path
from knockwood.host import privileges
from knockwood.postgres.binaries import find_programs
from knockwood.repository.backups.expire import expire
from knockwood.repository.backups.fetch import fetch_chain
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.backups.model import chain
from knockwood.repository.backups.take import Effort, take_backup
from knockwood.repository.repository import Repository
from knockwood.repository.storage import open_storage
repository = Repository.open(open_storage(sys.argv[1]))
print("ready", flush=True)
"""

_TAKE = (
    _OPEN
    + """
take_backup(repository, sys.argv[2], incremental=sys.argv[3] == "incremental", effort=Effort(wal_timeout=30))
"""
)

_FETCH = (
    _OPEN
    + """
backups = list_backups(repository)
fetch_chain(repository, chain(backups, backups[-1].id), Path(sys.argv[2]),
    account=privileges.server_account(), programs=find_programs(18))
"""
)

_EXPIRE = (
    _OPEN
    + """
expire(repository, keep_count=1, apply=True)
"""
)


def killed_after(seconds: float, script: str, *arguments: str | Path) -> bool:
    """Run a script and kill it so long after it began; whether it was still at work."""
    child = processes.start(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin"},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    time.sleep(seconds)
    early = child.poll() is None
    child.send_signal(signal.SIGKILL) if early else None
    child.wait()
    child.stdout.close()
    return early


@pytest.fixture
def made(new_server: ServerFactory, shared_folder: Path, request: pytest.FixtureRequest) -> Archived:
    server = new_server(18, segment_megabytes=1, summarize_wal="on", **KEEP_WAL)
    with connect(server.dsn()) as connection:
        connection.execute("create table t as select generate_series(1, 50000) as a")
    folder = shared_folder / f"kills-{abs(hash(request.node.nodeid)):x}"
    folder.mkdir()
    privileges.give(folder, server.account)
    return repository_of(server, folder / "repository")


@pytest.fixture
def folder(made: Archived) -> Path:
    return made.root.parent


def assert_listed_is_whole(made: Archived) -> int:
    """Every listed backup has all its objects, undamaged, its ancestors and its WAL; how many there are."""
    backups = list_backups(made.repository)
    inventory = WalArchive(made.repository).inventory()
    for backup in backups:
        assert chain(backups, backup.id)[-1] == backup
        assert inventory.covers(backup.wal)
        for pack in backup.objects:
            for _ in read_object(made.repository, pack):
                pass
    return len(backups)


def sweep(attempts: int, longest: float, seed: int, once: Callable[[float], bool]) -> int:
    """Kill at moments spread over the work; how many kills hit it at work."""
    moments = random.Random(seed)
    hits = 0
    for _ in range(attempts):
        hits += once(moments.uniform(0.0, longest))
    return hits


@pytest.mark.parametrize("attempts", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_backup_is_never_listed_and_the_next_one_cleans_up(made: Archived, attempts: int) -> None:
    started = time.monotonic()
    backed_up(made)
    longest = time.monotonic() - started
    number = 0

    def once(moment: float) -> bool:
        nonlocal number
        number += 1
        kind = "incremental" if number % 2 else "full"
        hit = killed_after(moment, _TAKE, made.root, made.server.dsn(), kind)
        assert_listed_is_whole(made)
        return hit

    with archiving(made):
        assert sweep(attempts, longest, 1, once) > 0
    last = backed_up(made)
    listed = {backup.id for backup in list_backups(made.repository)}
    stored = {info.name.split("/")[1] for info in made.repository.storage.list("backups/")}
    assert stored == listed
    assert last.id in listed


@pytest.mark.parametrize("attempts", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_restore_cannot_start_and_the_next_one_succeeds(
    made: Archived, folder: Path, attempts: int
) -> None:
    backed_up(made)
    with connect(made.server.dsn()) as connection:
        connection.execute("insert into t select 0")
    second = backed_up(made, incremental=True)
    links = chain(list_backups(made.repository), second.id)
    programs, account = made.server.programs, privileges.server_account()
    into = folder / "into"
    started = time.monotonic()
    fetch_chain(made.repository, links, folder / "timed", account=account, programs=programs)
    longest = time.monotonic() - started

    def once(moment: float) -> bool:
        hit = killed_after(moment, _FETCH, made.root, into)
        done = (into / "global" / "pg_control").exists()
        assert done or hit
        if not done and into.exists() and any(into.iterdir()):
            with pytest.raises(DirectoryNotEmptyError, match="interrupted"):
                fetch_chain(made.repository, links, into, account=account, programs=programs)
        shutil.rmtree(into, ignore_errors=True)
        return hit

    assert sweep(attempts, longest, 2, once) > 0
    with restored(made.repository, links, into, programs) as server, connect(server.dsn()) as connection:
        assert connection.execute("select count(*) from t").fetchone() == (50001,)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("attempts", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_expiry_leaves_only_what_can_be_restored(
    made: Archived, folder: Path, attempts: int
) -> None:
    for incremental in (False, True, False, False):
        newest = backed_up(made, incremental=incremental)
    kept = folder / "kept"
    shutil.copytree(made.root, kept)
    started = time.monotonic()
    expire(made.repository, keep_count=1, apply=True)
    longest = time.monotonic() - started

    def once(moment: float) -> bool:
        shutil.rmtree(made.root)
        shutil.copytree(kept, made.root)
        hit = killed_after(moment, _EXPIRE, made.root)
        assert assert_listed_is_whole(made) >= 1
        plan = expire(made.repository, keep_count=1, apply=True)
        assert list(plan.kept) == [newest.id]
        assert assert_listed_is_whole(made) == 1
        stored = {info.name.split("/")[1] for info in made.repository.storage.list("backups/")}
        assert stored == {newest.id}
        first = min(WalArchive(made.repository).inventory().segments[newest.timeline])
        assert (first + 1) * newest.segment_bytes > newest.start_lsn.value
        return hit

    assert sweep(attempts, longest, 3, once) > 0
