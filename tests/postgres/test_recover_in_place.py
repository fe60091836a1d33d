"""The whole cluster restored in place: nothing that was committed is lost, and the old one is kept."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fix_cli import CommandLine, command_line
from fix_recover import killed
from knockwood.host import files, privileges
from knockwood.operations.half_done import WORK
from knockwood.postgres.connection import connect
from knockwood.postgres.server import SUPERUSER, LocalServer
from knockwood.recover import execute as execution

if TYPE_CHECKING:
    from knockwood.postgres.binaries import Programs


@pytest.fixture
def line(
    request: pytest.FixtureRequest,
    shared_folder: Path,
    templates: Callable[[int, int], Path],
    installations: dict[int, Programs],
) -> Iterator[CommandLine]:
    major = getattr(request, "param", 18)
    if major not in installations:
        pytest.skip(f"PostgreSQL {major} is not installed")
    with command_line(shared_folder, templates(major, 1), installations[major]) as made:
        made.in_process = True
        made.init()
        made.edit("user=knockwood", f"user={SUPERUSER}")
        made.execute("create table t (a int primary key)")
        made.execute("insert into t values (1)")
        made("backup")
        yield made


def started(line: CommandLine) -> LocalServer:
    """The server again, as its user would start it."""
    server = LocalServer(line.server.programs, line.server.data_directory, account=line.server.account)
    server.start()
    return server


def rows(server: LocalServer) -> list[int]:
    with connect(server.dsn()) as connection:
        return [row[0] for row in connection.execute("select a from t order by a")]


def ruin(line: CommandLine) -> str:
    """The table's file is gone; where it was."""
    [(path,)] = line.execute("select pg_relation_filepath('t')")
    (line.server.data_directory / path).unlink()
    return str(path)


@pytest.mark.parametrize(
    "line",
    [18, pytest.param(15, marks=pytest.mark.slow), pytest.param(17, marks=pytest.mark.slow)],
    indirect=True,
)
def test_everything_committed_is_back(line: CommandLine) -> None:
    data = line.server.data_directory
    with (data / "postgresql.conf").open("a") as file:
        file.write("cluster_name = 'shop'\n")
    line.execute("insert into t values (2)")
    shown = line("recover", "--in-place", status=2)
    [step] = shown["plan"]["steps"]
    assert step["kind"] == "restore-in-place"
    assert shown["plan"]["expected_loss"]["transactions"] == 0
    assert rows(line.server) == [1, 2]

    # No receiver has run since the backup: the last commit is in pg_wal alone.
    line.execute("insert into t values (3)")
    gone = ruin(line)
    done = line("recover", "--in-place", "--approve", shown["plan"]["id"], status=2)
    [result] = done["recovery"]["results"]
    assert result["outcome"] == "done", result
    claims = {claim["name"]: claim["verdict"] for claim in done["recovery"]["claims"]}
    assert claims["page checksums of the restored cluster"] == "held"
    assert not (data / "postmaster.pid").exists()
    kept = Path(result["values"]["kept"])
    assert (kept / "PG_VERSION").exists()
    assert not (kept / gone).exists()
    server = started(line)
    try:
        assert rows(server) == [1, 2, 3]
        with connect(server.dsn()) as connection:
            connection.execute("insert into t values (4)")
            assert connection.execute("show cluster_name").fetchone() == ("shop",)
            assert connection.execute("show archive_mode").fetchone() == ("off",)
    finally:
        server.stop("fast")


def test_a_server_that_is_down_already(line: CommandLine) -> None:
    line.execute("insert into t values (2)")
    line.server.kill()
    deadline = time.monotonic() + 60
    while True:
        shown = line("recover", "--in-place", status=2)
        assert [gap["check"] for gap in shown["not_checked"]] == ["server"]
        done = line("recover", "--in-place", "--apply", status=2 if time.monotonic() < deadline else 0)
        if done["recovery"]["results"][0]["outcome"] == "done":
            break
        line("recover", "--roll-back", status=1)  # children of the killed server were still there
    server = started(line)
    try:
        assert rows(server) == [1, 2]
    finally:
        server.stop("fast")


