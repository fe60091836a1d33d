"""A restore in place killed at every change of a name: the old cluster or the new one, whole, or none."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from knockwood.host import files
from knockwood.model.recovery import Plan, Step
from knockwood.recover import execute as execution
from knockwood.recover.cluster import KIND, RestoreInPlace
from knockwood.recover.journal import Journal

EXCHANGE = files.exchange


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote, flushed or not; so the disk need not be waited for."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def make_cluster(folder: Path, name: str) -> None:
    (folder / "global").mkdir(parents=True)
    (folder / "global" / "pg_control").write_text(name)
    (folder / "postgresql.conf").write_text(f"# {name}\n")
    if name == "old":
        (folder / "pg_hba.conf").write_text("local all all peer\n")
    (folder / "PG_VERSION").write_text("18\n")


def restore(into: Path, tablespaces: Path) -> str:
    if into.exists():
        shutil.rmtree(into)
    make_cluster(into, "new")
    return "restored"


def discard(into: Path, tablespaces: Path) -> None:
    files.remove_tree(into)
    files.remove_tree(tablespaces)


def case(root: Path) -> tuple[Path, Path, Plan, list[RestoreInPlace]]:
    data, state = root / "pg" / "data", root / "state"
    make_cluster(data, "old")
    arguments = {"data_directory": str(data), "to": "latest", "backup": "B"}
    plan = Plan("shop", "restore in place", (Step(KIND, "restore in place", arguments),))
    handler = RestoreInPlace(restore, discard, lambda folder: None, lambda: Path("/nowhere/pg_ctl"))
    return data, state, plan, [handler]


def in_child(act: Callable[[], object], kill_at: int, exchange: bool) -> bool:
    """Run `act` in a child that is killed before its n-th flush or change of a name; True if it ended."""
    with warnings.catch_warnings():
        # Threads of numpy's do nothing here.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            arm(kill_at, exchange)
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def arm(kill_at: int, exchange: bool) -> None:
    count = 0
    rename = os.rename

    def counted() -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def killing_rename(source: Path, target: Path) -> None:
        counted()
        rename(source, target)
        counted()

    def killing_exchange(first: Path, second: Path) -> bool:
        counted()
        done = exchange and EXCHANGE(first, second)
        counted()
        return done

    os.fsync = lambda handle: counted()  # type: ignore[assignment]
    os.rename = killing_rename  # type: ignore[assignment]
    files.exchange = killing_exchange


def whole(folder: Path) -> str:
    """Which cluster lies there, whole."""
    assert (folder / "PG_VERSION").exists()
    assert (folder / "pg_hba.conf").exists(), "with the old one's configuration"
    assert (folder / "postgresql.conf").read_text() == "# old\n"
    return (folder / "global" / "pg_control").read_text()


def found(data: Path) -> set[str]:
    """The clusters in the folder, and nothing that could start half-restored in the data directory."""
    if data.exists():
        whole(data)
    return {
        (folder / "global" / "pg_control").read_text()
        for folder in data.parent.iterdir()
        if (folder / "PG_VERSION").exists()
    }


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("ending", ["resume", "roll back", "roll back killed"])
def test_every_kill_leaves_the_old_one_or_the_new_one(tmp_path: Path, exchange: bool, ending: str) -> None:
    states = set()
    for kill_at in range(1, 1000):
        data, state, plan, handlers = case(tmp_path / str(kill_at))
        ended = in_child(
            lambda plan=plan, handlers=handlers, state=state: execution.execute(
                plan, handlers, state, approve=plan.id
            ),
            kill_at,
            exchange,
        )
        assert "old" in found(data), "the old cluster is never gone"
        states.add(whole(data) if data.exists() else "none")
        entries = execution.unfinished(state)
        if ended:
            break
        if not entries:
            continue
        folder = entries[0].folder
        if ending == "resume":
            assert execution.resume(folder, handlers).complete
            assert whole(data) == "new"
            assert found(data) == {"old", "new"}
        else:
            if ending == "roll back killed":
                in_child(
                    lambda folder=folder, handlers=handlers: execution.roll_back(folder, handlers),
                    2 + kill_at % 7,
                    exchange,
                )
                assert "old" in found(data)
            if execution.unfinished(state):
                execution.roll_back(folder, handlers)
            assert whole(data) == "old"
            names = {path.name.partition("-")[0] for path in data.parent.iterdir()}
            assert names <= {"data", "data.rolled"}, "the restored one is where the outcome says, or gone"
        assert execution.unfinished(state) == []
    assert whole(data) == "new"
    assert states == ({"old", "new"} if exchange else {"old", "new", "none"})


def test_a_server_that_ran_meanwhile_makes_the_restored_one_old(tmp_path: Path) -> None:
    """Killed with the new cluster complete; the old one was started and has taken commits: restored anew."""
    restored: list[Path] = []
    entries: list[execution.Unfinished] = []

    def counting(into: Path, tablespaces: Path) -> str:
        restored.append(into)
        return restore(into, tablespaces)

    data, state, plan, [handler] = case(tmp_path)
    handler = RestoreInPlace(counting, handler.discard, handler.salvage, handler.pg_ctl)
    for kill_at in range(1, 1000):
        shutil.rmtree(data.parent)
        shutil.rmtree(state, ignore_errors=True)
        make_cluster(data, "old")
        in_child(lambda: execution.execute(plan, [handler], state, approve=plan.id), kill_at, True)
        entries = execution.unfinished(state)
        if entries and any(e.get("name") == "restored" for e in Journal.open(entries[0].folder).events):
            break
    assert whole(data) == "old"
    (data / "global" / "pg_control").write_text("old, a checkpoint later")
    entry = entries[0]
    assert execution.resume(entry.folder, [handler]).complete
    assert len(restored) == 1
    assert whole(data) == "new"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: (data / "PG_VERSION").unlink(), "not a data directory"),
        (lambda data: (data / "standby.signal").touch(), "is a standby"),
        (lambda data: shutil.rmtree(data), "no data directory"),
    ],
    ids=["no cluster", "standby", "nothing"],
)
def test_what_is_not_safe_is_refused_and_changes_nothing(
    tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    data, state, plan, handlers = case(tmp_path)
    change(data)
    before = sorted(data.parent.rglob("*"))
    recovery = execution.execute(plan, handlers, state, approve=plan.id)
    assert words in recovery.results[0].detail
    assert execution.unfinished(state) == []
    assert sorted(data.parent.rglob("*")) == before
