"""What goes wrong around a command: full disks, failing stores, signals, two at once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import time_machine

from fix_cli import CommandLine, command_line

if TYPE_CHECKING:
    from fix_s3 import Proxy, S3Server
    from knockwood.postgres.binaries import Programs


@pytest.fixture
def line(
    shared_folder: Path,
    templates: Callable[[int, int], Path],
    installations: dict[int, Programs],
) -> Iterator[CommandLine]:
    with command_line(shared_folder, templates(18, 1), installations[18]) as made:
        made.execute("create table t as select a from generate_series(1, 1000) a")
        yield made


def _begin(line: CommandLine) -> None:
    line.init()
    line.edit("user=knockwood", "user=postgres")


@contextmanager
def _small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A disk of its own at `folder`; skips where this user may not mount."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_repository_disk_lists_no_backup_and_the_next_run_goes_on(line: CommandLine) -> None:
    with _small_disk(line.repository, 12):
        _begin(line)
        filler = line.repository / "filler"
        filler.write_bytes(b"x" * (11 << 20))
        error = line.fails(4, "KW203", "backup", "--wal-timeout", "20")
        assert "free" in error["hint"]
        assert line("backups")["backups"] == []
        filler.unlink()
        line("backup")
        assert line("verify")["verdict"] == "held"
        line.assert_nothing_left()


def test_a_full_disk_for_the_restore_leaves_nothing(line: CommandLine) -> None:
    _begin(line)
    line("backup")
    disk = line.folder / "disk"
    with _small_disk(disk, 16):
        line.fails(4, "KW203", "restore", "--into", disk / "new")
        assert list(disk.iterdir()) == []
    line.assert_nothing_left()


def test_a_stopped_command_says_so_and_gives_everything_back(line: CommandLine) -> None:
    _begin(line)
    child = line.start("backup", "--json")
    deadline = time.monotonic() + 60
    while not line.slots() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    ended = line.ended(child)
    if ended.status != 0:  # it may just have been done
        assert ended.status == 130, ended
        assert ended.json["error"]["code"] == "KW002"
        assert line("backups")["backups"] == []
    line.assert_nothing_left()
    line("backup")


def test_two_at_once(line: CommandLine) -> None:
    _begin(line)
    receiver = line.start("wal", "receive")
    try:
        deadline = time.monotonic() + 60
        while not line.slots() and time.monotonic() < deadline:
            time.sleep(0.02)
        error = line.fails(2, "KW302", "wal", "receive", "--wait", "0")
        assert error["retry_safe"]
        assert str(receiver.pid) in error["what"]
        line("backup")  # beside the receiver
        receiver.kill()
        receiver.wait()
        line("backup")  # beside what a killed one left: its slot is kept, its lease taken over
        assert line.slots() == ["knockwood"]
        assert line("verify")["verdict"] == "held"
    finally:
        receiver.kill()
        receiver.communicate()


def test_a_server_restarted_in_the_middle(line: CommandLine) -> None:
    _begin(line)
    child = line.start("backup", "--json", "--wal-timeout", "30")
    while not line.slots() and child.poll() is None:
        time.sleep(0.02)
    line.server.stop("immediate")
    line.server.start()
    ended = line.ended(child)
    assert ended.status in (0, 2)
    if ended.status == 2:
        assert ended.json["error"]["hint"]
        assert line("backups")["backups"] == []
    line("backup")
    assert line("verify")["verdict"] == "held"


def test_a_clock_that_jumps(line: CommandLine) -> None:
    """What is newest is told by the WAL, not by the clock; what says that it is from the future is not recent."""
    _begin(line)
    line.in_process = True
    ids = [line("backup")["backups"][0]["id"]]
    now = datetime.now(UTC)
    for number, jump in enumerate((timedelta(days=-3), timedelta(days=4000), timedelta(days=-1)), start=1):
        line.execute(f"insert into t values (-{number})")
        with time_machine.travel(now + jump):
            ids.append(line("backup")["backups"][0]["id"])
            assert [each["id"] for each in line("backups")["backups"]] == ids
            assert line("verify")["verdict"] == "held"
            restored = line("restore", "--into", line.folder / f"restored-{number}")
            assert (restored["backup"], restored["missing"]) == (ids[-1], None)
            assert line("check", "backup_age")["verdict"] == "held"
        if jump > timedelta(0):
            [finding] = line("check", "backup_age", status=1)["findings"]
            assert "yet to come" in finding["summary"]
    assert line("check", "backup_age")["verdict"] == "held"
    line.assert_nothing_left()


def test_an_object_store_that_fails(line: CommandLine, s3_server: S3Server, s3_proxy: Proxy) -> None:
    line.environment = s3_server.environment() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_proxy.port}"}
    url = f"s3://backups/{line.folder.name}"
    line.init(repository=url)
    line.edit("user=knockwood", "user=postgres")
    s3_proxy.fail(500, 3)
    line("backup")  # a few failures are borne
    s3_proxy.fail("lost answer", 2, method="PUT")
    line("backup")
    assert line("verify")["verdict"] == "held"
    line("restore", "--into", line.folder / "new")
    error = line.fails(2, "KW500", "backups", env={"AWS_SECRET_ACCESS_KEY": "wrong"})
    assert error["hint"]
    s3_proxy.fail(500, 1_000_000)
    error = line.fails(2, "KW505", "backups")
    assert error["retry_safe"]
    assert error["hint"]
    line.fails(2, "KW505", "restore", "--into", line.folder / "other")
    assert not (line.folder / "other").exists()
    s3_proxy.fail(None, 0)
    assert len(line("backups")["backups"]) == 2