def test_back_to_before_a_mistake_and_back_again(line: CommandLine) -> None:
    """To an LSN before a DELETE; a run killed while it restores is rolled back: the old cluster, untouched."""
    line.execute("insert into t values (2)")
    [(lsn,)] = line.execute("select pg_current_wal_insert_lsn()::text")
    line.execute("delete from t")
    line("backup")  # archives the WAL up to here
    words = ("recover", "--in-place", "--to", str(lsn))
    shown = line(*words, status=2)
    assert shown["plan"]["expected_loss"]["transactions"] is None
    line.in_process = False
    child = line.start(*words, "--apply", "--json")
    data = line.server.data_directory
    while not list(data.parent.glob("data.new-*")):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    line.in_process = True
    [left] = line("recover", "--check", "sequences", status=1)["unfinished"]
    assert left["steps_done"] == 0
    rolled = line("recover", "--roll-back", status=1)
    assert rolled["recovery"]["results"][0]["outcome"] == "rolled_back"
    assert [
        path.name for path in data.parent.iterdir() if path.name.startswith("data.") and path.is_dir()
    ] in (
        [],
        ["data.socket"],
    )

    server = started(line)
    assert rows(server) == []
    server.stop("fast")
    done = line(*words, "--apply", status=2)
    assert done["recovery"]["results"][0]["outcome"] == "done"
    server = started(line)
    try:
        assert rows(server) == [1, 2]
    finally:
        server.stop("fast")


def test_no_room_or_no_such_target(line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    line.fails(4, "KW200", "recover", "--in-place", "--to", "F/0", "--apply")
    answer: dict[str, Any] = line("recover", "--in-place", "--to", "F/0", status=2)
    assert answer["plan"]["steps"] == []
    assert answer["plan"]["refused"]
    assert rows(line.server) == [1]


@pytest.mark.slow
def test_tablespaces_come_back_beside_and_the_old_ones_stay(line: CommandLine) -> None:
    place = line.folder / "space"
    place.mkdir()
    privileges.give(place, line.server.account)
    with connect(line.server.dsn()) as connection:
        connection.execute(f"create tablespace fast location '{place}'".encode())
    line.execute("create table far (a int) tablespace fast")
    line.execute("insert into far values (7)")
    line("backup")
    line.execute("insert into far values (8)")
    before = sorted(path for path in place.rglob("*"))
    done = line("recover", "--in-place", "--apply", status=2)
    [result] = done["recovery"]["results"]
    assert result["outcome"] == "done", result
    assert Path(result["values"]["tablespaces"]).is_dir()
    assert sorted(path for path in place.rglob("*")) == before
    server = started(line)
    try:
        with connect(server.dsn()) as connection:
            assert connection.execute("select a from far order by a").fetchall() == [(7,), (8,)]
            [(where,)] = connection.execute(
                "select pg_tablespace_location(oid) from pg_tablespace where spcname = 'fast'"
            ).fetchall()
            assert where.startswith(result["values"]["tablespaces"])
    finally:
        server.stop("fast")


def test_killed_while_the_work_folder_of_the_restore_is_removed(
    line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = files.remove_tree

    def killed_on_the_way(path: Path) -> None:
        if path.name == WORK and (path.parent / "PG_VERSION").exists():
            (path / "restore.json").unlink()
            raise KeyboardInterrupt
        remove(path)

    ruin(line)
    monkeypatch.setattr(files, "remove_tree", killed_on_the_way)
    line.run("recover", "--in-place", "--apply")
    monkeypatch.undo()
    assert execution.unfinished(line.state, "shop")
    done = line("recover", "--resume", status=2)
    assert done["recovery"]["results"][0]["outcome"] == "done"
    server = started(line)
    assert rows(server) == [1]
    server.stop("fast")
    assert not list(line.server.data_directory.parent.glob("data.new-*"))


@pytest.mark.slow
def test_killed_at_every_write_of_the_journal(line: CommandLine) -> None:
    """The real command with the real restore, resumed and rolled back in turn; every commit is there each time."""
    data, server = line.server.data_directory, line.server
    number = 2
    for kill_at in range(1, 100):
        with connect(server.dsn()) as connection:
            connection.execute(f"insert into t values ({number})".encode())
        text = line.config.read_text()
        line.config.write_text(re.sub(r"(?m)^dsn = .*$", f'dsn = "{server.dsn()}"', text))
        status = killed(line, kill_at, "recover", "--in-place", "--apply")
        assert (data / "PG_VERSION").exists()
        if execution.unfinished(line.state, "shop"):
            if kill_at % 2:
                done = line("recover", "--resume", status=2)
                assert done["recovery"]["results"][0]["outcome"] == "done"
            else:
                # Where no step had begun, there is nothing to be called broken.
                assert line.run("recover", "--roll-back").status in (1, 2)
        assert execution.unfinished(line.state, "shop") == []
        server.stop("fast")
        server = started(line)
        assert rows(server) == list(range(1, number + 1)), f"killed at {kill_at}"
        number += 1
        if status == 2:
            break
    server.stop("fast")
    assert kill_at > 12
    assert list(data.parent.glob("data.old-*"))
