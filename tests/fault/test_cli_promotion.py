"""A standby takes the primary's place in the middle of each command: an end that is clear, and nothing lost."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fix_cli import CommandLine, command_line
from fix_standby import caught_up, either, promote
from knockwood.postgres.binaries import Programs
from knockwood.postgres.connection import connect, current_insert_lsn
from knockwood.postgres.server import SUPERUSER, LocalServer

ROWS = 200_000

SLOW = """
[[cluster.shop.invariant]]
name = "takes its time"
sql = "select 1 where (select pg_sleep(3)) is null"
"""
"""Sessions of checks are short: this one can be met."""


@contextmanager
def followed(line: CommandLine, standby: LocalServer) -> Iterator[None]:
    """The line's cluster is the pair, and a receiver follows whichever is the primary."""
    line.init(dsn=either(line.server, standby))
    line.edit("user=knockwood", f"user={SUPERUSER}")
    child = line.start("wal", "receive")
    try:
        while "knockwood" not in line.slots():
            assert child.poll() is None
            time.sleep(0.02)
        yield
    finally:
        child.terminate()
        child.communicate()


def everything_at(standby: LocalServer, primary: LocalServer) -> None:
    with connect(primary.dsn()) as connection:
        caught_up(standby, current_insert_lsn(connection))


def at_work(line: CommandLine, child: subprocess.Popen[str], command: str) -> None:
    """Wait until a command is in the middle of what it does; fails if it ends before."""
    busy: dict[str, Callable[[], bool]] = {
        "backup": lambda: any(line.repository.glob("backups/*/.tmp-*")),
        "check": lambda: bool(line.execute("select 1 from pg_stat_activity where wait_event = 'PgSleep'")),
        "prove": lambda: any((line.state / "clones").glob("*.json")),
        "revert": lambda: any((line.state / "clones").glob("*.json")),
        "restore": (line.folder / "new").exists,
        # It asks no server: the archive alone changes under it, from its start on.
        "verify": lambda: True,
    }
    while not busy[command]():
        assert child.poll() is None, "it ended before it was seen at work"
        time.sleep(0.005)
    assert child.poll() is None


@pytest.mark.parametrize("command", ["backup", "prove", "check", "verify", "restore", "revert"])
def test_a_promotion_in_the_middle(
    command: str,
    shared_folder: Path,
    templates: Callable[[int, int], Path],
    installations: dict[int, Programs],
    standby_of: Callable[[LocalServer], LocalServer],
) -> None:
    with command_line(shared_folder, templates(18, 1), installations[18], wal_keep_size="64MB") as line:
        primary = line.server
        standby = standby_of(primary)
        try:
            with followed(line, standby):
                line.execute(
                    f"create table t as select a, repeat('x', 100) b from generate_series(1, {ROWS}) a"
                )
                line.execute("alter table t add primary key (a)")
                line("backup")
                [(xid,)] = line.execute(
                    "update t set b = 'y' where a <= 10 returning pg_current_xact_id()::text"
                )[:1]
                words = {
                    "restore": ["restore", "--into", line.folder / "new"],
                    "revert": ["revert", xid, "--apply"],
                }.get(command, [command])
                everything_at(standby, primary)
                if command == "check":
                    with line.config.open("a") as settings:
                        settings.write(SLOW)
                child = line.start(*words, "--json")
                at_work(line, child, command)
                primary.kill()
                promote(standby)
                line.server = standby
                ended = line.ended(child)
                if "error" in ended.json:
                    assert ended.status == 2
                    assert ended.json["error"]["hint"]
                # The test server runs without fsync and was never proved, which is found; nothing else may be.
                found = {finding["check"] for finding in ended.json.get("findings", ())}
                assert found <= {"configuration", "proof_age"}
                assert found or ended.status in (0, 2), ended.out
                if command == "check":  # what came after the switch
                    told = {check["name"]: check["verdict"] for check in ended.json["checks"]}
                    assert (
                        told["invariants"] == told["page_checksums"] == told["lost_writes"] == "not_checked"
                    )
                # The settings still name the files of the primary that is gone.
                stale = line("check", "page_checksums", "lost_writes", status=2)["not_checked"]
                assert {gap["check"] for gap in stale} == {"page_checksums", "lost_writes"}
                # The next run goes on, with nothing lost.
                line("backup")
                assert line("verify")["verdict"] == "held"
                restored = line("restore", "--into", line.folder / "again")
                assert restored["timeline"] > 2
                assert restored["missing"] is None
        finally:
            primary.stop("immediate")
