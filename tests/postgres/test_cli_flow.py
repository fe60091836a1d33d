"""The whole way on the command line, as the least privileged role, on every version."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fix_cli import CommandLine, command_line
from knockwood.postgres.connection import connect
from knockwood.postgres.server import LocalServer

if TYPE_CHECKING:
    from knockwood.postgres.binaries import Programs


@pytest.fixture
def line(
    every_version: int,
    shared_folder: Path,
    templates: Callable[[int, int], Path],
    installations: dict[int, Programs],
) -> Iterator[CommandLine]:
    if every_version not in installations:
        pytest.skip(f"PostgreSQL {every_version} is not installed")
    with command_line(shared_folder, templates(every_version, 1), installations[every_version]) as made:
        yield made


def _rows(line: CommandLine, folder: Path) -> list[int]:
    """What table t holds in a restored cluster, started as its user would."""
    copy = LocalServer(line.server.programs, folder, account=line.server.account)
    try:
        copy.start()
        with connect(copy.dsn()) as connection:
            return [row[0] for row in connection.execute("select a from t order by a")]
    finally:
        copy.stop("fast")


def _insert(line: CommandLine, number: int) -> tuple[int, str]:
    """One commit: its transaction, and an LSN after it."""
    [(xid,)] = line.execute(f"insert into t values ({number}) returning pg_current_xact_id()::text::bigint")
    return int(xid), str(line.execute("select pg_current_wal_insert_lsn()::text")[0][0])


def _claims(proof: dict[str, Any]) -> dict[str, str]:
    return {claim["name"]: claim["verdict"] for claim in proof["claims"]}


def test_the_whole_way_as_the_role_that_init_makes(line: CommandLine, every_version: int) -> None:
    line.execute("create table t (a int primary key)")
    _insert(line, 1)
    made = line.init("--apply")
    line.edit('rpo = "5s"', 'rpo = "12h"')  # nothing receives between the commands here
    assert made["applied"]
    assert "user=knockwood" in line.config.read_text()
    assert not line.execute("select rolsuper from pg_roles where rolname = 'knockwood'")[0][0]

    doctor = line("doctor", status=1)  # fsync is off in tests, and said to be
    assert doctor["reach"] == "local"
    assert [item["name"] for item in doctor["checks"] if item["verdict"] != "held"] == ["fsync"]

    [taken] = line("backup")["backups"]
    assert taken["health"]["verdict"] == "held"
    xid, _ = _insert(line, 2)
    assert [item["id"] for item in line("backups")["backups"]] == [taken["id"]]
    assert line("verify")["verdict"] == "held"
    assert line("wal", "gaps")["gaps"] == []
    assert line("check", "page_checksums", "amcheck_index", "amcheck_heap")["verdict"] == "held"

    proof = line("prove")
    assert (proof["verdict"], proof["missing_commits"]) == ("held", 0), _claims(proof)
    assert proof["last_commit"]["xid"] >= xid
    [status] = line("status")["clusters"]
    assert status["last_proof"]["verdict"] == "held"
    assert status["last_backup"]["id"] == taken["id"]

    before = line("restore", "--to", f"before-{xid}", "--into", line.folder / "before")
    assert before["missing"] is None
    assert _rows(line, line.folder / "before") == [1]
    line("restore", "--to", "latest", "--into", line.folder / "latest")
    assert _rows(line, line.folder / "latest") == [1, 2]
    assert line("expire")["backups"] == []
    line.assert_nothing_left()


def test_a_mistake_of_a_moment_ago_can_be_gone_back_before(line: CommandLine, every_version: int) -> None:
    if every_version != 18:
        pytest.skip("what is brought is brought alike for every version")
    line.execute("create table t (a int primary key)")
    line.init()
    line.edit("user=knockwood", "user=postgres")
    line("backup")
    _insert(line, 1)
    with connect(line.server.dsn()) as mistaken, mistaken.transaction():
        mistaken.execute("truncate t")
        [xid] = mistaken.execute("select pg_current_xact_id()::text::int").fetchone() or ()
    words = ("restore", "--to", f"before-{xid}", "--table", "postgres.public.t", "--in-place")
    shown = line(*words)
    assert (shown["recovery"], shown["comparison"]["missing"]) == (None, 1)
    _insert(line, 2)
    line(*words, "--apply")
    assert line.execute("select a from t order by a") == [(1,), (2,)]
    # What no wait can bring is refused as it is.
    assert (
        f"before-{xid + 100_000}"
        in line.fails(4, "KW201", *words[:2], f"before-{xid + 100_000}", *words[3:])["what"]
    )
    line.server.stop("immediate")
    refused = line.fails(4, "KW201", "restore", "--to", "FFFFFFFF/0", "--into", line.folder / "never")
    assert "does not answer" in refused["hint"]


def test_targets_by_lsn_and_time(line: CommandLine, every_version: int) -> None:
    if every_version != 18:
        pytest.skip("targets are read alike for every version")
    line.execute("create table t (a int primary key)")
    line.init()
    line.edit("user=knockwood", "user=postgres")
    line("backup")
    _, lsn = _insert(line, 1)
    moment = line.execute("select clock_timestamp()")[0][0]
    _insert(line, 2)
    # Nobody has received the WAL of these commits yet: whoever asks for one brings it.
    line("restore", "--to", lsn, "--into", line.folder / "lsn")
    assert _rows(line, line.folder / "lsn") == [1]
    elsewhere = moment.astimezone(timezone(timedelta(hours=-7, minutes=-30)))
    line("restore", "--to", elsewhere.isoformat(sep=" "), "--into", line.folder / "time")
    assert _rows(line, line.folder / "time") == [1]
    # Nothing was committed after this one: that, too, is proven.
    idle = line.execute("select clock_timestamp()")[0][0]
    line("restore", "--to", idle.isoformat(), "--into", line.folder / "idle")
    assert _rows(line, line.folder / "idle") == [1, 2]
    future = (idle + timedelta(hours=1)).isoformat()
    assert (
        "no commit later than"
        in line.fails(4, "KW201", "restore", "--to", future, "--into", line.folder / "no")["what"]
    )
    bare = datetime.fromisoformat(moment.isoformat()).replace(tzinfo=None).isoformat()
    error = line.fails(3, "KW100", "restore", "--to", bare, "--into", line.folder / "bare")
    assert "no zone" in error["what"]
    assert "Z (UTC)" in error["hint"]
    assert not (line.folder / "bare").exists()
    line.assert_nothing_left()
