"""`knockwood recover` on a running server: shown first, then carried out, verified and recorded."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fix_cli import CommandLine, command_line
from knockwood.postgres.connection import connect
from knockwood.postgres.server import SUPERUSER
from knockwood.repository.repository import Repository
from knockwood.repository.storage import open_storage

if TYPE_CHECKING:
    from knockwood.postgres.binaries import Programs

CHECKS = ("--check", "invalid_indexes", "--check", "sequences", "--check", "constraints")


@pytest.fixture
def line(
    shared_folder: Path, templates: Callable[[int, int], Path], installations: dict[int, Programs]
) -> Iterator[CommandLine]:
    with command_line(shared_folder, templates(18, 1), installations[18]) as made:
        made.in_process = True
        made.init()
        made.edit("user=knockwood", f"user={SUPERUSER}")
        yield made


def kinds(answer: dict[str, Any]) -> list[str]:
    return [step["kind"] for step in answer["plan"]["steps"]]


def make_damage(line: CommandLine) -> None:
    """A failed CREATE INDEX CONCURRENTLY, a sequence behind its column, a constraint that was never checked."""
    line.execute("create table t (id serial primary key, a int)")
    line.execute("insert into t select n, n % 2 from generate_series(1, 50) n")
    with connect(line.server.dsn()) as connection, pytest.raises(Exception, match="could not create unique"):
        connection.execute("create unique index concurrently twice on t (a)")
    line.execute("update t set a = id")  # now the index can be built
    line.execute("alter table t add constraint small check (a < 1000) not valid")


def test_three_small_repairs(line: CommandLine) -> None:
    make_damage(line)
    shown = line("recover", *CHECKS, status=1)
    assert kinds(shown) == ["rebuild-index", "setval", "validate-constraint"]
    assert shown["plan"]["expected_loss"]["transactions"] == 0
    assert shown["plan"]["refused"] == []
    assert len(shown["findings"]) == 3
    assert line.execute("select nextval('t_id_seq')") == [(1,)], "showing a plan changes nothing"

    line.fails(4, "KW200", "recover", *CHECKS, "--approve", "0" * 16)
    done = line("recover", *CHECKS, "--approve", shown["plan"]["id"])
    assert done["verdict"] == "held"
    assert [result["outcome"] for result in done["recovery"]["results"]] == ["done"] * 3
    assert {claim["name"]: claim["verdict"] for claim in done["recovery"]["claims"]} == {
        "check invalid_indexes": "held",
        "check sequences": "held",
        "check constraints": "held",
    }
    assert line.execute("insert into t (a) values (77) returning id") == [(51,)]
    assert line.execute("select indisvalid from pg_index where indexrelid = 'twice'::regclass") == [(True,)]

    store = Repository.open(open_storage(str(line.repository)))
    record = store.find(f"recoveries/{done['record']}.json")
    assert record is not None
    kept = json.loads(b"".join(store.read(record)))
    assert kept["recovery"]["verdict"] == "held"
    assert kept["plan"]["id"] == shown["plan"]["id"]
    again = line("recover", *CHECKS, "--apply")
    assert kinds(again) == []
    assert line("verify")["damaged"] == [], "the record belongs to the repository"
    line.assert_nothing_left()


def test_findings_from_a_file(line: CommandLine) -> None:
    make_damage(line)
    findings = line.folder / "findings.json"
    findings.write_text(json.dumps(line("check", "sequences", status=1)))
    done = line("recover", "--finding", findings, "--apply")
    assert [result["kind"] for result in done["recovery"]["results"]] == ["setval"]
    # Between looking and mending somebody else has mended it.
    line.execute("select setval('t_id_seq', 5000)")
    done = line("recover", "--finding", findings, "--apply")
    assert [result["outcome"] for result in done["recovery"]["results"]] == ["already_done"]
    assert line.execute("select nextval('t_id_seq')") == [(5001,)], "a sequence is never lowered"
    line.fails(3, "KW100", "recover", "--finding", line.config)
    line.fails(3, "KW100", "recover", "--finding", line.folder / "nothing")


def test_a_name_that_is_no_name_is_not_executed(line: CommandLine) -> None:
    make_damage(line)
    answer = line("check", "sequences", status=1)
    answer["findings"][0]["location"]["key"] = "id) from t; drop table t; --=5"
    findings = line.folder / "findings.json"
    findings.write_text(json.dumps(answer))
    done = line("recover", "--finding", findings, "--apply", status=1)
    assert done["recovery"]["results"][0]["outcome"] == "failed"
    assert line.execute("select count(*) from t") == [(50,)]
    line("recover", "--roll-back", status=1)


def test_rows_that_break_a_constraint_stop_the_plan(line: CommandLine) -> None:
    line.execute("create table t (a int)")
    line.execute("insert into t values (5)")
    line.execute("alter table t add constraint small check (a < 5) not valid")
    done = line("recover", "--check", "constraints", "--apply", status=1)
    [result] = done["recovery"]["results"]
    assert result["outcome"] == "refused"
    assert "small" in result["detail"]
    assert done["record"], "refused with nothing done, it has come to its end"
    line.execute("update t set a = 4")
    assert line("recover", "--check", "constraints", "--apply")["verdict"] == "held"


def test_a_failure_is_resumed(line: CommandLine) -> None:
    line.execute("create table t (a int)")
    line.execute("insert into t values (1), (1)")
    with connect(line.server.dsn()) as connection, pytest.raises(Exception, match="could not create unique"):
        connection.execute("create unique index concurrently twice on t (a)")
    words = ("recover", "--check", "invalid_indexes")
    done = line(*words, "--apply", status=1)
    assert done["recovery"]["results"][0]["outcome"] == "failed"
    assert done["record"] is None
    [left] = line(*words, status=1)["unfinished"]
    assert left["steps_done"] == 0
    assert "unique" in left["reason"]
    line.fails(4, "KW200", *words, "--apply")
    line.execute("delete from t where ctid = '(0,1)'")
    done = line("recover", "--resume")
    assert done["recovery"]["results"][0]["outcome"] == "done"
    line.fails(4, "KW200", "recover", "--resume")


def test_a_rebuild_that_failed_leaves_a_copy_that_is_dropped(line: CommandLine) -> None:
    line.execute("create table t (a int primary key)")
    line.execute("create index t_pkey_ccnew on t (a)")
    line.execute("update pg_index set indisvalid = false where indexrelid = 't_pkey_ccnew'::regclass")
    shown = line("recover", "--check", "invalid_indexes", status=1)
    assert kinds(shown) == ["drop-index"]
    assert line("recover", "--check", "invalid_indexes", "--apply")["verdict"] == "held"
    assert line.execute("select to_regclass('t_pkey_ccnew')") == [(None,)]


def test_what_is_not_repaired_is_named(line: CommandLine) -> None:
    line.execute("create table t (a int primary key)")
    line.execute("alter table t disable trigger all")
    line.execute("create function f() returns trigger language plpgsql as 'begin return new; end'")
    line.execute("create trigger audit before insert on t for each row execute function f()")
    line.execute("alter table t disable trigger audit")
    shown = line("recover", "--check", "constraints", "--check", "backup_age", status=1)
    assert kinds(shown) == []
    assert any("audit" in reason for reason in shown["plan"]["refused"])
    assert any("knockwood backup" in reason for reason in shown["plan"]["refused"])
    line.fails(4, "KW200", "recover", "--check", "constraints", "--apply")


def test_words_that_do_not_go_together(line: CommandLine) -> None:
    line.fails(3, "KW100", "recover", "--apply", "--resume")
    line.fails(3, "KW100", "recover", "--to", "latest-but-one", "--apply")


def test_the_role_that_watches_may_not_repair(line: CommandLine) -> None:
    line.edit(f"user={SUPERUSER}", "user=watcher")
    line.execute("create role watcher login; grant pg_monitor, pg_read_all_data to watcher")
    make_damage(line)
    shown = line("recover", "--check", "sequences", status=1)
    assert kinds(shown) == []
    assert "--role" in shown["plan"]["refused"][0]
    assert line("recover", "--check", "sequences", "--role", SUPERUSER, "--apply")["verdict"] == "held"


def test_nothing_to_do(line: CommandLine) -> None:
    shown = line("recover", "--check", "sequences")
    assert kinds(shown) == []
    assert line.run("recover", "--check", "sequences").out.startswith("nothing was found")


def test_a_damaged_page_and_its_index_under_one_plan(line: CommandLine) -> None:
    """Page, then index; the rows are all there afterwards."""
    line.edit('rpo = "5s"', 'rpo = "12h"')
    line.execute("create table t (id int primary key, filler text)")
    line.execute("insert into t select n, repeat('x', 100) from generate_series(1, 500) n")
    line.execute("checkpoint")
    line("backup")
    line.execute("update t set filler = 'y' where id = 3")
    line.execute("checkpoint")
    [(heap, index)] = line.execute("select pg_relation_filepath('t'), pg_relation_filepath('t_pkey')")
    line.server.stop("fast")
    for path in (heap, index):
        with (line.server.data_directory / path).open("r+b") as file:
            file.seek(8192 + 4000)
            file.write(os.urandom(64))
    line.server.start()
    words = ("recover", "--check", "page_checksums")
    shown = line(*words, status=1)
    assert kinds(shown) == ["repair-pages", "rebuild-index"], shown["plan"]["refused"]
    done = line(*words, "--apply")
    assert done["verdict"] == "held", done["recovery"]
    assert line.execute("select count(*), count(*) filter (where filler = 'y') from t") == [(500, 1)]
    assert any("backup" in note for note in done["notes"])
    line.assert_nothing_left()


INVARIANT = """
[[cluster.shop.invariant]]
name = "no negative balance"
sql = "select id from account where balance < 0"
"""


def test_rows_that_break_an_invariant_are_taken_back(line: CommandLine) -> None:
    """With the culprit named; what came later is kept."""
    with line.config.open("a") as file:
        file.write(INVARIANT)
    line.execute("create table account (id int primary key, balance int, note text)")
    line.execute("insert into account select n, 100, '' from generate_series(1, 20) n")
    line("backup")
    [(xid,)] = line.execute(
        "update account set balance = -1 where id < 5 returning pg_current_xact_id()::text::bigint"
    )[:1]
    line.execute("update account set note = 'later' where id = 2")
    words = ("recover", "--check", "invariants")
    shown = line(*words, status=1)
    assert kinds(shown) == []
    assert "--xid" in shown["plan"]["refused"][0]
    shown = line(*words, "--xid", xid, status=1)
    assert kinds(shown) == ["revert"], shown["plan"]["refused"]
    done = line(*words, "--xid", xid, "--approve", shown["plan"]["id"])
    assert done["verdict"] == "held", done["recovery"]
    assert "check invariants" in {claim["name"] for claim in done["recovery"]["claims"]}
    assert line.execute("select sum(balance), max(note) from account") == [(2000, "later")]
    line.assert_nothing_left()


@pytest.mark.slow
def test_killed_at_any_moment_it_is_resumed(line: CommandLine) -> None:
    """The real command, killed after a while that grows until it comes to its end."""
    make_damage(line)
    findings = line.folder / "findings.json"
    findings.write_text(json.dumps(line("check", *CHECKS[1::2], status=1)))
    line.in_process = False
    kills = 0
    for tenths in range(2, 400, 3):
        child = line.start("recover", "--finding", findings, "--apply", "--json")
        try:
            child.wait(tenths / 10)
        except subprocess.TimeoutExpired:
            child.kill()
        child.communicate()
        if child.returncode >= 0:
            break
        kills += 1
        left = line("recover", "--finding", findings, status=1)["unfinished"]
        if left:
            done = line("recover", "--resume")
            assert done["verdict"] == "held"
            # The same damage again, for the next round.
            line.execute("drop table t")
            make_damage(line)
    assert child.returncode == 0
    assert kills > 3
    assert line("check", *CHECKS[1::2])["verdict"] == "held"
    line.assert_nothing_left()
