"""kill -9 at any moment of a clone or a restore: nothing is left that a sweep does not remove or name."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from fix_clones import Protected, protected, rows
from knockwood.clone import Registry
from knockwood.errors import DirectoryNotEmptyError, PostgresError
from knockwood.operations import half_done
from knockwood.operations.half_done import WORK
from knockwood.operations.restore import restore
from knockwood.postgres.server import LocalServer
from knockwood.repository.targets import Latest

if TYPE_CHECKING:
    from fix_server import ServerFactory

_OPEN = """
import sys
from pathlib import Path
from knockwood.clone import Registry, spawn
from knockwood.operations.restore import restore
from knockwood.repository.repository import Repository
from knockwood.repository.storage import open_storage
from knockwood.repository.targets import Latest, resolve
repository = Repository.open(open_storage(sys.argv[1]))
print("ready", flush=True)
"""
_CLONE = (
    _OPEN
    + """
plan = resolve(repository, Latest())
with spawn(repository, plan, purpose="kill", registry=Registry(Path(sys.argv[2]))) as clone:
    clone.promote()
print("done", flush=True)
"""
)
_RESTORE = (
    _OPEN
    + """
restore(repository, Latest(), Path(sys.argv[2]))
print("done", flush=True)
"""
)


def run_for(script: str, words: list[Path], seconds: float) -> float | None:
    """Run a script and kill it so long after it is ready; if it ended by itself, the seconds it took."""
    child = subprocess.Popen([sys.executable, "-c", script, *map(str, words)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == b"ready\n"
        began = time.monotonic()
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
        status = child.wait()
    assert status in (0, -signal.SIGKILL)
    return time.monotonic() - began if status == 0 else None


def duration(script: str, words: list[Path]) -> float:
    """How long the script takes if nobody kills it."""
    seconds = run_for(script, words, 120)
    assert seconds is not None
    return seconds


def servers_below(folder: Path) -> list[int]:
    """PostgreSQL processes at work in a folder, after those that were told to end had time to."""
    deadline = time.monotonic() + 10
    while True:
        found = []
        for process in psutil.process_iter(["name", "cwd", "status"]):
            cwd = process.info["cwd"] or ""
            if process.info["status"] != psutil.STATUS_ZOMBIE and Path(cwd).is_relative_to(folder):
                found.append(process.pid)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def archived(new_server: ServerFactory) -> Protected:
    """A repository with a backup and two commits; its server is down."""
    server = new_server(18, segment_megabytes=1)
    with protected(server, server.data_directory.parent / "kw") as made:
        made.insert(1)
        made.backup()
        made.execute("select pg_switch_wal()")
        made.insert(2)
        made.flush()
    server.stop()
    return made


def kill_clones(made: Protected, kills: int) -> None:
    state = made.folder / "state"
    words = [made.folder / "repository", state]
    whole = duration(_CLONE, words)
    registry = Registry(state)
    left = 0
    for number in range(kills):
        run_for(_CLONE, words, whole * (number + 0.5) / kills)
        records = registry.records()
        left += len(records)
        swept = registry.sweep()
        assert swept == records
        assert registry.records() == []
        # A file that was being written when it died is removed by a later sweep.
        left_over = {path.name for path in registry.folder.iterdir() if not path.name.startswith(".tmp-")}
        assert left_over == {"sweep.lock"}
        assert servers_below(state) == []
        assert not [record for record in records if record.socket_directory.exists()]
    assert left > 0


def kill_restores(made: Protected, kills: int) -> None:
    into = made.folder / "restored"
    whole = duration(_RESTORE, [made.folder / "repository", made.folder / "first"])
    half = 0
    for number in range(kills):
        run_for(_RESTORE, [made.folder / "repository", into], whole * (number + 0.5) / kills)
        assert servers_below(into) == []
        if (into / "PG_VERSION").exists():
            check_complete(made, into)
            into.rename(made.folder / f"complete-{number}")
            continue
        if not into.exists():
            continue
        half += 1
        assert (into / WORK).is_dir()
        with pytest.raises(PostgresError):
            LocalServer(made.server.programs, into, account=made.server.account).start()
        with pytest.raises(DirectoryNotEmptyError, match="is not complete"):
            restore(made.repository, Latest(), into)
        if number % 5 == 0:
            restore(made.repository, Latest(), into, again=True)
            check_complete(made, into)
            into.rename(made.folder / f"again-{number}")
        else:
            half_done.discard(into)
            assert list(into.iterdir()) == []
    assert half > 0


def check_complete(made: Protected, folder: Path) -> None:
    server = LocalServer(made.server.programs, folder, account=made.server.account, settings={"fsync": "off"})
    with server:
        assert rows(server.dsn()) == [1, 2]


def test_a_killed_clone_is_swept_away(new_server: ServerFactory) -> None:
    kill_clones(archived(new_server), 5)


def test_a_killed_restore_never_starts_as_if_it_were_complete(new_server: ServerFactory) -> None:
    kill_restores(archived(new_server), 5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_clones_killed_at_thirty_moments(new_server: ServerFactory) -> None:
    kill_clones(archived(new_server), 30)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_restores_killed_at_thirty_moments(new_server: ServerFactory) -> None:
    kill_restores(archived(new_server), 30)
