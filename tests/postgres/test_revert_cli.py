"""`knockwood revert` from end to end: the archive, a clone, the plan, its execution, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fix_cli import CommandLine, command_line
from fix_revert import fingerprint
from knockwood.postgres.connection import connect
from knockwood.postgres.server import SUPERUSER

if TYPE_CHECKING:
    from knockwood.postgres.binaries import Programs

_SHOP = """
create table account (id int primary key, owner text, balance numeric(12, 2));
create table entry (id int primary key, account int references account on delete cascade, amount numeric, note text);
insert into account select i, 'owner ' || i, 100 from generate_series(1, 40) i;
insert into entry select i, i % 40 + 1, i, repeat(md5(i::text), 200) from generate_series(1, 100) i;
"""


@pytest.fixture(
    params=[pytest.param(15, marks=pytest.mark.slow), pytest.param(17, marks=pytest.mark.slow), 18]
)
def line(
    shared_folder: Path,
    templates: Callable[[int, int], Path],
    installations: dict[int, Programs],
    request: pytest.FixtureRequest,
) -> Iterator[CommandLine]:
    version = request.param
    settings = {"max_prepared_transactions": "5"}
    with command_line(shared_folder, templates(version, 1), installations[version], **settings) as made:
        made.in_process = True
        made.init()
        made.edit("user=knockwood", f"user={SUPERUSER}")
        made.execute(_SHOP)
        made("backup")
        yield made


def transaction(line: CommandLine, *statements: str) -> int:
    """Run the statements as one transaction: its xid."""
    with connect(line.server.dsn("postgres")) as connection, connection.transaction():
        for statement in statements:
            connection.execute(statement.encode())
        row = connection.execute("select pg_current_xact_id()::text::bigint").fetchone()
    assert row is not None
    return int(row[0])


def test_culprits_of_many_kinds_in_one_go(line: CommandLine) -> None:
    dsn = line.server.dsn("postgres")
    before = fingerprint(dsn)
    partly = transaction(
        line,
        "update account set balance = 0 where id <= 10",
        "savepoint a",
        "update account set balance = 1 where id > 10",
        "rollback to a",
        "savepoint b",
        "delete from account where id = 40",
        "update entry set note = 'short', amount = amount + 1 where id <= 5",
        "update entry set amount = amount + 1 where id <= 5",
    )
    with connect(dsn) as connection:
        connection.execute("begin; update account set owner = 'x' where id = 20")
        [(prepared,)] = connection.execute("select pg_current_xact_id()::text::bigint").fetchall()
        connection.execute("prepare transaction 'two'")
        connection.execute("commit prepared 'two'")
        connection.execute("begin")
        with connection.cursor().copy("copy account from stdin") as copy:
            copy.write(b"".join(b"%d\tcopied\t5\n" % number for number in range(100, 150)))
        [(copied,)] = connection.execute("select pg_current_xact_id()::text::bigint").fetchall()
        connection.execute("commit")
    emptied = transaction(line, "truncate entry")
    shown = line("revert", partly, prepared, copied, emptied)
    assert shown["conflicts"] == []
    assert [each["xid"] for each in shown["transactions"]] == [emptied, copied, prepared, partly]
    assert shown["plan"]["expected_loss"] == {"transactions": 0, "rows": 0, "detail": ""}
    line.fails(4, "KW200", "revert", partly, prepared, copied, emptied, "--approve", "0" * 16)
    done = line("revert", partly, prepared, copied, emptied, "--approve", shown["plan"]["id"])
    assert done["verdict"] == "held"
    assert done["reverted"] == [emptied, copied, prepared, partly]
    assert fingerprint(dsn) == before
    # The revert is a transaction like any other, and has a name.
    back = line("revert", done["xid"])
    assert back["transactions"][0]["label"].startswith("knockwood revert of ")
    assert back["plan"]["refused"] == []
    line.assert_nothing_left()


def test_a_table_locked_before_another_culprits_commit(line: CommandLine) -> None:
    """Nobody can read it on a clone between that lock and its own commit: it is read from before the lock."""
    before = fingerprint(line.server.dsn("postgres"))
    with connect(line.server.dsn("postgres")) as connection:
        connection.execute("begin")
        connection.execute("lock table entry in access exclusive mode")
        connection.execute("update entry set amount = 0 where id <= 3")
        [(locking,)] = connection.execute("select pg_current_xact_id()::text::bigint").fetchall()
        other = transaction(line, "update account set balance = 5 where id = 2")
        connection.execute("commit")
    assert "--max-rows" in line.fails(4, "KW200", "revert", locking, "--max-rows", 2)["hint"]
    done = line("revert", other, locking, "--apply", "--max-rows", 4)
    assert done["verdict"] == "held"
    assert done["reverted"] == [locking, other]
    assert fingerprint(line.server.dsn("postgres")) == before


@pytest.mark.slow
def test_dependents_ddl_and_what_is_not_known(line: CommandLine) -> None:
    dsn = line.server.dsn("postgres")
    before = fingerprint(dsn)
    culprit = transaction(
        line, "insert into account values (900, 'new', 0)", "update account set balance = 7 where id = 1"
    )
    child = transaction(line, "insert into entry values (900, 900, 1, 'good child')")
    between = transaction(line, "update account set balance = 8 where id = 1")
    edit = transaction(line, "update account set balance = 9 where id = 1")
    refused = line("revert", culprit, status=4)
    assert {(each["kind"], each["table"]) for each in refused["conflicts"]} == {
        ("other rows reference it", "public.account"),
        ("changed since", "public.account"),
    }
    assert {each["xid"] for each in refused["dependents"]} == {child, edit}
    assert refused["plan"]["steps"] == []
    assert any("reads leave no trace" in note for note in refused["notes"])
    done = line("revert", culprit, "--mode", "cascade", "--apply")
    assert done["reverted"] == [edit, between, child, culprit]
    assert fingerprint(dsn) == before

    ddl = transaction(line, "alter table account add column extra int", "update account set owner = 'y'")
    answer = line("revert", ddl, status=4)
    assert "changed the schema" in answer["plan"]["refused"][0]
    assert "extra" in answer["plan"]["refused"][0]
    line.fails(2, "KW501", "revert", 3_000_000_000)
    line.fails(3, "KW100", "revert")
    counted = transaction(line, "update account set balance = balance + 5 where id = 2")
    line.execute("update account set balance = balance + 1 where id = 2")
    line("revert", counted, "--counter", "account.balance", "--apply")
    assert line.execute("select balance::text from account where id = 2") == [("101.00",)]
    twice = line("revert", counted, "--counter", "account.balance", "--apply", status=4)
    assert "adjusted twice" in twice["plan"]["refused"][0]
    line.fails(4, "KW200", "revert", counted, "--counter", "account.nothing")
